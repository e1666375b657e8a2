"""`fkv plugins list`: every operator's kernels on every device, compiled here and now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from forcing_kv.export.request.flags import Ints, Json, LatentSize, PositiveInt, flags
from forcing_kv.runtime_trt.console import print_json, screen, track
from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.runtime_trt.errors import InputError, require
from forcing_kv.runtime_trt.rollout.resolution import RESOLUTIONS
from forcing_kv.tools.bench.kernels.layer import LayerOptions

if TYPE_CHECKING:
    from forcing_kv.plugins.check.cases import OpCase
    from forcing_kv.plugins.compile.launch import Tactic


@dataclass(frozen=True)
class KernelRow:
    """One tactic of one operator on one device."""

    op: str
    tactic: str
    number: int
    """By which TensorRT knows the tactic."""
    device_sm: int
    target_sm: int
    """Device that the PTX was compiled for; an older one if the tactic is portable."""
    fits: bool
    """Whether its shared memory fits the device; if not, it is not offered there."""
    shared_bytes: int | None = None
    registers: int | None = None
    spilled_bytes: int | None = None
    ptx_bytes: int | None = None
    default: bool = False
    """Used where no measurement says otherwise."""
    torch_only: bool = False
    """For launches by PyTorch; not offered to TensorRT."""


@flags()
@dataclass(frozen=True, kw_only=True)
class ListOptions(LayerOptions):
    """Which kernels are listed."""

    resolution: LatentSize = RESOLUTIONS["480p"]
    """480p, 720p, 1080p, pixels: 832x480px, or latent rows x columns."""
    dtype: DType = "bfloat16"
    """What the kernels compute in."""
    sm: Ints = ()
    """Compute capability to compile for, such as 90; repeat it. Default: all."""
    multiprocessors: PositiveInt = 132
    """Streaming multiprocessors to schedule for."""
    as_json: Json = False
    """Print one JSON object."""


def list_plugins(*, options: ListOptions = ListOptions()) -> None:
    """List the custom operators: tactics, shared memory, registers and PTX size per device.

    Compiles every kernel for the model's sizes and has NVIDIA's assembler accept it; no GPU needed.
    """
    require("torch")
    require("triton")
    from forcing_kv.plugins.compile.launch import SHARED_LIMIT_BYTES

    devices = options.sm or list(SHARED_LIMIT_BYTES)
    unknown = sorted(set(devices) - set(SHARED_LIMIT_BYTES))
    if unknown:
        raise InputError(f"--sm {unknown}: there are kernels for {list(SHARED_LIMIT_BYTES)}")
    layer = options.layer(options.resolution)
    jobs = [
        (case, number, tactic, device)
        for case in layer.cases()
        for number, tactic in _tactics(case)
        for device in devices
    ]
    rows = [
        _row(case, number, tactic, device, options.dtype, options.multiprocessors)
        for case, number, tactic, device in track(jobs, "compiling kernels")
    ]
    if options.as_json:
        print_json(
            {"workload": layer.label, "dtype": options.dtype, "kernels": [*map(asdict, rows)]}
        )
        return
    _print_table(f"{layer.label}, {options.dtype}", rows)


def _tactics(case: OpCase) -> Iterator[tuple[int, Tactic]]:
    return enumerate(case.spec.module("kernel").TACTICS, 1)


def _row(
    case: OpCase, number: int, tactic: Tactic, device: int, dtype: str, num_sms: int
) -> KernelRow:
    from forcing_kv.plugins.compile.launch import Problem, SharedMemoryError, default_tactic
    from forcing_kv.plugins.compile.ptx import compile_kernel, tensor_dtypes
    from forcing_kv.plugins.compile.ptxas import assemble

    spec = case.spec
    shapes = [tensor.shape(case.sizes) for tensor in spec.inputs]
    problem = Problem(spec.read_sizes(shapes, case.attributes), case.attributes, dtype, num_sms)
    row: dict[str, Any] = {
        "op": spec.name,
        "tactic": tactic.name,
        "number": number,
        "device_sm": device,
        "target_sm": tactic.target_sm(device),
        "torch_only": tactic.torch_only,
        "default": tactic == default_tactic([tactic for _, tactic in _tactics(case)], device),
    }
    try:
        kernel = compile_kernel(spec, problem, tensor_dtypes(spec, dtype), tactic, device)
    except SharedMemoryError:
        return KernelRow(**row, fits=False)
    report = assemble(kernel)
    return KernelRow(
        **row,
        fits=True,
        shared_bytes=kernel.shared_bytes,
        registers=report.registers,
        spilled_bytes=report.spilled_bytes,
        ptx_bytes=len(kernel.ptx),
    )


def _print_table(title: str, rows: list[KernelRow]) -> None:
    from rich.table import Table

    out = screen()
    out.print(
        f"{title}; * default tactic, (PyTorch) no plugin; registers and spilled bytes of a thread"
    )
    columns = ("tactic", "device", "PTX for", "shared KiB", "registers", "spilled", "PTX KiB")
    for op in dict.fromkeys(row.op for row in rows):
        table = Table(*columns, title=op, title_justify="left", title_style="bold")
        for row in (row for row in rows if row.op == op):
            table.add_row(*_cells(row))
        out.print(table)


def _cells(row: KernelRow) -> tuple[str, ...]:
    mark = "*" if row.default else " (PyTorch)" if row.torch_only else ""
    name = f"{row.number} {row.tactic}{mark}"
    place = (name, f"sm_{row.device_sm}", f"sm_{row.target_sm}")
    if row.shared_bytes is None or row.ptx_bytes is None:
        return (*place, "does not fit", "", "", "")
    sizes = (f"{row.shared_bytes / 1024:.1f}", f"{row.ptx_bytes / 1024:.0f}")
    return (*place, sizes[0], str(row.registers), str(row.spilled_bytes), sizes[1])
