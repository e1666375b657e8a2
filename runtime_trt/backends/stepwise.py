"""A chunk as calls of its graphs, one after another, and a commit by array slices."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import numpy as np

from forcing_kv.runtime_trt.backends.base import (
    Backend,
    ChunkPositions,
    ChunkRequest,
    ChunkResult,
    Float32,
    PendingChunk,
    StepScalars,
)
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.moves import HeadRows, RowMove, moves
from forcing_kv.runtime_trt.rollout.ports import PARTS, kv_name
from forcing_kv.runtime_trt.rollout.timeline import ChunkPlan


class _DoneChunk(PendingChunk):
    """A chunk of a backend that works while it is called."""

    def __init__(self, result: ChunkResult) -> None:
        self._result = result

    def result(self) -> ChunkResult:
        return self._result


class _Clock:
    """Wall-clock time of the parts of a chunk."""

    def __init__(self) -> None:
        self.timings_ms: dict[str, float] = {}
        self._last = perf_counter()

    def mark(self, part: str) -> None:
        """End of a part, and begin of the next."""
        now = perf_counter()
        self.timings_ms[part], self._last = 1e3 * (now - self._last), now


class StepwiseBackend(Backend):
    """Holds the order of graph runs within a chunk; a subclass says how one graph runs."""

    def submit(self, request: ChunkRequest) -> PendingChunk:
        return _DoneChunk(self.run_chunk(request))

    def run_chunk(self, request: ChunkRequest) -> ChunkResult:
        """Denoise one chunk, run the clean pass, evict and commit."""
        plan, clock = request.plan, _Clock()
        positions = ChunkPositions.of(plan, self.config)
        x0, x0_steps = self._run_steps(request, positions)
        latents = self.to_host(x0)
        clock.mark("steps")
        self.run_step(x0, None, self.clean_scalars, positions)
        clock.mark("clean")
        scores, kept = self.run_evict() if plan.evict else (None, None)
        clock.mark("evict")
        self.commit(plan)
        clock.mark("commit")
        return ChunkResult(latents, clock.timings_ms, x0_steps, scores, kept)

    def _run_steps(
        self, request: ChunkRequest, positions: ChunkPositions
    ) -> tuple[Any, list[Float32] | None]:
        """Last x0 as the backend's own; and x0 of every step, if the request asks for it."""
        x: Any = request.noise
        x0_steps = []
        for scalars, eps in zip(self.step_scalars, (*request.eps, None), strict=True):
            x0, x = self.run_step(x, eps, scalars, positions)
            if request.keep_x0:
                x0_steps.append(self.to_host(x0))
        return x0, x0_steps if request.keep_x0 else None

    def pass_inputs(
        self, x: Any, eps: Any, scalars: StepScalars, positions: ChunkPositions
    ) -> dict[str, Any]:
        """What a pass over a chunk reads beside pools and text, by port name."""
        if eps is None:
            eps = np.zeros(self.config.latent_shape, np.float32)
        return {"x": x, "eps": eps, **scalars.arrays, **positions.arrays}

    def recache(self, request: ChunkRequest) -> None:
        positions = ChunkPositions.of(request.plan, self.config)
        self.run_step(request.noise, None, self.clean_scalars, positions)
        self.commit(request.plan)


def copy_rows(plan: ChunkPlan, config: RolloutConfig, tensors: Mapping[str, Any]) -> None:
    """Commit with array slices (dense numpy arrays and torch tensors alike).

    Args:
        tensors: by port name the pools, modified, the chunk's rows and, if the plan evicts, the
            selected segments.
    """
    for move in moves(plan.groups, config):
        for part in PARTS:
            source, target = (
                _rows(tensors[kv_name(rows.family, part, move.layer)], rows, move)
                for rows in (move.source, move.target)
            )
            target[...] = source


def _rows(array: Any, rows: HeadRows, move: RowMove) -> Any:
    """View [heads, rows, D] of what a move reads or writes."""
    if array.ndim == 2:
        block = array[rows.first_row : rows.first_row + move.num_heads * rows.pitch]
        heads = block.reshape(move.num_heads, rows.pitch, -1)
    else:
        first = rows.first_row // rows.pitch
        heads = array[first : first + move.num_heads]
    return heads[:, rows.offset : rows.offset + move.num_rows]
