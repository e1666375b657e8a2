"""Inputs of the operators, built from their specifications: for tests and for benchmarks.

Everything that an operator must not read is NaN: pool rows outside the valid ones and new rows
behind `new_len`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from forcing_kv.plugins.frame_chain.layout import CandidateLayout
from forcing_kv.plugins.op_spec import OpSpec, TensorSpec
from forcing_kv.plugins.registry import (
    HEAD_INDEXED_ATTENTION,
    QK_NORM_ROPE,
    SEGMENT_SIMILARITY,
    SIMILARITY_EVICTION,
    STEADY_ATTENTION,
)
from forcing_kv.plugins.steady_attention.layout import SteadyLayout

Rows = tuple[int, int]
"""First row and row after the last."""


@dataclass(frozen=True)
class OpCase:
    """One size of one operator."""

    spec: OpSpec
    name: str
    sizes: dict[str, int]
    """Size of every named axis of the inputs."""
    attributes: dict[str, int | float]
    integers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    valid_pool_rows: tuple[Rows, ...] = ()
    """Rows of the history pools that hold data; the others are NaN."""
    valid_new_rows: int | None = None
    """New rows of each head that hold data; None means all."""
    num_levels: int | None = None
    """Draw scores from this many distinct values, for ties; None means continuous."""

    def build(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> list[Tensor]:
        """Random inputs in the specification's order, contiguous, in the compute dtype."""
        generator = torch.Generator().manual_seed(seed)
        tensors = [self._build_one(tensor, dtype, generator) for tensor in self.spec.inputs]
        return [tensor.to(device) for tensor in tensors]

    @property
    def arguments(self) -> tuple[int | float, ...]:
        return tuple(self.attributes.values())

    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        shapes = [tensor.shape(self.sizes) for tensor in self.spec.inputs]
        return self.spec.output_shapes(shapes, self.attributes)

    def _build_one(
        self, tensor: TensorSpec, dtype: torch.dtype, generator: torch.Generator
    ) -> Tensor:
        if tensor.name in self.integers:
            return torch.tensor(self.integers[tensor.name], dtype=torch.int32)
        shape = tensor.shape(self.sizes)
        values = torch.randn(shape, generator=generator)
        if tensor.name in ("cos", "sin"):
            # One angle per row and pair, the same for both tables.
            rows, pairs = torch.arange(shape[0]), torch.arange(shape[1])
            angle = rows[:, None].double() * 10000.0 ** (-pairs.double() / shape[1])
            return getattr(angle, tensor.name)().float()
        if tensor.dtype == "W":
            return 1 + 0.1 * values
        if self.num_levels is not None and tensor.name == "scores":
            return (values * self.num_levels).round() / self.num_levels
        if tensor.axes[0] == "R" and self.valid_pool_rows:
            return _keep_rows(values, self.valid_pool_rows).to(dtype)
        if tensor.name.endswith("_new") and self.valid_new_rows is not None:
            values[:, self.valid_new_rows :] = torch.nan
        return values if tensor.dtype == "float32" else values.to(dtype)


def _keep_rows(values: Tensor, valid: Sequence[Rows]) -> Tensor:
    kept = torch.full_like(values, torch.nan)
    for start, stop in valid:
        kept[start:stop] = values[start:stop]
    return kept


def norm_rope_case(name: str, num_tokens: int, num_heads: int, head_dim: int) -> OpCase:
    """A case of FkQkNormRope."""
    return OpCase(
        QK_NORM_ROPE,
        name,
        {"N": num_tokens, "H": num_heads, "D": head_dim},
        {"num_heads": num_heads, "eps": 1e-6},
    )


def attention_case(
    name: str,
    num_tokens: int,
    head_dim: int,
    history: Sequence[tuple[int, int]],
    new_len: int | None = None,
) -> OpCase:
    """A case of FkHeadIndexedAttention.

    Args:
        history: (capacity, valid rows) of each head's history.
        new_len: valid new rows; None means all.
    """
    capacities = [capacity for capacity, _ in history]
    offsets = list(accumulate(capacities, initial=0))
    valid = tuple(
        (offset, offset + rows)
        for offset, (_, rows) in zip(offsets[:-1], history, strict=True)
        if rows
    )
    num_rows = max(1, offsets[-1])
    return OpCase(
        HEAD_INDEXED_ATTENTION,
        name,
        {"N": num_tokens, "H": len(history), "D": head_dim, "R": num_rows},
        {"max_history": max(capacities)},
        integers={
            "head_offset": tuple(min(offset, num_rows - 1) for offset in offsets[:-1]),
            "hist_len": tuple(rows for _, rows in history),
            "new_len": (num_tokens if new_len is None else new_len,),
        },
        valid_pool_rows=valid or ((0, 0),),
        valid_new_rows=new_len,
    )


