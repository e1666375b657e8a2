"""Runs the items of the benchmark, each in a process of its own, and skips what is done.

One crash, one out-of-memory or one compiler that does not finish costs one item: the parent
records it as a failed row and goes on. Rows are appended as soon as they are measured, so a suite
can be cut off anywhere and called again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from time import monotonic, perf_counter
from typing import get_args

from forcing_kv.runtime_trt.bundle.atomic.places import without_links
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.tools.bench.options import SuiteOptions
from forcing_kv.tools.bench.report.environment import describe_environment
from forcing_kv.tools.bench.report.rows import (
    Row,
    append_row,
    describe_workload,
    failed_kind,
    read_rows,
)
from forcing_kv.tools.bench.suite.items import SuiteItem, predict
from forcing_kv.tools.bench.workloads import Case

_WORKER = "forcing_kv.tools.bench.suite.worker"


def selected(items: Sequence[SuiteItem], options: SuiteOptions) -> list[SuiteItem]:
    """Items that `options` ask for and that are not done; those that failed before come last.

    What the end of a budget has cut off keeps its place, once.

    Raises:
        InputError: a part of a name is in no item's.
    """
    names = [item.name for item in items]
    unknown = [part for part in options.only if not any(part in name for name in names)]
    if unknown:
        raise InputError(f"--only {unknown[0]}: no item has it in its name; there are {names}")
    asked = [i for i in items if not options.only or any(part in i.name for part in options.only)]
    if options.force:
        return asked
    done: set[object] = set()
    cut: set[object] = set()
    failed: set[object] = set()
    for row in read_rows(options.out):
        key = _row_key(row)
        if options.gpu not in (None, row.environment.get("gpu")):
            continue
        if row.status == "ok" and row.kind in _LAST_KINDS:
            done.add(key)
        elif row.run.get("cut_off") and key not in cut:
            cut.add(key)
        elif row.status != "ok":
            failed.add(key)
    left = [item for item in asked if item.key not in done]
    return sorted(left, key=lambda item: item.key in failed)


_LAST_KINDS = ("rollout", "checks", "tactics", *get_args(Case))
"""Kind of the row that says that an item is done."""


def _row_key(row: Row) -> tuple[object, ...]:
    work = row.workload
    return (
        row.subject, row.environment["device"], work["model"], work["size"], work["dtype"],
        row.run.get("asked_chunks"), row.run.get("case"), row.run.get("round", 0),
    )  # fmt: skip


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
    for item, predicted_s in predict(items):
        left = None if options.budget_s is None else options.budget_s - (perf_counter() - start)
        # A prediction may be far too long: half of it is worth a try.
        if left is not None and left < max(MIN_ITEM_S, predicted_s / 2):
            report(f"{item.name}: left for the next call ({left:.0f} s of the budget left)")
            continue
        report(f"{item.name}: begins")
        before = sum(1 for _ in read_rows(options.out))
        begin = perf_counter()
        limit = item.timeout_s if left is None else min(left, item.timeout_s)
        error, cut_off = None, False
        try:
            error = _run_item(item, options, limit)
        except subprocess.TimeoutExpired:
            cut_off = limit < item.timeout_s
            error = f"not finished after {limit:.0f} s{', the rest of the budget' * cut_off}"
        rows = list(read_rows(options.out))[before:]
        if error is not None:
            row = _failed_row(item, options, item.case or failed_kind(rows), error)
            if cut_off:
                row = replace(row, run={**row.run, "cut_off": True})
            append_row(options.out, row)
            rows.append(row)
        seconds = perf_counter() - begin
        report(f"{item.name}: {', '.join(sorted({row.status for row in rows}))}, {seconds:.0f} s")
        yield from rows


_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
GRACE_S = 5.0
"""Time that a process has to end by itself."""
MIN_ITEM_S = 45.0
"""An item is not begun with less time left."""


def _run_item(item: SuiteItem, options: SuiteOptions, timeout_s: float) -> str | None:
    """Run an item in a process of its own; returns what went wrong outside of its own rows.

    Raises:
        subprocess.TimeoutExpired: it is not finished after `timeout_s`, and stopped.
    """
    request = {
        "item": asdict(item),
        "out": str(options.out),
        "folder": str(options.folder),
        "commit": options.commit,
        # The clock is the same in every process.
        "deadline": monotonic() + timeout_s,
    }
    command = [sys.executable, "-m", _WORKER, json.dumps(request)]
    with tempfile.TemporaryFile() as log:
        # A group of its own: a compiler's workers end with it.
        environment = _environment(options) | (_ONE_THREAD if item.case else {})
        process = subprocess.Popen(command, stderr=log, env=environment, process_group=0)
        try:
            code = process.wait(timeout_s)
        except BaseException:
            _stop(process)
            raise
        if code:
            log.seek(0)
            tail = log.read().decode(errors="replace")[-1500:]
            return f"the process ended with code {code}: {tail}"
    return None


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group: first by asking, so that it removes what is half-made."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment(options: SuiteOptions) -> dict[str, str]:
    """This process's, with the compilers' caches in the suite's folder."""
    caches = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    folder = without_links(options.folder)
    return {name: str(folder / part) for name, part in caches.items()} | dict(os.environ)


def _failed_row(item: SuiteItem, options: SuiteOptions, kind: str, error: str) -> Row:
    return Row(
        kind,
        item.subject,
        describe_workload(item.workload),
        describe_environment(item.device, options.commit),
        status="failed",
        error=error,
        run={"asked_chunks": item.num_chunks, "case": item.case, "round": item.round},
    )
