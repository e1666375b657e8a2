"""`fkv bench ops`: every operator's kernels on this GPU, beside baselines and the device's bounds.

An operator whose numbers are wrong is not timed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from forcing_kv.export.request.flags import File, Json, PositiveInt, flags
from forcing_kv.runtime_trt.console import ExitCode, print_json, screen, talk
from forcing_kv.runtime_trt.errors import BackendUnavailableError, InputError, require
from forcing_kv.runtime_trt.rollout.resolution import parse_latent_size
from forcing_kv.tools.bench.kernels.layer import LayerOptions
from forcing_kv.tools.bench.report.rows import check_rows

if TYPE_CHECKING:
    from forcing_kv.tools.bench.report.rows import Row


@flags()
@dataclass(frozen=True, kw_only=True)
class OpsOptions(LayerOptions):
    """How the operators are measured."""

    resolution: tuple[str, ...] = ()
    """480p, 720p, 1080p, pixels: 832x480px, or latent rows x columns; repeat it. Default: 480p."""
    dtype: Literal["float16", "bfloat16"] = "bfloat16"
    """What the kernels compute in."""
    warmup: PositiveInt = 10
    """Untimed calls before the timed ones."""
    iterations: PositiveInt = 100
    """Timed calls."""
    out: File | None = None
    """File to append the rows to, as JSON lines."""
    update_table: bool = False
    """Write the fastest tactics to the tuned table."""
    as_json: Json = False
    """Print one JSON object."""


def bench_ops(*, options: OpsOptions = OpsOptions()) -> ExitCode:
    """Check and time the custom operators on this GPU, beside baselines and measured bounds.

    Exits with 1 if a kernel of ours is outside its tolerance, and then not timed, or does not run.
    """
    require("torch")
    if options.out is not None:
        check_rows(options.out)
    layers = [
        options.layer(parse_latent_size("--resolution", text))
        for text in options.resolution or ["480p"]
    ]
    _require_gpu()
    from forcing_kv.plugins.compile import tuning

    if options.update_table and not os.access(tuning.TABLE, os.W_OK):
        raise InputError(f"--update-table: {tuning.TABLE} cannot be written to")
    from forcing_kv.tools.bench.kernels.bench import OpBench
    from forcing_kv.tools.bench.report.rows import append_row

    bench = OpBench(options.dtype, options.warmup, options.iterations)
    rows: list[Row] = []
    try:
        for layer in layers:
            for row in bench.rows(layer):
                rows.append(row)
                if options.out is not None:
                    append_row(options.out, row)
            if options.update_table:
                # After every size, for the next may be stopped before its end.
                tuning.update_table(bench.tuned)
                talk(f"{len(bench.tuned)} entries written to {tuning.TABLE}")
    finally:
        # Whatever stops it, a crash of the device included: what was measured is told.
        if options.as_json:
            print_json({"rows": [row.to_json() for row in rows]})
        else:
            _print_rows(rows)
    failed = any(row.status != "ok" and ": triton" in row.subject for row in rows)
    return ExitCode.CHECK_FAILED if failed else ExitCode.GOOD


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
    from rich.table import Table

    from forcing_kv.tools.bench.report.tables import OP_HEADER, op_cells

    out = screen()
    for label in dict.fromkeys(row.workload["model"] for row in rows):
        table = Table(*OP_HEADER, title=label, title_justify="left", title_style="bold")
        for row in (row for row in rows if row.workload["model"] == label):
            table.add_row(*op_cells(row))
        out.print(table)
