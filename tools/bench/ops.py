"""`fkv bench ops`: every operator's kernels on this GPU, beside baselines and the device's bounds.

An operator whose numbers are wrong is not timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forcing_kv.export.presets import PRESETS, load_preset
from forcing_kv.runtime_trt.console import ExitCode, print_json, talk, track
from forcing_kv.runtime_trt.errors import BackendUnavailableError, InputError, require
from forcing_kv.runtime_trt.resolution import RESOLUTIONS, parse_latent_size
from forcing_kv.tools.op_workload import Workload, workload_of

if TYPE_CHECKING:
    import torch

    from forcing_kv.plugins.cases import OpCase
    from forcing_kv.plugins.launch import Tactic
    from forcing_kv.plugins.tuning import TunedTactic
    from forcing_kv.tools.bench.gpu_timing import DeviceBounds
    from forcing_kv.tools.bench.rows import Row


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
    warmup: Annotated[int, typer.Option(help="Untimed calls before the timed ones.")] = 10,
    iterations: Annotated[int, typer.Option(help="Timed calls.")] = 100,
    out: Annotated[
        Path | None, typer.Option(help="File to append the rows to, as JSON lines.")
    ] = None,
    update_table: Annotated[
        bool, typer.Option("--update-table", help="Write the fastest tactics to the tuned table.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check and time the custom operators on this GPU, beside baselines and measured bounds.

    Exits with 1 if an operator is outside its tolerance; it is then not timed.
    """
    require("torch")
    if dtype not in ("float16", "bfloat16"):
        raise InputError(f"--dtype {dtype}: allowed are float16 and bfloat16")
    preset = load_preset(model)
    sizes = [parse_latent_size("--resolution", text) for text in resolution or ["480p"]]
    workloads = [workload_of(preset, size, dynamic_heads) for size in sizes]
    _require_gpu()
    from forcing_kv.tools.bench.rows import append_row

    bench = _Bench(dtype, warmup, iterations)
    rows = []
    for workload in workloads:
        for row in bench.rows(workload):
            rows.append(row)
            if out is not None:
                append_row(out, row)
    if update_table:
        from forcing_kv.plugins import tuning

        tuning.update_table(bench.tuned)
        talk(f"{len(bench.tuned)} entries written to {tuning.TABLE}")
    if as_json:
        print_json({"rows": [asdict(row) for row in rows]})
    else:
        _print_rows(rows)
    if any(row.status == "gate_failed" for row in rows):
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


