"""The whole benchmark as a list of items, each run in its own process and skipped once done.

One crash, one out-of-memory or one compiler that does not finish costs one item: the parent
records it as a failed row and goes on. Rows are appended as soon as they are measured, so a suite
can be cut off anywhere and called again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from forcing_kv.runtime_trt.config import DType
from forcing_kv.tools.bench.rows import (
    Row,
    append_row,
    describe_environment,
    describe_workload,
    read_rows,
)
from forcing_kv.tools.bench.subjects import SUBJECTS
from forcing_kv.tools.bench.workloads import workload

_WORKER = "forcing_kv.tools.bench.worker"


@dataclass(frozen=True)
class SuiteItem:
    """One subject on one workload."""

    model: str
    size: str
    subject: str
    device: str
    dtype: DType = "bfloat16"
    num_chunks: int = 50
    warmup_chunks: int = 12
    gate_chunks: int = 7
    budget_s: float = 60.0
    """Longest time of measuring alone."""
    timeout_s: float = 560.0
    """Longest time of the item."""

    @property
    def name(self) -> str:
        """How `--only` finds it."""
        return f"{self.size}/{self.subject}"


_FIRST = ("eager-dense", "eager-forcing-kv", "operators-graph", "inductor")
"""Baselines, our operators without a compiler (nothing in it can fail to compile), the product."""
_LARGER = ("eager-dense", "operators-graph", "inductor", "eager-forcing-kv")
_THEN = (
    "compile-forcing-kv-graph", "inductor-no-graph", "compile-dense-graph",
    "operators-compile-graph", "operators", "compile-forcing-kv", "compile-dense",
    "operators-compile", "eager-grouped", "inductor-no-autotune",
)  # fmt: skip


def suite_items(device: str, model: str) -> tuple[SuiteItem, ...]:
    """Every item, what matters most first."""
    if device == "cpu":
        return _small_items(model)
    items = [SuiteItem("wan-1.3b", "480p", name, device) for name in _FIRST]
    # A dense chunk takes seconds there: fewer chunks, after a window (7 chunks) of warm-up. The
    # gate is as short as covers everything, for its float32 rollout takes minutes at 1080p.
    for size, num_chunks in (("720p", 20), ("1080p", 10)):
        items += [
            SuiteItem("wan-1.3b", size, name, device, num_chunks=num_chunks, warmup_chunks=8,
                      gate_chunks=5)
            for name in _LARGER
        ]  # fmt: skip
    items += [SuiteItem("wan-1.3b", "480p", name, device) for name in _THEN]
    growth = SuiteItem(
        "wan-1.3b", "480p", "inductor", device, num_chunks=500, budget_s=300, timeout_s=560
    )
    return (*items, growth)


def _small_items(model: str) -> tuple[SuiteItem, ...]:
    names = ("eager-dense", "eager-forcing-kv", "operators", "onnxruntime", "onnxruntime-dense",
             "inductor")  # fmt: skip
    return tuple(
        SuiteItem(model, "native", name, "cpu", dtype="float32", budget_s=20.0, timeout_s=560.0)
        for name in names
    )


@dataclass(frozen=True)
class SuiteOptions:
    """How a suite is run."""

    out: Path
    """File that rows are appended to."""
    folder: Path
    """Where reference rollouts are kept."""
    only: Sequence[str] = ()
    """Run items whose name contains one of these; all if empty."""
    budget_s: float | None = None
    """Start no item that could not be finished within this time; None for no limit."""
    force: bool = False
    """Measure again what is there."""
    commit: str | None = None


def selected(items: Sequence[SuiteItem], options: SuiteOptions) -> list[SuiteItem]:
    """Items that `options` ask for and that are not done."""
    asked = [i for i in items if not options.only or any(part in i.name for part in options.only)]
    if options.force:
        return asked
    done = _done(options.out)
    return [item for item in asked if (*_item_key(item), item.num_chunks) not in done]


def _item_key(item: SuiteItem) -> tuple[str, ...]:
    return item.subject, item.device, item.model, item.size, item.dtype


def _done(out: Path) -> set[tuple[object, ...]]:
    """Items whose last row is there: the rollout is written last."""
    return {
        (
            row.subject, row.environment["device"], row.workload["model"], row.workload["size"],
            row.workload["dtype"], row.run.get("asked_chunks"),
        )
        for row in read_rows(out)
        if row.kind == "rollout" and row.status == "ok"
    }  # fmt: skip


def run_suite(
    items: Sequence[SuiteItem], options: SuiteOptions, report: Callable[[str], None]
) -> Iterator[Row]:
    """Run the items one by one.

    Args:
        items: what to run, from `selected`.
        options: files and limits.
        report: told what happens.

    Yields:
        The rows that each item appended.
    """
    start = perf_counter()
    for item in items:
        left = None if options.budget_s is None else options.budget_s - (perf_counter() - start)
        if left is not None and left < MIN_ITEM_S:
            report(f"{item.name}: left for the next call ({left:.0f} s of the budget left)")
            continue
        report(f"{item.name}: begins")
        before = sum(1 for _ in read_rows(options.out))
        begin = perf_counter()
        error = _run_item(
            item, options, item.timeout_s if left is None else min(left, item.timeout_s)
        )
        rows = list(read_rows(options.out))[before:]
        if error is not None:
            rows.append(_failed_row(item, options, error))
        seconds = perf_counter() - begin
        report(f"{item.name}: {', '.join(sorted({row.status for row in rows}))}, {seconds:.0f} s")
        yield from rows


MIN_ITEM_S = 45.0
"""An item is not begun with less time left."""


def _run_item(item: SuiteItem, options: SuiteOptions, timeout_s: float) -> str | None:
    """Run an item in a process of its own; returns what went wrong outside of its own rows."""
    request = {
        "item": asdict(item),
        "out": str(options.out),
        "folder": str(options.folder),
        "commit": options.commit,
    }
    command = [sys.executable, "-m", _WORKER, json.dumps(request)]
    try:
        done = subprocess.run(command, timeout=timeout_s, stderr=subprocess.PIPE, check=False)
    except subprocess.TimeoutExpired:
        return f"not finished after {timeout_s:.0f} s"
    if done.returncode:
        tail = done.stderr.decode(errors="replace")[-1500:]
        return f"the process ended with code {done.returncode}: {tail}"
    return None


def _failed_row(item: SuiteItem, options: SuiteOptions, error: str) -> Row:
    work = workload(item.model, item.size, SUBJECTS[item.subject].policy, item.dtype)
    row = Row(
        "chunk",
        item.subject,
        describe_workload(work),
        describe_environment(item.device, options.commit),
        status="failed",
        error=error,
    )
    append_row(options.out, row)
    return row
