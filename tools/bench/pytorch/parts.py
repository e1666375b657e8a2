"""The parts of a chunk, run eagerly or captured as CUDA graphs and replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forcing_kv.runtime_trt.rollout.timeline import ChunkPlan


@dataclass(frozen=True)
class Made:
    """What the parts of a chunk have made so far."""

    new: tuple[list[Tensor], list[Tensor]] = ([], [])
    dynamic: tuple[list[Tensor], list[Tensor]] = ([], [])
    selection: tuple[Tensor, Tensor] | None = None
    """Scores and kept segments."""
    x0_steps: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class _Captured:
    """One part of a chunk, captured."""

    graph: torch.cuda.CUDAGraph
    made: Made
    """Tensors that every replay fills."""


class Parts:
    """Runs the parts of chunks, each of which adds to what is made.

    Args:
        capture: whether parts are captured.
    """

    def __init__(self, *, capture: bool) -> None:
        self.made = Made()
        """What the parts so far have made."""
        self._capture = capture
        self._captured: dict[Hashable, _Captured] = {}
        self._seen: set[Hashable] = set()
        self._pool: Any = None

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Run a part: eagerly at first sight, captured at the second, replayed from then on."""
        if not self._capture or key not in self._seen:
            self._seen.add(key)
            work()
            return
        if key not in self._captured:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                work()
            self._pool = graph.pool()
            self._captured[key] = _Captured(graph, self.made)
        captured = self._captured[key]
        captured.graph.replay()
        # What this part made is where it was at capture.
        self.made = captured.made

    def close(self) -> None:
        """Drop graphs and tensors."""
        self._captured.clear()
        self.made = Made()


def kind_of(plan: ChunkPlan) -> Hashable:
    """All that the work of a chunk depends on beside tensors."""
    groups = plan.groups.items()
    return plan.evict, tuple(
        (kind, g.history_frames, g.moves, g.writes, g.dynamic_slot) for kind, g in groups
    )
