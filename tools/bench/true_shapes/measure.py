"""One subject and one case at true shapes: gated, timed and put beside the core's own rate."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from forcing_kv.runtime_trt.session import Session
from forcing_kv.tools.bench.measure.device_counters import kv_nbytes, memory
from forcing_kv.tools.bench.measure.gate import RolloutResult
from forcing_kv.tools.bench.measure.subject import error_text
from forcing_kv.tools.bench.report.environment import describe_environment
from forcing_kv.tools.bench.report.rows import Row, describe_workload
from forcing_kv.tools.bench.subjects import LoadClock, Subject
from forcing_kv.tools.bench.true_shapes.cases import CaseTimes, run_case
from forcing_kv.tools.bench.true_shapes.core import (
    pin_to_one_core,
    product_gflops,
    require_dtype,
)
from forcing_kv.tools.bench.true_shapes.gate import (
    REFERENCE,
    ShapeVerdict,
    Tolerance,
    check_against,
    check_port,
    reference_run,
    require_finite,
)
from forcing_kv.tools.bench.true_shapes.opened import opened, place_of
from forcing_kv.tools.bench.workloads import Case, Workload, case_flop

_PORTS = ("eager-dense", REFERENCE)
"""Plain PyTorch: gated at a small size."""


@dataclass(frozen=True)
class CaseRequest:
    """One measurement to make."""

    subject: Subject
    case: Case
    work: Workload
    small: Workload
    """The same model at a size that takes no time, for the gate."""
    folder: Path
    """Where bundles and references are kept between rounds."""
    run: Mapping[str, object]
    """What the row says of its run."""
    commit: str | None = None


def measure_case(request: CaseRequest) -> Row:
    """Measure once; a row with a status other than `ok` where something fails."""
    environment = describe_environment("cpu", request.commit)
    environment |= {"threads": 1}
    run = {"summary": request.subject.summary, "case": request.case, **request.run}
    workload = describe_workload(request.work)
    blank = Row(request.case, request.subject.name, workload, environment, run=run)
    try:
        return _measure(request, blank)
    except Exception as error:
        return replace(blank, status="failed", error=error_text(error))


def _measure(request: CaseRequest, blank: Row) -> Row:
    work, subject, case = request.work, request.subject, request.case
    require_dtype(work.config.dtype)
    place = place_of(request.folder, work)
    kept = place / f"{case}.npz"
    check = _gate(request, kept)
    clock = LoadClock()
    with opened(subject, work, place, clock) as session:
        session.set_prompt(work.prompt())
        gc.collect()
        core = pin_to_one_core()
        rate = product_gflops(work.config.dtype)
        times = run_case(session, case)
        verdict = check(times.found)
        blank = replace(blank, gate=asdict(verdict), run={**blank.run, "core": core})
        if not verdict.passed:
            return replace(blank, status="gate_failed", error="the measured run is out of bounds")
        if subject.name == REFERENCE:
            times.found.save(kept)
        metrics = {
            **_times(times, work, case),
            **_bound(times, request, session, rate),
            "product_gflops_after": round(product_gflops(work.config.dtype), 2),
            "memory": memory("cpu"),
            **kv_nbytes(session),
            **{f"{part}_ms": round(value, 1) for part, value in clock.parts_ms.items()},
        }
    return replace(blank, metrics=metrics)


def _gate(request: CaseRequest, kept: Path) -> Callable[[RolloutResult], ShapeVerdict]:
    """The check of what will be measured; what it needs is made now, while memory is free."""
    case, small = request.case, request.small
    if request.subject.name in _PORTS:
        verdict = check_port(request.subject, case, small)
        return lambda found: require_finite(verdict, found)
    reference, tolerance = reference_run(kept, case, request.work), Tolerance.of(case, small)
    return lambda found: check_against(found, reference, tolerance)


def _times(times: CaseTimes, work: Workload, case: Case) -> dict[str, object]:
    """What the run took, and the denoise steps of it alone."""
    passes = times.pass_cpu_ms
    num_steps = work.config.schedule.num_steps
    # The clean pass comes after the steps of its chunk.
    steps = [
        ms
        for i, ms in enumerate(passes)
        if case == "steady-step" or i % (num_steps + 1) < num_steps
    ]
    return {
        "cpu_time_ms": round(times.cpu_ms, 1),
        "wall_ms": round(times.wall_ms, 1),
        "steps_cpu_ms": round(sum(steps), 1),
        "pass_cpu_ms": [round(ms, 1) for ms in passes],
    }


def _bound(
    times: CaseTimes, request: CaseRequest, session: Session, rate: float
) -> dict[str, object]:
    """The work that this subject does, at the rate of a large product on the same core."""
    outputs = session.backend.outputs_of("clean")
    cut = outputs is not None and "x0" not in outputs
    flop = case_flop(request.work.config, request.case, cut=cut)
    bound_ms = flop / rate / 1e6
    return {
        "tflop": round(flop / 1e12, 4),
        "clean_pass_cut": cut,
        "product_gflops": round(rate, 2),
        "gflops": round(flop / times.cpu_ms / 1e6, 2),
        "bound_ms": round(bound_ms, 1),
        "share_of_bound": round(bound_ms / times.cpu_ms, 4),
    }
