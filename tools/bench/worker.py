"""One suite item in a process of its own: `python -m forcing_kv.tools.bench.worker REQUEST`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from forcing_kv.tools.bench.measure import MeasureOptions, measure
from forcing_kv.tools.bench.rows import append_row
from forcing_kv.tools.bench.subjects import subject
from forcing_kv.tools.bench.suite import SuiteItem
from forcing_kv.tools.bench.workloads import workload


def main(request: str) -> None:
    """Measure the item that `request` (JSON) describes, appending its rows."""
    asked = json.loads(request)
    item = SuiteItem(**asked["item"])
    chosen = subject(item.subject)
    work = workload(item.model, item.size, chosen.policy, item.dtype)
    options = MeasureOptions(
        device=item.device,
        num_chunks=item.num_chunks,
        warmup_chunks=item.warmup_chunks,
        gate_chunks=item.gate_chunks,
        budget_s=item.budget_s,
        folder=Path(asked["folder"]),
        commit=asked["commit"],
    )
    if item.device == "cpu":
        import torch

        # The runtimes are compared on one core each: the harness is what is tested there.
        torch.set_num_threads(1)
    for row in measure(chosen, work, options):
        append_row(Path(asked["out"]), row)


if __name__ == "__main__":
    main(sys.argv[1])
