"""`fkv bench`: speed and memory behind a correctness gate, as rows of JSON."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from forcing_kv.export.request.flags import Json
from forcing_kv.runtime_trt.bundle.atomic.files import check_names, filled_folder
from forcing_kv.runtime_trt.console import ExitCode, console, print_json, talk
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.tools.bench.options import (
    BenchOutput,
    BenchRequest,
    DeviceName,
    LoadRequest,
    RolloutRequest,
    SuiteOptions,
)

if TYPE_CHECKING:
    from forcing_kv.runtime_trt.dtypes import DType
    from forcing_kv.tools.bench.report.rows import Row
    from forcing_kv.tools.bench.suite.items import SuiteItem


DEFAULT_LAYERS = 2
"""Of wan-1.3b on a CPU: every layer costs the same, and the second one selects the segments."""
TABLE_WIDTH = 160
"""Columns of a table that no terminal limits."""


def bench_step(
    *, request: BenchRequest = BenchRequest(), output: BenchOutput = BenchOutput()
) -> ExitCode:
    """Time of one denoise step in steady state, beside its bound."""
    return _measure("step", request, output)


def bench_chunk(
    *, request: BenchRequest = BenchRequest(), output: BenchOutput = BenchOutput()
) -> ExitCode:
    """Denoiser time and FPS of a chunk: steps, clean pass, eviction and commit; and its parts."""
    return _measure("chunk", request, output)


def bench_rollout(
    *, request: RolloutRequest = RolloutRequest(), output: BenchOutput = BenchOutput()
) -> ExitCode:
    """Latency over many chunks: p50, p99, jitter, growth of time and memory; end to end."""
    return _measure("rollout", request, output)


def bench_load(
    *, request: LoadRequest = LoadRequest(), output: BenchOutput = BenchOutput()
) -> ExitCode:
    """Time to build, to open, and from a prompt to the first latents and frame."""
    return _measure("load", request, output)


def _measure(kind: str, request: BenchRequest, output: BenchOutput) -> ExitCode:
    """Measure and show the rows of one kind; exit 1 where a gate or a subject failed."""
    from forcing_kv.tools.bench.report.rows import append_row, check_rows
    from forcing_kv.tools.bench.run import list_subjects, run

    if output.out is not None:
        check_rows(output.out)
    if output.list_subjects:
        for line in list_subjects():
            talk(line)
        return ExitCode.GOOD
    rows = []
    for row in run(request):
        if output.out is not None:
            append_row(output.out, row)
        if row.kind == kind or row.status != "ok":
            rows.append(row)
    return finish(rows, as_json=output.as_json)


def finish(rows: list[Row], *, as_json: bool, shown: list[Row] | None = None) -> ExitCode:
    """Show what went wrong in rows, then a table of them or of `shown`; exit 1 where one is bad."""
    from forcing_kv.tools.bench.report.tables import table

    bad = [row for row in rows if row.status != "ok"]
    for row in bad:
        talk(f"{row.subject}: {row.status}: {row.error}", style="red")
    made, out = table(rows if shown is None else shown), console()
    if not out.is_terminal:
        out.width = TABLE_WIDTH
    out.print(made)
    if as_json:
        print_json([row.to_json() for row in rows])
    return ExitCode.CHECK_FAILED if bad else ExitCode.GOOD


def bench_suite(
    *,
    options: SuiteOptions,
    model: str = BenchRequest.model,
    device: DeviceName = BenchRequest.device,
    dry_run: bool = False,
    as_json: Json = False,
) -> ExitCode:
    """Measure everything, most important first; skips what the file already holds.

    Args:
        model: wan-1.3b (random weights), digits or golden.
        device: Where it runs.
        dry_run: Name what would run and stop.
        as_json: Print the rows.
    """
    begin = perf_counter()
    from forcing_kv.tools.bench.report.rows import check_rows, read_rows
    from forcing_kv.tools.bench.run import require_device
    from forcing_kv.tools.bench.suite.items import suite_items
    from forcing_kv.tools.bench.suite.runner import run_suite, selected

    check_rows(options.out)
    options = replace(options, gpu=None if dry_run else require_device(device))
    if options.budget_s is not None:
        # Importing PyTorch takes long on a fresh machine.
        options = replace(options, budget_s=options.budget_s - (perf_counter() - begin))
    at_true_shapes = (device, model) == ("cpu", "wan-1.3b")
    every = _true_shapes(options) if at_true_shapes else suite_items(device, model)
    items = selected(every, options)
    if dry_run:
        return _name_items(items, timed=at_true_shapes or device == "cuda")
    rows = [row for row in run_suite(items, options, talk) if not _is_kernel(row)]
    shown = [row for row in read_rows(options.out) if not _is_kernel(row)]
    return finish(rows, as_json=as_json, shown=shown)


def _true_shapes(options: SuiteOptions) -> tuple[SuiteItem, ...]:
    """What is measured with few layers on a CPU; says what is left out."""
    from forcing_kv.tools.bench.suite.true_shape_items import SIZES, true_shape_items
    from forcing_kv.tools.bench.true_shapes.core import has_bfloat16

    dtypes: tuple[DType, ...] = options.dtype or ("float32", "bfloat16")
    if not options.dtype and not has_bfloat16():
        talk("bfloat16 is left out: PyTorch has no products in it on this CPU (AVX-512 has)")
        dtypes = ("float32",)
    layers = DEFAULT_LAYERS if options.layers is None else options.layers
    return true_shape_items(layers, options.rounds, options.size or SIZES, dtypes)


def _name_items(items: list[SuiteItem], *, timed: bool) -> ExitCode:
    from forcing_kv.tools.bench.suite.items import predict

    total = 0.0
    for item, predicted_s in predict(items):
        total += predicted_s
        when = f"  predicted {predicted_s:4.0f} s, all {total:5.0f} s"
        talk(item.name + (when if timed else ""))
    if timed:
        talk(f"{len(items)} items, about {total / 60:.0f} minutes")
    return ExitCode.GOOD


def _is_kernel(row: Row) -> bool:
    """Whether it is one of the many rows of operators' kernels and their baselines."""
    return row.kind == "ops"


def bench_report(rows: Path, /, *, out: Path, force: bool = False) -> None:
    """Make a table and PNG charts from rows.

    Args:
        rows: File of rows (JSON lines).
        out: Folder that receives report.md and charts.
        force: Overwrite an earlier report.
    """
    from forcing_kv.tools.bench.report.rows import read_rows
    from forcing_kv.tools.bench.report.tables import write_report

    check_names(out, ["report.md"], force=force)
    found = list(read_rows(rows))
    if not found:
        raise InputError(f"{rows}: no rows; measure some with `fkv bench suite --out {rows}`")
    with filled_folder(out, force=force) as folder:
        names = [path.name for path in write_report(found, folder)]
    for name in names:
        talk(f"wrote {out / name}")
