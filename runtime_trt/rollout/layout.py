"""Frozen data that every part shares: shapes, head partition and pool layout.

Terms: T tokens per latent frame, F latent frames per chunk, H heads, D head dim; those of the
policy are in `policy`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.policy import CachePolicy, HeadKind, require_at_least


@dataclass(frozen=True)
class ModelShape:
    """Architecture of a causal Wan2.1-style denoiser."""

    num_layers: int
    """Transformer blocks, L."""
    dim: int
    """Model width, H * D."""
    ffn_dim: int
    """Hidden width of the feed-forward network."""
    num_heads: int
    """Attention heads, H."""
    in_channels: int = 16
    """Latent channels, C."""
    text_len: int = 512
    """Rows of the padded prompt embedding."""
    text_dim: int = 4096
    """Width of the prompt embedding."""
    freq_dim: int = 256
    """Width of the time sinusoid."""
    patch_size: int = 2
    """Side of the square spatial patch, in latent pixels."""
    eps: float = 1e-6
    """Epsilon of every norm."""

    def __post_init__(self) -> None:
        counts = {k: v for k, v in asdict(self).items() if k != "eps"}
        require_at_least("ModelShape", counts, 1)
        if not 0 < self.eps < 1:
            raise InputError(f"ModelShape.eps is {self.eps}; it must be between 0 and 1")
        if self.dim % self.num_heads or self.head_dim % 2:
            raise InputError(
                f"ModelShape: dim {self.dim} must be num_heads {self.num_heads} times an even "
                "head dim"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def rope_pairs(self) -> tuple[int, int, int]:
        """Rotary pairs (complex channels) for the temporal, height and width axes."""
        spatial = self.head_dim // 2 // 3
        return self.head_dim // 2 - 2 * spatial, spatial, spatial


@dataclass(frozen=True)
class ChunkShape:
    """Size of one chunk of latents."""

    num_frames: int
    """Latent frames per chunk, F."""
    latent_height: int
    """Latent rows, h."""
    latent_width: int
    """Latent columns, w."""
    patch_size: int = 2
    """Side of the square spatial patch; must equal the model's."""

    def __post_init__(self) -> None:
        require_at_least("ChunkShape", asdict(self), 1)
        if self.latent_height % self.patch_size or self.latent_width % self.patch_size:
            raise InputError(
                f"ChunkShape: latent size {self.latent_height}x{self.latent_width} must be a "
                f"multiple of the patch size {self.patch_size} on both sides"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns of one frame."""
        return self.latent_height // self.patch_size, self.latent_width // self.patch_size

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame, T."""
        rows, columns = self.grid
        return rows * columns

    @property
    def num_tokens(self) -> int:
        """Tokens of one chunk, F * T."""
        return self.num_frames * self.tokens_per_frame


@dataclass(frozen=True)
class HeadPartition:
    """Static heads of each layer, by the checkpoint's head index; all others are dynamic."""

    num_heads: int
    """Heads per layer, H."""
    static_heads: tuple[tuple[int, ...], ...]
    """For each layer the static heads, ascending."""

    def __post_init__(self) -> None:
        sizes = {"num_layers": len(self.static_heads), "num_heads": self.num_heads}
        require_at_least("HeadPartition", sizes, 1)
        for layer, heads in enumerate(self.static_heads):
            if list(heads) != sorted(set(heads)) or any(
                not 0 <= head < self.num_heads for head in heads
            ):
                raise InputError(
                    f"HeadPartition: layer {layer} lists static heads {list(heads)}; they must be "
                    f"ascending, distinct and within 0..{self.num_heads - 1}"
                )

    @classmethod
    def uniform(cls, num_layers: int, num_heads: int, *, static: bool) -> HeadPartition:
        """Every head static, or every head dynamic."""
        heads = tuple(range(num_heads)) if static else ()
        return cls(num_heads, (heads,) * num_layers)

    @property
    def num_layers(self) -> int:
        return len(self.static_heads)

    @property
    def num_static_heads(self) -> int:
        """Static heads of all layers together."""
        return sum(map(len, self.static_heads))

    def dynamic_heads(self, layer: int) -> tuple[int, ...]:
        """Dynamic heads of `layer`, ascending."""
        static = set(self.static_heads[layer])
        return tuple(head for head in range(self.num_heads) if head not in static)

    def head_order(self, layer: int) -> tuple[int, ...]:
        """Checkpoint head index at each exported position: static heads first."""
        return self.static_heads[layer] + self.dynamic_heads(layer)


@dataclass(frozen=True)
class HeadGroup:
    """Heads of one layer that share a capacity: a dense [heads, rows, D] block of the pool."""

    kind: HeadKind
    first_head: int
    """First exported head position."""
    num_heads: int
    capacity_frames: int
    row_offset: int
    """First pool row of the group."""
    tokens_per_frame: int
    steady_frames: int
    """Length of the valid prefix in the long run."""
    own_frames: tuple[int, ...]
    """Frames of a chunk whose rows the heads may hand to a commit."""
    own_row_offset: int
    """First of the group's rows among those of the chunk that its layer hands over."""

    @property
    def own_rows_per_head(self) -> int:
        """Rows of a chunk that one head may hand to a commit."""
        return len(self.own_frames) * self.tokens_per_frame

    @property
    def own_rows(self) -> slice:
        """The group's rows among those of the chunk that its layer hands over."""
        num_rows = self.num_heads * self.own_rows_per_head
        return slice(self.own_row_offset, self.own_row_offset + num_rows)

    @property
    def steady_rows(self) -> int:
        """Pool rows that one head sees in the long run."""
        return self.steady_frames * self.tokens_per_frame

    @property
    def rows_per_head(self) -> int:
        """Pool rows of one head."""
        return self.capacity_frames * self.tokens_per_frame

    @property
    def num_rows(self) -> int:
        """Pool rows of the whole group."""
        return self.num_heads * self.rows_per_head

    @property
    def heads(self) -> slice:
        """The group's heads in a head-major tensor."""
        return slice(self.first_head, self.first_head + self.num_heads)

    @property
    def rows(self) -> slice:
        """The group's rows in the pool."""
        return slice(self.row_offset, self.row_offset + self.num_rows)


@dataclass(frozen=True)
class LayerLayout:
    """Packed K (or V) of one layer: its pool, and the rows of a chunk that a commit may copy."""

    groups: tuple[HeadGroup, ...]

    @property
    def num_own_rows(self) -> int:
        """Rows of a chunk that the layer hands over, head by head."""
        return self.groups[-1].own_rows.stop

    @property
    def num_rows(self) -> int:
        """Rows of the pool, R; at least 1, so that no binding is empty."""
        return max(1, sum(group.num_rows for group in self.groups))

    @property
    def head_offset(self) -> tuple[int, ...]:
        """First pool row of each exported head position."""
        return tuple(
            group.row_offset + head * group.rows_per_head
            for group in self.groups
            for head in range(group.num_heads)
        )

    @property
    def max_rows_per_head(self) -> int:
        """Largest capacity of any head."""
        return max(group.rows_per_head for group in self.groups)

    def group(self, kind: HeadKind) -> HeadGroup | None:
        """The group of `kind`, or None if the layer has no such head."""
        return next((group for group in self.groups if group.kind == kind), None)


def pool_layouts(
    policy: CachePolicy, partition: HeadPartition, chunk: ChunkShape
) -> tuple[LayerLayout, ...]:
    """Lay out the pool of every layer: static heads first, rows `[sink | local | dynamic]`."""
    layouts, tokens = [], chunk.tokens_per_frame
    for layer in range(partition.num_layers):
        num_static = len(partition.static_heads[layer])
        parts: Iterable[tuple[HeadKind, int]] = (
            ("static", num_static),
            ("dynamic", partition.num_heads - num_static),
        )
        if layer == 0 and not policy.compress_first_layer:
            parts = (("uncompressed", partition.num_heads),)
        groups: list[HeadGroup] = []
        head = row = own_row = 0
        for kind, count in parts:
            if count == 0:
                continue
            capacity, steady = policy.capacity_frames(kind), policy.steady_frames(kind)
            own = policy.own_frames(kind, chunk.num_frames)
            group = HeadGroup(kind, head, count, capacity, row, tokens, steady, own, own_row)
            groups.append(group)
            head, row, own_row = head + count, row + group.num_rows, group.own_rows.stop
        layouts.append(LayerLayout(tuple(groups)))
    return tuple(layouts)


def pool_nbytes(layouts: Sequence[LayerLayout], head_dim: int, itemsize: int) -> int:
    """Bytes of every K and V pool together."""
    return 2 * sum(layout.num_rows for layout in layouts) * head_dim * itemsize


def check_policy(policy: CachePolicy, partition: HeadPartition, chunk: ChunkShape) -> None:
    """Refuse a policy that cannot be run as fixed-shape buffers.

    Raises:
        InputError: segments without room for candidates, a frame that P does not divide, layer 1
            without a dynamic head, a budget above the candidates, or a prompt switch that would
            re-encode more than one chunk.
    """
    if policy.num_recached_frames > chunk.num_frames and policy.num_dynamic_frames:
        raise InputError(
            f"the policy re-encodes {policy.num_recached_frames} frames at a prompt switch, but "
            f"a chunk has {chunk.num_frames}; lower the sink, local or dynamic frames"
        )
    if policy.num_dynamic_frames == 0:
        return
    if not 1 <= policy.num_temporal_frames <= chunk.num_frames:
        raise InputError(
            f"segments need 1 <= num_temporal_frames <= {chunk.num_frames} (frames per chunk); "
            f"found {policy.num_temporal_frames}"
        )
    if policy.num_dynamic_frames > chunk.num_frames:
        raise InputError(
            f"num_dynamic_frames is {policy.num_dynamic_frames}, but there are only "
            f"{chunk.num_frames} candidate frames"
        )
    if chunk.tokens_per_frame % policy.num_segments:
        raise InputError(
            f"a frame has {chunk.tokens_per_frame} tokens, which num_segments "
            f"{policy.num_segments} does not divide; choose a divisor"
        )
    if partition.num_layers < 2 or not partition.dynamic_heads(1):
        raise InputError(
            "layer 1 has no dynamic head, so segments cannot be scored; lower the calibration "
            "threshold's static share or set num_dynamic_frames to 0"
        )