class _Bench:
    """Checks and times one workload after the other."""

    def __init__(self, dtype: str, warmup: int, iterations: int) -> None:
        from forcing_kv.tools.bench.gpu_timing import measure_bounds
        from forcing_kv.tools.bench.rows import describe_environment

        self.tuned: list[TunedTactic] = []
        self._dtype = dtype
        self._run = {"warmup": warmup, "iterations": iterations}
        self._environment = describe_environment("cuda")
        self._bounds: DeviceBounds = measure_bounds(self._torch_dtype, **self._run)

    @property
    def _torch_dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self._dtype)
        return dtype

    def rows(self, workload: Workload) -> Iterator[Row]:
        """Rows of every operator's tactics and baselines, and of a chunk's whole eviction."""
        best: dict[str, Tactic] = {}
        cases = workload.cases()
        for case in track(cases, workload.label):
            inputs = case.build(self._torch_dtype, device="cuda")
            found = list(self._tactic_rows(workload, case, inputs))
            yield from (row for row, _ in found)
            timed = [(row.metrics["time_ms"]["median"], t) for row, t in found if row.metrics]
            if len(timed) == len(found):
                best[case.spec.name] = min(timed, key=lambda pair: pair[0])[1]
                self.tuned.append(self._tuned(case, {t.name: ms for ms, t in timed}))
                yield from self._baseline_rows(workload, case, inputs)
        evictions = [case for case in cases[2:] if case.spec.name in best]
        if len(evictions) == 2:
            yield self._eviction_row(workload, evictions, best)

    def _tuned(self, case: OpCase, times_ms: dict[str, float]) -> TunedTactic:
        import torch

        from forcing_kv.plugins.tuning import TunedTactic

        fastest = min(times_ms, key=times_ms.__getitem__)
        median_ms = times_ms.pop(fastest)
        shapes = [tensor.shape(case.sizes) for tensor in case.spec.inputs]
        return TunedTactic(
            op=case.spec.name,
            gpu=torch.cuda.get_device_name(),
            dtype=self._dtype,
            sizes=case.spec.read_sizes(shapes, case.attributes),
            tactic=fastest,
            median_ms=median_ms,
            others_ms=times_ms,
            date=datetime.now(UTC).date().isoformat(),
        )

    def _row(self, workload: Workload, op: str, implementation: str, **entries: Any) -> Row:
        from forcing_kv.tools.bench.rows import Row

        described = {
            "model": workload.label,
            "size": f"{workload.chunk.latent_height}x{workload.chunk.latent_width}",
            "policy": "forcing-kv",
            "dtype": self._dtype,
            "op": op,
            "history": workload.history(),
        }
        subject = f"{op}: {implementation}"
        return Row("ops", subject, described, self._environment, run=self._run, **entries)

    def _tactic_rows(
        self, workload: Workload, case: OpCase, inputs: list[torch.Tensor]
    ) -> Iterator[tuple[Row, Tactic]]:
        from forcing_kv.plugins.accuracy import output_errors
        from forcing_kv.plugins.registry import op_module
        from forcing_kv.plugins.triton_run import empty_outputs, multiprocessors, run_kernel
        from forcing_kv.tools.bench.gpu_timing import time_cold

        spec = case.spec
        for tactic in op_module(spec, "kernel").TACTICS:
            if not self._fits(case, inputs, tactic):
                continue
            outputs = empty_outputs(spec, inputs, case.attributes)
            for output in outputs:
                output.fill_(float("nan") if output.is_floating_point() else -1)
            call = partial(
                run_kernel, spec, inputs, case.attributes, outputs, tactic, multiprocessors(0)
            )
            call()
            errors = output_errors(spec, inputs, case.attributes, outputs)
            gate = {error.name: asdict(error) for error in errors}
            name = f"triton {tactic.name}"
            if all(error.passed for error in errors):
                metrics = self._metrics(case, time_cold(call, **self._run))
                yield self._row(workload, spec.name, name, gate=gate, metrics=metrics), tactic
            else:
                talk(f"{spec.name}, {tactic.name}: outside its tolerance, not timed")
                row = self._row(workload, spec.name, name, gate=gate, status="gate_failed")
                yield row, tactic

    def _fits(self, case: OpCase, inputs: list[torch.Tensor], tactic: Tactic) -> bool:
        import torch

        from forcing_kv.plugins.launch import SharedMemoryError
        from forcing_kv.plugins.ptx import compile_kernel, tensor_dtypes
        from forcing_kv.plugins.triton_run import multiprocessors, problem_of

        major, minor = torch.cuda.get_device_capability()
        problem = problem_of(case.spec, inputs, case.attributes, multiprocessors(0))
        dtypes = tensor_dtypes(case.spec, self._dtype)
        try:
            compile_kernel(case.spec, problem, dtypes, tactic, 10 * major + minor)
        except SharedMemoryError:
            return False
        return True

    def _baseline_rows(
        self, workload: Workload, case: OpCase, inputs: list[torch.Tensor]
    ) -> Iterator[Row]:
        from forcing_kv.tools.bench.gpu_timing import time_cold
        from forcing_kv.tools.bench.op_baselines import baseline_errors, baselines

        for baseline in baselines(case, inputs):
            row = partial(self._row, workload, case.spec.name, baseline.name)
            try:
                call = baseline.prepare()
                errors = baseline_errors(baseline, call())
                gate = {error.name: asdict(error) for error in errors}
                if not all(error.passed for error in errors):
                    reason = "outside the operator's tolerance, not timed"
                    yield row(status="failed", error=reason, gate=gate)
                    continue
                times = time_cold(call, **self._run)
            except RuntimeError as error:
                # PyTorch refuses a kernel that this device or build does not have.
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                yield row(status="failed", error=reason)
            else:
                yield row(gate=gate, metrics=self._metrics(case, times))

    def _eviction_row(
        self, workload: Workload, cases: list[OpCase], best: dict[str, Tactic]
    ) -> Row:
        """One similarity and an eviction for each compressed layer, as one graph."""
        from forcing_kv.plugins.triton_run import empty_outputs, multiprocessors, run_kernel
        from forcing_kv.tools.bench.gpu_timing import time_graph
        from forcing_kv.tools.bench.statistics import summary

        calls = []
        for case, count in zip(cases, (1, workload.num_compressed_layers), strict=True):
            for layer in range(count):
                inputs = case.build(self._torch_dtype, seed=layer, device="cuda")
                outputs = empty_outputs(case.spec, inputs, case.attributes)
                tactic = best[case.spec.name]
                calls.append((case.spec, inputs, case.attributes, outputs, tactic))

        def chunk() -> None:
            for call in calls:
                run_kernel(*call, multiprocessors(0))

        metrics = {"time_ms": summary(time_graph(chunk, **self._run))}
        name = f"triton, {len(calls)} launches in one graph"
        return self._row(workload, "eviction of a chunk", name, metrics=metrics)

    def _metrics(self, case: OpCase, times_ms: list[float]) -> dict[str, Any]:
        from forcing_kv.tools.bench.op_costs import flops, traffic_nbytes
        from forcing_kv.tools.bench.statistics import summary

        time_ms = summary(times_ms)
        gbs = traffic_nbytes(case, self._dtype) / time_ms["median"] / 1e6
        metrics: dict[str, Any] = {
            "time_ms": time_ms,
            "gbs": gbs,
            "device_copy_gbs": self._bounds.copy_gbs,
            "device_gemm_tflops": self._bounds.gemm_tflops,
        }
        if count := flops(case):
            tflops = count / time_ms["median"] / 1e9
            bound = {"tflops": tflops, "bound": "gemm"}
            return metrics | bound | {"fraction_of_bound": tflops / self._bounds.gemm_tflops}
        return metrics | {"bound": "copy", "fraction_of_bound": gbs / self._bounds.copy_gbs}


def _print_rows(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ("operator: implementation", "ms (p20-p80)", "TFLOP/s", "GB/s", "of bound", "correct")
    out = Console(highlight=False)
    for label in dict.fromkeys(row.workload["model"] for row in rows):
        table = Table(*columns, title=label, title_justify="left", title_style="bold")
        for row in (row for row in rows if row.workload["model"] == label):
            table.add_row(*_cells(row))
        out.print(table)


def _cells(row: Row) -> tuple[str, ...]:
    verdict = "" if row.gate is None else "yes" if row.status == "ok" else "NO"
    metrics = row.metrics
    if not metrics:
        return (row.subject, row.error or "not timed", "", "", "", verdict)
    time = metrics["time_ms"]
    times = f"{time['median']:.4f} ({time['p20']:.4f}-{time['p80']:.4f})"
    rates = (f"{metrics[key]:.0f}" if key in metrics else "" for key in ("tflops", "gbs"))
    share = f"{metrics['fraction_of_bound']:.0%} {metrics['bound']}" if "bound" in metrics else ""
    return (row.subject, times, *rates, share, verdict)
