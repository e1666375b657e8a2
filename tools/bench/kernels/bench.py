"""Checks and times the custom operators on a GPU, beside baselines and the device's bounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch

from forcing_kv.plugins.bind.triton_run import (
    compile_together,
    empty_outputs,
    multiprocessors,
    run_kernel,
)
from forcing_kv.plugins.check.accuracy import output_errors
from forcing_kv.plugins.check.cases import OpCase
from forcing_kv.plugins.compile.launch import Tactic
from forcing_kv.plugins.compile.tuning import TunedTactic
from forcing_kv.plugins.op_spec import OpSpec
from forcing_kv.plugins.registry import HEAD_INDEXED_ATTENTION, STEADY_ATTENTION
from forcing_kv.runtime_trt.console import talk, track
from forcing_kv.tools.bench.kernels.baselines import (
    STEADY,
    Baseline,
    baseline_errors,
    baselines,
)
from forcing_kv.tools.bench.kernels.checks import device_tactics, poison
from forcing_kv.tools.bench.kernels.costs import flops, traffic_nbytes
from forcing_kv.tools.bench.kernels.layer import CompressedLayer
from forcing_kv.tools.bench.kernels.timing import (
    DeviceBounds,
    measure_bounds,
    time_cold,
    time_graph,
)
from forcing_kv.tools.bench.measure.summary import summary
from forcing_kv.tools.bench.report.environment import describe_environment
from forcing_kv.tools.bench.report.rows import Row


class OpBench:
    """Checks and times one compressed layer after the other.

    Args:
        dtype: compute dtype, float16 or bfloat16.
        warmup: untimed calls before the timed ones.
        iterations: timed calls.
        commit: commit to record, where there is no git checkout.
    """

    def __init__(
        self, dtype: str, warmup: int = 10, iterations: int = 100, commit: str | None = None
    ) -> None:
        self.tuned: list[TunedTactic] = []
        """The fastest tactic of everything measured so far."""
        self._dtype = dtype
        self._run = {"warmup": warmup, "iterations": iterations}
        self._environment = describe_environment("cuda", commit)
        self._bounds: DeviceBounds = measure_bounds(self._torch_dtype, **self._run)

    @property
    def _torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self._dtype)
        return dtype

    def rows(self, layer: CompressedLayer) -> Iterator[Row]:
        """Rows of every operator's tactics and baselines, and of a chunk's whole eviction."""
        best: dict[str, Tactic] = {}
        cases = layer.cases()
        for case in track(cases, layer.label):
            inputs = case.build(self._torch_dtype, device="cuda")
            found = list(self._tactic_rows(layer, case, inputs))
            yield from (row for row, _ in found)
            timed = [(row.metrics["time_ms"]["median"], t) for row, t in found if row.metrics]
            if timed:
                best[case.spec.name] = min(timed, key=lambda pair: pair[0])[1]
                self.tuned.append(self._tuned(case, {t.name: ms for ms, t in timed}))
                steady = {"triton": self.tuned[-1].median_ms}
                for baseline in baselines(case, inputs):
                    row = self._baseline_row(layer, case, baseline)
                    if baseline.name.startswith(STEADY) and row.metrics:
                        kernel = baseline.name.removeprefix(STEADY)
                        steady[kernel] = row.metrics["time_ms"]["median"]
                    yield row
                if case.spec is HEAD_INDEXED_ATTENTION:
                    self.tuned.append(self._tuned(case, steady, STEADY_ATTENTION))
        evictions = [case for case in cases[2:] if case.spec.name in best]
        if len(evictions) == 2:
            yield self._eviction_row(layer, evictions, best)

    def _tuned(
        self, case: OpCase, times_ms: dict[str, float], spec: OpSpec | None = None
    ) -> TunedTactic:
        """The entry of what was timed; `spec` is the operator if not the case's own."""
        fastest = min(times_ms, key=times_ms.__getitem__)
        median_ms = times_ms.pop(fastest)
        shapes = [tensor.shape(case.sizes) for tensor in case.spec.inputs]
        return TunedTactic(
            op=(spec or case.spec).name,
            gpu=torch.cuda.get_device_name(),
            dtype=self._dtype,
            sizes=case.spec.read_sizes(shapes, case.attributes),
            tactic=fastest,
            median_ms=median_ms,
            others_ms=times_ms,
            date=datetime.now(UTC).date().isoformat(),
        )

    def _row(self, layer: CompressedLayer, op: str, implementation: str, **entries: Any) -> Row:
        described = {
            "model": layer.label,
            "size": f"{layer.chunk.latent_height}x{layer.chunk.latent_width}",
            "policy": "forcing-kv",
            "dtype": self._dtype,
            "op": op,
            "history": layer.history(),
        }
        subject = f"{op}: {implementation}"
        return Row("ops", subject, described, self._environment, run=self._run, **entries)

    def _tactic_rows(
        self, layer: CompressedLayer, case: OpCase, inputs: list[torch.Tensor]
    ) -> Iterator[tuple[Row, Tactic]]:
        from triton.errors import TritonError
        from triton.runtime.errors import OutOfResources

        spec = case.spec
        _, tactics = device_tactics(spec)
        outputs = empty_outputs(spec, inputs, case.attributes)
        calls = [
            (spec, inputs, case.attributes, outputs, tactic, multiprocessors(0))
            for tactic in tactics
        ]
        compile_together(calls)
        for tactic, arguments in zip(tactics, calls, strict=True):
            name = f"triton {tactic.name}"
            poison(outputs)
            call = partial(run_kernel, *arguments)
            try:
                call()
                torch.cuda.synchronize()
            except OutOfResources:  # More shared memory than a thread block gets here.
                continue
            except (RuntimeError, TritonError) as error:
                reason = f"does not run: {error}"
                yield self._row(layer, spec.name, name, status="failed", error=reason), tactic
                continue
            errors = output_errors(spec, inputs, case.attributes, outputs)
            gate = {error.name: asdict(error) for error in errors}
            if all(error.passed for error in errors):
                metrics = self._metrics(case, time_cold(call, **self._run))
                yield self._row(layer, spec.name, name, gate=gate, metrics=metrics), tactic
            else:
                talk(f"{spec.name}, {tactic.name}: outside its tolerance, not timed")
                row = self._row(layer, spec.name, name, gate=gate, status="gate_failed")
                yield row, tactic

    def _baseline_row(self, layer: CompressedLayer, case: OpCase, baseline: Baseline) -> Row:
        row = partial(self._row, layer, case.spec.name, baseline.name)
        try:
            call = baseline.prepare()
            errors = baseline_errors(baseline, call())
            gate = {error.name: asdict(error) for error in errors}
            if not all(error.passed for error in errors):
                reason = "outside the operator's tolerance, not timed"
                return row(status="failed", error=reason, gate=gate)
            times = time_cold(call, **self._run)
        except Exception as error:
            # PyTorch refuses a kernel that this device or build does not have, or its compiler
            # fails: that costs this row alone.
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            return row(status="failed", error=reason)
        return row(gate=gate, metrics=self._metrics(case, times))

    def _eviction_row(
        self, layer: CompressedLayer, cases: list[OpCase], best: dict[str, Tactic]
    ) -> Row:
        """One similarity and an eviction for each compressed layer, as one graph."""
        calls = []
        for case, count in zip(cases, (1, layer.num_compressed_layers), strict=True):
            first = case.build(self._torch_dtype, device="cuda")
            for _ in range(count):
                # Memory of its own; drawing other values on the host would take longest of all.
                inputs = [tensor.clone() for tensor in first]
                outputs = empty_outputs(case.spec, inputs, case.attributes)
                tactic = best[case.spec.name]
                calls.append((case.spec, inputs, case.attributes, outputs, tactic))

        def chunk() -> None:
            for call in calls:
                run_kernel(*call, multiprocessors(0))

        metrics = {"time_ms": summary(time_graph(chunk, **self._run))}
        name = f"triton, {len(calls)} launches in one graph"
        return self._row(layer, "eviction of a chunk", name, metrics=metrics)

    def _metrics(self, case: OpCase, times_ms: list[float]) -> dict[str, Any]:
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