def steady_case(
    name: str, num_tokens: int, head_dim: int, num_heads: int, layout: SteadyLayout
) -> OpCase:
    """A case of FkSteadyAttention."""
    blocks = tuple(layout.blocks(num_heads))
    starts = [
        (block.pool.start + head * block.capacity, block.num_rows)
        for block in blocks
        for head in range(block.num_heads)
    ]
    num_rows = max(1, blocks[-1].pool.stop)
    return OpCase(
        STEADY_ATTENTION,
        name,
        {"N": num_tokens, "H": num_heads, "D": head_dim, "R": num_rows},
        dict(layout.attributes()),
        valid_pool_rows=tuple((start, start + rows) for start, rows in starts),
    )


def candidate_case(
    spec: OpSpec,
    name: str,
    layout: CandidateLayout,
    *,
    num_heads: int,
    num_frames: int,
    head_dim: int,
    num_kept: int | None = None,
    num_levels: int | None = None,
) -> OpCase:
    """A case of FkSegmentSimilarity, or with `num_kept` of FkSimilarityEviction."""
    num_dynamic = num_heads - layout.first_head
    starts = [layout.row_offset + i * layout.rows_per_head for i in range(num_dynamic)]
    local = [start + layout.sink_rows for start in starts]
    attributes: dict[str, int | float] = dict(layout.attributes())
    if num_kept is not None:
        attributes["num_kept"] = num_kept
    return OpCase(
        spec,
        name,
        {
            "N": num_frames * layout.tokens_per_frame,
            "H": num_heads,
            "D": head_dim,
            "R": starts[-1] + layout.rows_per_head,
            "F": num_frames,
            "P": layout.num_segments,
        },
        attributes,
        valid_pool_rows=tuple((start, start + layout.local_rows) for start in local),
        num_levels=num_levels,
    )


_TOKENS = 96
_STATIC_FIRST = (CandidateLayout(2, 2 * 192, 288, 96, 1, _TOKENS, 6), 4, 32)
"""Layout, heads, head dim."""
_ALL_DYNAMIC = (CandidateLayout(0, 0, 288, 96, 1, _TOKENS, 6), 3, 64)
_NO_SINK = (CandidateLayout(1, 96, 384, 0, 3, _TOKENS, 4), 3, 32)
_ODD_TOKENS = (CandidateLayout(1, 70, 105, 35, 2, 35, 5), 2, 32)


def _scored(name: str, candidates: tuple[CandidateLayout, int, int]) -> OpCase:
    layout, heads, dim = candidates
    sizes = {"num_heads": heads, "num_frames": 3, "head_dim": dim}
    return candidate_case(SEGMENT_SIMILARITY, name, layout, **sizes)


def _evicted(
    name: str,
    candidates: tuple[CandidateLayout, int, int],
    num_kept: int,
    num_levels: int | None = None,
) -> OpCase:
    layout, heads, dim = candidates
    sizes = {"num_heads": heads, "num_frames": 3, "head_dim": dim, "num_kept": num_kept}
    return candidate_case(SIMILARITY_EVICTION, name, layout, **sizes, num_levels=num_levels)


KERNEL_CASES: tuple[OpCase, ...] = (
    norm_rope_case("one row", 1, 2, 32),
    norm_rope_case("below the tile", 3, 3, 64),
    norm_rope_case("above the tile", 5, 1, 128),
    norm_rope_case("width not a power of two", 9, 5, 32),
    attention_case("no history", 64, 32, [(0, 0), (0, 0)]),
    attention_case("empty history", 65, 32, [(64, 0), (96, 0)]),
    attention_case("unequal heads", 96, 32, [(64, 64), (64, 63), (128, 65), (128, 128)]),
    attention_case("one below the tile", 63, 64, [(127, 127), (127, 1)]),
    attention_case("some heads without history", 33, 64, [(0, 0), (130, 129)]),
    attention_case("padded new rows", 96, 32, [(64, 40), (128, 100)], new_len=65),
    attention_case("head dim 128", 40, 128, [(48, 48), (80, 70)]),
    _scored("static first", _STATIC_FIRST),
    _scored("all dynamic", _ALL_DYNAMIC),
    _scored("no sink, full window", _NO_SINK),
    _scored("odd tokens", _ODD_TOKENS),
    _evicted("static first", _STATIC_FIRST, 6),
    _evicted("ties", _ALL_DYNAMIC, 6, num_levels=1),
    _evicted("everything kept", _NO_SINK, 12),
    _evicted("odd tokens", _ODD_TOKENS, 1),
)
"""Small cases of every operator that has a kernel: tile edges, empty history, unequal heads,
padding, ties."""

CASES: tuple[OpCase, ...] = (
    *KERNEL_CASES,
    steady_case("two blocks", 33, 32, 3, SteadyLayout(2, 64, 40, 96, 96)),
    steady_case("first block alone", 17, 64, 2, SteadyLayout(2, 48, 48, 0, 0)),
    steady_case("second block alone", 17, 32, 2, SteadyLayout(0, 0, 0, 80, 33)),
    steady_case("a block without history", 5, 32, 3, SteadyLayout(1, 0, 0, 32, 16)),
    steady_case("no history", 7, 128, 2, SteadyLayout(1, 0, 0, 32, 0)),
)
"""Small cases of every operator."""
