"""How much of a subject is measured."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path

from forcing_kv.tools.bench.workloads import Workload

MIN_CHUNKS = 5
"""Chunks that are measured however long they take."""
END_TO_END_S = 10.0
"""Longest time of the end-to-end part."""


@dataclass(frozen=True)
class MeasureOptions:
    """How much to measure."""

    device: str
    num_chunks: int = 50
    """Measured chunks."""
    warmup_chunks: int = 12
    """Chunks before them: the window fills, code is compiled and captured."""
    gate_chunks: int = 7
    """Chunks of the gate's rollout."""
    budget_s: float = 120.0
    """Measuring stops early after this long, but not before `MIN_CHUNKS`."""
    gate_scale: Workload | None = None
    """Workload of a smaller size that bounds the gate's error; None compares with float32."""
    growth_chunks: int = 0
    """Chunks to go on with at the end, for growth."""
    deadline: float = inf
    """When measuring stops early, growth too, on the clock of `monotonic`."""
    folder: Path = Path(".bench")
    """Where reference rollouts are kept."""
    commit: str | None = None
    """Commit to record, where there is no git checkout."""
