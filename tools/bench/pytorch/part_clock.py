"""Times the parts of a chunk on the clock of the device that runs them."""

from __future__ import annotations

from itertools import pairwise
from time import perf_counter
from typing import Any

import torch


class PartClock:
    """Marks between parts: events on CUDA's current stream, the host's clock on a CPU.

    Args:
        device: where the parts run; the first part begins now.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_host = device.type == "cpu"
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        """End a part, and begin the next one."""
        if self._on_host:
            self._marks.append(perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def elapsed_ms(self) -> list[float]:
        """Time of every part; waits for the last one."""
        if self._on_host:
            return [1e3 * (end - begin) for begin, end in pairwise(self._marks)]
        self._marks[-1].synchronize()
        return [begin.elapsed_time(end) for begin, end in pairwise(self._marks)]
