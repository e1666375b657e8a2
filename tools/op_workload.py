"""The operators' calls in a steady chunk of a model, for `fkv bench ops` and `fkv plugins list`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from forcing_kv.export.request.flags import Int, flags
from forcing_kv.export.request.presets import PRESETS, PUBLISHED_STATIC_HEADS, Preset, load_preset
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import (
    CachePolicy,
    ChunkShape,
    HeadPartition,
    pool_layouts,
)

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

    label: str
    """Model, latent size and split, for listings."""
    num_heads: int
    """Attention heads, H."""
    head_dim: int
    """Head dim, D."""
    num_dynamic: int
    """Dynamic heads of the layer."""
    chunk: ChunkShape
    """Frames and latent size of a chunk."""
    policy: CachePolicy
    """What each kind of head keeps."""
    num_layers: int
    """Blocks of the model, L."""

    @property
    def num_compressed_layers(self) -> int:
        """Layers that an eviction compacts."""
        return self.num_layers - (0 if self.policy.compress_first_layer else 1)

    @property
    def num_tokens(self) -> int:
        """New tokens of a chunk, N."""
        return self.chunk.num_frames * self.chunk.tokens_per_frame

    def history(self) -> tuple[tuple[int, int], ...]:
        """(capacity, valid rows) of each head's history in a steady chunk, static heads first."""
        policy, tokens = self.policy, self.chunk.tokens_per_frame
        static_frames = policy.num_sink_frames + policy.num_static_frames
        dynamic_frames = (
            policy.num_sink_frames + policy.num_temporal_frames + policy.num_dynamic_frames
        )
        static = (policy.capacity_frames("static") * tokens, static_frames * tokens)
        dynamic = (policy.capacity_frames("dynamic") * tokens, dynamic_frames * tokens)
        return (static,) * (self.num_heads - self.num_dynamic) + (dynamic,) * self.num_dynamic

    def cases(self) -> tuple[OpCase, ...]:
        """One call of every operator; without segments, none of the eviction."""
        from forcing_kv.plugins.check import cases
        from forcing_kv.plugins.frame_chain.layout import CandidateLayout
        from forcing_kv.plugins.registry import SEGMENT_SIMILARITY, SIMILARITY_EVICTION

        tokens, dim = self.num_tokens, self.head_dim
        calls = [
            cases.norm_rope_case(self.label, tokens, self.num_heads, dim),
            cases.attention_case(self.label, tokens, dim, self.history()),
        ]
        static_heads = tuple(range(self.num_heads - self.num_dynamic))
        partition = HeadPartition(self.num_heads, (static_heads,) * 2)
        layout = pool_layouts(self.policy, partition, self.chunk.tokens_per_frame)[1]
        group = layout.group("dynamic")
        if self.policy.num_dynamic_frames == 0 or group is None:
            return tuple(calls)
        candidates = CandidateLayout(
            first_head=group.first_head,
            row_offset=group.row_offset,
            rows_per_head=group.rows_per_head,
            sink_rows=self.policy.num_sink_frames * self.chunk.tokens_per_frame,
            temporal_frames=self.policy.num_temporal_frames,
            tokens_per_frame=self.chunk.tokens_per_frame,
            num_segments=self.policy.num_segments,
        )
        for spec, num_kept in (
            (SEGMENT_SIMILARITY, None),
            (SIMILARITY_EVICTION, self.policy.num_kept_segments),
        ):
            case = cases.candidate_case(
                spec,
                self.label,
                candidates,
                num_heads=self.num_heads,
                num_frames=self.chunk.num_frames,
                head_dim=dim,
                num_kept=num_kept,
            )
            calls.append(case)
        return tuple(calls)


def _published_share() -> float:
    """Share of dynamic heads in the published Self Forcing partition."""
    model = PRESETS["self-forcing-1.3b"].model
    total = model.num_layers * model.num_heads
    return (total - PUBLISHED_STATIC_HEADS["self-forcing-1.3b"]) / total


def compressed_layer(
    preset: Preset, latent_size: Sequence[int], num_dynamic: int | None = None
) -> CompressedLayer:
    """A compressed layer of a preset.

    Args:
        preset: the model and its policy.
        latent_size: latent rows and columns.
        num_dynamic: dynamic heads of the layer; None takes the published share.

    Raises:
        InputError: more dynamic heads than heads.
    """
    heads = preset.model.num_heads
    dynamic = round(heads * _published_share()) if num_dynamic is None else num_dynamic
    if not 0 <= dynamic <= heads:
        raise InputError(f"{dynamic} dynamic heads asked for; {preset.name} has {heads} heads")
    rows, columns = latent_size
    chunk = ChunkShape(preset.chunk_frames, rows, columns, preset.model.patch_size)
    label = f"{preset.name} {rows}x{columns}, {heads - dynamic} static + {dynamic} dynamic heads"
    model = preset.model
    return CompressedLayer(
        label, heads, model.head_dim, dynamic, chunk, preset.policy, model.num_layers
    )
