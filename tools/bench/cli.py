"""`fkv bench`: speed and memory behind a correctness gate, as rows of JSON."""

from __future__ import annotations

import inspect
import signal
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forcing_kv.runtime_trt.console import ExitCode, console, print_json, talk
from forcing_kv.runtime_trt.errors import InputError

if TYPE_CHECKING:
    from forcing_kv.tools.bench.report.rows import Row

Subjects = Annotated[
    list[str] | None,
    typer.Option("--subject", help="What to measure; repeat it. `--list` names them all."),
]
Model = Annotated[str, typer.Option(help="wan-1.3b (random weights) or digits.")]
Size = Annotated[
    str | None, typer.Option(help="480p, 720p or 1080p. Default: 480p, or the model's own.")
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
DTypeName = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, float16 or bfloat16. Default: bfloat16 on CUDA."),
]
Chunks = Annotated[int, typer.Option(min=5, help="Measured chunks.")]
Warmup = Annotated[int, typer.Option(min=1, help="Chunks before them, to the steady state.")]
Gate = Annotated[int, typer.Option(min=4, help="Chunks of the correctness gate's rollout.")]
Bundle = Annotated[Path | None, typer.Option(help="Measure this bundle instead of a model.")]
BackendName = Annotated[str, typer.Option("--backend", help="The bundle's backend.")]
Out = Annotated[Path | None, typer.Option(help="Append every row to this file (JSON lines).")]
Folder = Annotated[Path, typer.Option(help="Where reference rollouts are kept between calls.")]
Commit = Annotated[
    str | None, typer.Option(help="Commit to record, where there is no git checkout.")
]
Threads = Annotated[int, typer.Option(min=1, help="PyTorch threads on a CPU.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the rows.")]
ListThem = Annotated[bool, typer.Option("--list", help="Name every subject and stop.")]

_FOLDER = Path(".bench")
TABLE_WIDTH = 160
"""Columns of a table that no terminal limits."""


def _measure(
    kind: str,
    subject: Subjects = None,
    model: Model = "wan-1.3b",
    size: Size = None,
    device: Device = "cuda",
    dtype: DTypeName = None,
    chunks: Chunks = 20,
    warmup_chunks: Warmup = 12,
    gate_chunks: Gate = 7,
    bundle: Bundle = None,
    backend: BackendName = "auto",
    out: Out = None,
    folder: Folder = _FOLDER,
    commit: Commit = None,
    threads: Threads = 1,
    list_them: ListThem = False,
    as_json: AsJson = False,
) -> None:
    """Measure and show the rows of one kind; exit 1 where a gate or a subject failed."""
    from forcing_kv.tools.bench.report.rows import append_row
    from forcing_kv.tools.bench.run import BenchRequest, list_subjects, run

    if list_them:
        for line in list_subjects():
            talk(line)
        return
    request = BenchRequest(
        subject, model, size, device, dtype, chunks, warmup_chunks, gate_chunks, bundle, backend,
        folder, commit, threads,
    )  # fmt: skip
    rows = []
    for row in run(request):
        if out is not None:
            append_row(out, row)
        if row.kind == kind or row.status != "ok":
            rows.append(row)
    finish(rows, as_json=as_json)


def _command(kind: str, summary: str, *, fixed: bool = False, **defaults: int) -> Any:
    """A typer command that measures rows of one kind.

    Args:
        kind: of the rows that it shows.
        summary: its help text.
        fixed: leave the options in `defaults` out.
        defaults: values of options that are other than `_measure`'s.
    """

    def command(**options: Any) -> None:
        _measure(kind, **(defaults | options))

    parameters = [
        parameter.replace(default=defaults.get(name, parameter.default))
        for name, parameter in inspect.signature(_measure, eval_str=True).parameters.items()
        if name != "kind" and not (fixed and name in defaults)
    ]
    # What typer reads of a function.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    command.__doc__ = summary
    return command


