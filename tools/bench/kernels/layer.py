"""The operators' calls in a steady chunk of a model, for `fkv bench ops` and `fkv plugins list`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from forcing_kv.export.request.flags import Int, flags
from forcing_kv.export.request.presets import PRESETS, PUBLISHED_STATIC_HEADS, Preset, load_preset
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, pool_layouts
from forcing_kv.runtime_trt.rollout.resolution import check_latent_size

if TYPE_CHECKING:
    from forcing_kv.plugins.check.cases import OpCase


@flags()
@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """The layer whose operators are looked at."""

    model: Annotated[
        str, Parameter(help=f"One of {', '.join(PRESETS)}, or a preset in a .json file.")
    ] = "self-forcing-1.3b"
    dynamic_heads: Int | None = None
    """Dynamic heads of a layer. Default: the published share."""

    def layer(self, latent_size: Sequence[int]) -> CompressedLayer:
        """Its calls at a latent size; see `compressed_layer`."""
        return compressed_layer(load_preset(self.model), latent_size, self.dynamic_heads)


@dataclass(frozen=True)
class CompressedLayer:
    """A compressed layer of a model at one latent size."""

    preset: Preset
    """The model and its policy."""
    chunk: ChunkShape
    """Frames and latent size of a chunk."""
    num_dynamic: int
    """Dynamic heads of the layer."""

    @property
    def label(self) -> str:
        """Model, latent size and split, for listings."""
        size = f"{self.chunk.latent_height}x{self.chunk.latent_width}"
        split = f"{self.num_static} static + {self.num_dynamic} dynamic heads"
        return f"{self.preset.name} {size}, {split}"

    @property
    def num_static(self) -> int:
        """Static heads of the layer."""
        return self.preset.model.num_heads - self.num_dynamic

    @property
    def num_compressed_layers(self) -> int:
        """Layers that an eviction compacts."""
        first = 0 if self.preset.policy.compress_first_layer else 1
        return self.preset.model.num_layers - first

    def history(self) -> tuple[tuple[int, int], ...]:
        """(capacity, valid rows) of each head's history in a steady chunk, static heads first."""
        policy, tokens = self.preset.policy, self.chunk.tokens_per_frame
        static_frames = policy.num_sink_frames + policy.num_static_frames
        dynamic_frames = (
            policy.num_sink_frames + policy.num_temporal_frames + policy.num_dynamic_frames
        )
        static = (policy.capacity_frames("static") * tokens, static_frames * tokens)
        dynamic = (policy.capacity_frames("dynamic") * tokens, dynamic_frames * tokens)
        return (static,) * self.num_static + (dynamic,) * self.num_dynamic

    def cases(self) -> tuple[OpCase, ...]:
        """One call of every operator; without segments, none of the eviction."""
        from forcing_kv.plugins.check import cases
        from forcing_kv.plugins.frame_chain.layout import CandidateLayout
        from forcing_kv.plugins.registry import SEGMENT_SIMILARITY, SIMILARITY_EVICTION

        policy, chunk, num_heads = self.preset.policy, self.chunk, self.preset.model.num_heads
        tokens, dim = chunk.num_tokens, self.preset.model.head_dim
        calls = [
            cases.norm_rope_case(self.label, tokens, num_heads, dim),
            cases.attention_case(self.label, tokens, dim, self.history()),
        ]
        partition = HeadPartition(num_heads, (tuple(range(self.num_static)),) * 2)
        layout = pool_layouts(policy, partition, chunk)[1]
        group = layout.group("dynamic")
        if policy.num_dynamic_frames == 0 or group is None:
            return tuple(calls)
        candidates = CandidateLayout(
            first_head=group.first_head,
            row_offset=group.row_offset,
            rows_per_head=group.rows_per_head,
            sink_rows=policy.num_sink_frames * chunk.tokens_per_frame,
            temporal_frames=policy.num_temporal_frames,
            tokens_per_frame=chunk.tokens_per_frame,
            num_segments=policy.num_segments,
        )
        kept = {SEGMENT_SIMILARITY: None, SIMILARITY_EVICTION: policy.num_kept_segments}
        calls += [
            cases.candidate_case(
                spec, self.label, candidates, num_heads=num_heads, num_frames=chunk.num_frames,
                head_dim=dim, num_kept=num_kept,
            )
            for spec, num_kept in kept.items()
        ]  # fmt: skip
        return tuple(calls)


def compressed_layer(
    preset: Preset, latent_size: Sequence[int], num_dynamic: int | None = None
) -> CompressedLayer:
    """A compressed layer of a preset.

    Args:
        preset: the model and its policy.
        latent_size: latent rows and columns.
        num_dynamic: dynamic heads of the layer; None takes the share in the published Self Forcing
            partition.

    Raises:
        InputError: more dynamic heads than heads, or a size that cannot be cut into segments.
    """
    heads = preset.model.num_heads
    if num_dynamic is None:
        published = PRESETS["self-forcing-1.3b"]
        total = published.model.num_layers * published.model.num_heads
        num_dynamic = round(heads * (1 - PUBLISHED_STATIC_HEADS[published.name] / total))
    if not 0 <= num_dynamic <= heads:
        raise InputError(f"{num_dynamic} dynamic heads asked for; {preset.name} has {heads} heads")
    rows, columns = latent_size
    segments = preset.policy.num_segments if preset.policy.num_dynamic_frames else 1
    check_latent_size((rows, columns), preset.model.patch_size, segments)
    chunk = ChunkShape(preset.chunk_frames, rows, columns, preset.model.patch_size)
    return CompressedLayer(preset, chunk, num_dynamic)
