"""One suite item in a process of its own: `python -m forcing_kv.tools.bench.suite.worker JSON`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from forcing_kv.export.request.presets import load_preset
from forcing_kv.plugins.compile import tuning
from forcing_kv.runtime_trt.rollout.resolution import RESOLUTIONS
from forcing_kv.tools.bench.kernels.layer import compressed_layer
from forcing_kv.tools.bench.measure.options import MeasureOptions
from forcing_kv.tools.bench.measure.subject import measure
from forcing_kv.tools.bench.report.environment import describe_environment
from forcing_kv.tools.bench.report.rows import Row, append_row, describe_workload
from forcing_kv.tools.bench.subjects import subject
from forcing_kv.tools.bench.suite.items import SuiteItem
from forcing_kv.tools.ending import ended_by_signals

TACTICS = "tactics.json"
"""File of the suite's folder with the tactics that it measured."""
OPS_PRESET = "self-forcing-1.3b"
SCALE_SIZE = "480p"
"""Size whose error bounds the gate of larger ones."""
RESERVE_S = 15.0
"""Time that measuring leaves to what comes after it, until the item is stopped."""


def main(request: str) -> None:
    """Measure the item that `request` (JSON) describes, appending its rows."""
    asked = json.loads(request)
    item = SuiteItem(**asked["item"])
    folder, commit = Path(asked["folder"]), asked["commit"]
    if (folder / TACTICS).is_file():
        tuning.add_table(folder / TACTICS)
    rows: Iterable[Row]
    if item.case is not None:
        rows = [_at_true_shapes(item, folder, commit)]
    elif item.kind == "checks":
        rows = _checks(item, commit)
    elif item.kind == "ops":
        rows = _ops(item, folder, commit)
    else:
        options = MeasureOptions(
            device=item.device,
            num_chunks=item.num_chunks,
            warmup_chunks=item.warmup_chunks,
            gate_chunks=item.gate_chunks,
            gate_scale=replace(item, size=SCALE_SIZE).workload if item.same_dtype_gate else None,
            growth_chunks=item.growth_chunks,
            deadline=asked["deadline"] - RESERVE_S,
            budget_s=item.budget_s,
            folder=folder,
            commit=commit,
        )
        if item.device == "cpu":
            import torch

            # The runtimes are compared on one core each: the harness is what is tested there.
            torch.set_num_threads(1)
        rows = measure(subject(item.subject), item.workload, options)
    for row in rows:
        append_row(Path(asked["out"]), row)


def _at_true_shapes(item: SuiteItem, folder: Path, commit: str | None) -> Row:
    """The row of a case."""
    from forcing_kv.tools.bench.true_shapes.measure import CaseRequest, measure_case

    assert item.case is not None, "it has one"
    run = {"asked_chunks": item.num_chunks, "round": item.round}
    asked = subject(item.subject)
    return measure_case(
        CaseRequest(asked, item.case, item.workload, item.small_workload, folder, run, commit)
    )


def _blank(item: SuiteItem, kind: str, commit: str | None) -> Row:
    environment = describe_environment(item.device, commit)
    run = {"asked_chunks": item.num_chunks}
    return Row(kind, item.subject, describe_workload(item.workload), environment, run=run)


def _checks(item: SuiteItem, commit: str | None) -> Iterator[Row]:
    """One row: how many kernels were checked, and which are wrong."""
    from forcing_kv.tools.bench.kernels.checks import check_kernels

    verdicts = list(check_kernels(item.budget_s))
    wrong = [f"{verdict.name}: {verdict.detail}" for verdict in verdicts if not verdict.passed]
    row = replace(_blank(item, "checks", commit), metrics={"num_checks": len(verdicts)})
    if wrong:
        row = replace(row, status="gate_failed", error="\n".join(wrong[:20]))
    yield row


def _ops(item: SuiteItem, folder: Path, commit: str | None) -> Iterator[Row]:
    """Rows of every operator; the fastest tactics go to the folder, for the items after this."""
    from forcing_kv.tools.bench.kernels.bench import OpBench

    bench = OpBench(item.dtype, warmup=5, iterations=30, commit=commit)
    folder.mkdir(parents=True, exist_ok=True)
    layer = compressed_layer(load_preset(OPS_PRESET), RESOLUTIONS[item.size])
    for row in bench.rows(layer):
        yield row
        # After every row, for the item may be stopped before its end.
        tuning.update_table(bench.tuned, folder / TACTICS)
    chosen = {tuned.op: [tuned.tactic, tuned.median_ms] for tuned in bench.tuned}
    last = replace(_blank(item, "tactics", commit), metrics=chosen)
    untimed = [case.spec.name for case in layer.cases() if case.spec.name not in chosen]
    if untimed:
        reason = f"no tactic could be timed: {', '.join(untimed)}"
        last = replace(last, status="failed", error=reason)
    yield last


if __name__ == "__main__":
    with ended_by_signals():
        main(sys.argv[1])