def finish(rows: list[Row], *, as_json: bool, shown: list[Row] | None = None) -> None:
    """Show what went wrong in rows, then a table of them or of `shown`; exit 1 where one is bad."""
    from forcing_kv.tools.bench.report.tables import table

    for row in rows:
        if row.status != "ok":
            talk(f"{row.subject}: {row.status}: {row.error}", style="red")
    made, out = table(rows if shown is None else shown), console()
    if not out.is_terminal:
        out.width = TABLE_WIDTH
    out.print(made)
    if as_json:
        print_json([row.to_json() for row in rows])
    if any(row.status != "ok" for row in rows):
        raise typer.Exit(ExitCode.CHECK_FAILED)


bench_step = _command("step", "Time of one denoise step in steady state, beside its bound.")
bench_chunk = _command(
    "chunk",
    "Denoiser time and FPS of a chunk: steps, clean pass, eviction and commit; and its parts.",
)
bench_rollout = _command(
    "rollout",
    "Latency over many chunks: p50, p99, jitter, growth of time and memory; end to end.",
    chunks=50,
)
bench_load = _command(
    "load",
    "Time to build, to open, and from a prompt to the first latents and frame.",
    fixed=True,
    chunks=5,
    warmup_chunks=1,
)


def bench_suite(
    out: Annotated[Path, typer.Option(help="File that rows are appended to (JSON lines).")],
    model: Model = "wan-1.3b",
    device: Device = "cuda",
    only: Annotated[
        list[str] | None, typer.Option(help="Run items whose name contains this; repeat it.")
    ] = None,
    budget_s: Annotated[
        float | None, typer.Option(help="Stop within this time; call again to go on.")
    ] = None,
    folder: Folder = _FOLDER,
    commit: Commit = None,
    force: Annotated[bool, typer.Option("--force", help="Measure again what is there.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Name what would run and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure everything, most important first; skips what the file already holds."""
    begin = perf_counter()
    from forcing_kv.tools.bench.report.rows import read_rows
    from forcing_kv.tools.bench.run import require_device
    from forcing_kv.tools.bench.suite.items import predict, suite_items
    from forcing_kv.tools.bench.suite.runner import SuiteOptions, run_suite, selected

    gpu = None if dry_run else require_device(device)
    if budget_s is not None:
        # Importing PyTorch takes long on a fresh machine.
        budget_s -= perf_counter() - begin
    options = SuiteOptions(out, folder, tuple(only or ()), budget_s, force, commit, gpu)
    items = selected(suite_items(device, model), options)
    if dry_run:
        total = 0.0
        for item, predicted_s in predict(items):
            total += predicted_s
            when = f"  predicted {predicted_s:4.0f} s, all {total:5.0f} s"
            talk(item.name + (when if device == "cuda" else ""))
        return
    # Refused now, and not after the first item.
    out.parent.mkdir(parents=True, exist_ok=True)
    out.touch()
    # Ends like Ctrl-C does: the running item's processes with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    rows = [row for row in run_suite(items, options, talk) if not _is_kernel(row)]
    shown = [row for row in read_rows(out) if not _is_kernel(row)]
    finish(rows, as_json=as_json, shown=shown)


def _is_kernel(row: Row) -> bool:
    """Whether it is one of the many rows of operators' kernels and their baselines."""
    return row.kind == "ops"


def bench_report(
    rows: Annotated[Path, typer.Argument(help="File of rows (JSON lines).")],
    out: Annotated[Path, typer.Option(help="Folder that receives report.md and charts.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite an earlier report.")] = False,
) -> None:
    """Make a table and PNG charts from rows."""
    from forcing_kv.tools.bench.report.rows import read_rows
    from forcing_kv.tools.bench.report.tables import write_report

    if (out / "report.md").exists() and not force:
        raise InputError(f"{out / 'report.md'} exists; choose another --out, or give --force")
    found = list(read_rows(rows))
    if not found:
        raise InputError(f"{rows}: no rows; measure some with `fkv bench suite --out {rows}`")
    for path in write_report(found, out):
        talk(f"wrote {path}")
