"""Cache policies to compare: the values of each field that are tried with each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from forcing_kv.export.request.flags import Integers, Numbers, flags, panel


@flags(panel("Grid (each a list; every combination is tried)"))
@dataclass(frozen=True)
class PolicyGrid:
    """Values to try; every combination is one candidate."""

    thresholds: Numbers | None = None
    """Lowest scores of a static head. Default: the partition as its file has it."""
    dynamic_frames: Integers = (0, 1, 2)
    """Retained segments in frames: of three candidates, 1 is a retention of 0.33."""
    segments: Integers | None = None
    """Segments per frame. Default: the model's own."""
    static_frames: Integers = (1,)
    """Local frames of static heads."""
    temporal_frames: Integers = (1, 2)
    """Local frames of dynamic heads."""

    def combinations(self) -> Iterator[tuple[float | None, dict[str, Any]]]:
        """Threshold (None for the file's own) and changed policy fields of every candidate."""
        values = {
            "num_dynamic_frames": self.dynamic_frames,
            "num_segments": self.segments,
            "num_static_frames": self.static_frames,
            "num_temporal_frames": self.temporal_frames,
        }
        tried = {name: given for name, given in values.items() if given is not None}
        for threshold in self.thresholds or (None,):
            for changes in itertools.product(*tried.values()):
                yield threshold, dict(zip(tried, changes, strict=True))
