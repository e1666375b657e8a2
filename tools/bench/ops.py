"""`fkv bench ops`: every operator's kernels on this GPU, beside baselines and the device's bounds.

An operator whose numbers are wrong is not timed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forcing_kv.export.presets import PRESETS, load_preset
from forcing_kv.runtime_trt.console import ExitCode, print_json, talk
from forcing_kv.runtime_trt.errors import BackendUnavailableError, InputError, require
from forcing_kv.runtime_trt.resolution import RESOLUTIONS, parse_latent_size
from forcing_kv.tools.op_workload import compressed_layer

if TYPE_CHECKING:
    from forcing_kv.tools.bench.report.rows import Row


def bench_ops(
    model: Annotated[
        str, typer.Option(help=f"One of {', '.join(PRESETS)}, or a .json file.")
    ] = "self-forcing-1.3b",
    resolution: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(RESOLUTIONS)}, or ROWSxCOLUMNS; repeat it."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "bfloat16",
    dynamic_heads: Annotated[
        int | None, typer.Option(help="Dynamic heads of a layer; by default the published share.")
    ] = None,
    warmup: Annotated[int, typer.Option(min=1, help="Untimed calls before the timed ones.")] = 10,
    iterations: Annotated[int, typer.Option(min=1, help="Timed calls.")] = 100,
    out: Annotated[
        Path | None, typer.Option(help="File to append the rows to, as JSON lines.")
    ] = None,
    update_table: Annotated[
        bool, typer.Option("--update-table", help="Write the fastest tactics to the tuned table.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check and time the custom operators on this GPU, beside baselines and measured bounds.

    Exits with 1 if a kernel of ours is outside its tolerance, and then not timed, or does not run.
    """
    require("torch")
    if dtype not in ("float16", "bfloat16"):
        raise InputError(f"--dtype {dtype}: allowed are float16 and bfloat16")
    preset = load_preset(model)
    sizes = [parse_latent_size("--resolution", text) for text in resolution or ["480p"]]
    layers = [compressed_layer(preset, size, dynamic_heads) for size in sizes]
    _require_gpu()
    from forcing_kv.plugins import tuning

    if update_table and not os.access(tuning.TABLE, os.W_OK):
        raise InputError(f"--update-table: {tuning.TABLE} cannot be written to")
    from forcing_kv.tools.bench.kernels.bench import OpBench
    from forcing_kv.tools.bench.report.rows import append_row

    bench = OpBench(dtype, warmup, iterations)
    rows: list[Row] = []
    try:
        for layer in layers:
            for row in bench.rows(layer):
                rows.append(row)
                if out is not None:
                    append_row(out, row)
            if update_table:
                # After every size, for the next may be stopped before its end.
                tuning.update_table(bench.tuned)
                talk(f"{len(bench.tuned)} entries written to {tuning.TABLE}")
    finally:
        # Whatever stops it, a crash of the device included: what was measured is told.
        if as_json:
            print_json({"rows": [row.to_json() for row in rows]})
        else:
            _print_rows(rows)
    if any(row.status != "ok" and ": triton" in row.subject for row in rows):
        raise typer.Exit(ExitCode.CHECK_FAILED)


def _require_gpu() -> None:
    """Refuse a machine without a GPU that the kernels run on.

    Raises:
        BackendUnavailableError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise BackendUnavailableError(
            "`fkv bench ops` needs an NVIDIA GPU and a PyTorch with CUDA; on another machine "
            "`fkv plugins list` compiles the kernels"
        )


def _print_rows(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    from forcing_kv.tools.bench.report.tables import OP_HEADER, op_cells

    out = Console(highlight=False)
    for label in dict.fromkeys(row.workload["model"] for row in rows):
        table = Table(*OP_HEADER, title=label, title_justify="left", title_style="bold")
        for row in (row for row in rows if row.workload["model"] == label):
            table.add_row(*op_cells(row))
        out.print(table)
