"""The gate at true shapes, which may not take longer than what is measured.

What is compared is the measured run itself, at the measured size: the x0 of every denoise step from
the same pools and the same noise, and the kept segments; of a clip the latents of every chunk.
A compressed subject is held against the research code's way in plain PyTorch, in the same dtype. A
plain port is held against another one (grouped heads, float32) at a small size, by the same case.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.runtime_trt.session import Session
from forcing_kv.tools.bench.measure.gate import (
    ERROR_RATIO,
    FLOAT32_BOUND,
    RolloutResult,
    Verdict,
    first_verdict,
    is_excused,
    score_error,
    worst_error,
)
from forcing_kv.tools.bench.subjects import SUBJECTS, LoadClock, Subject
from forcing_kv.tools.bench.true_shapes.cases import run_case
from forcing_kv.tools.bench.workloads import Case, Workload

REFERENCE = "eager-forcing-kv"
"""Subject that the compressed ones are compared with."""
_PORT = "eager-grouped"


@dataclass(frozen=True)
class ShapeVerdict:
    """Verdict of the gate."""

    passed: bool
    what: str
    """What was compared with what."""
    error: float
    """Largest relative error ||out - ref|| / ||ref|| of a step's x0, or of a chunk's latents."""
    bound: float
    kept: Verdict
    """Whether the kept segments are those of the reference."""


@dataclass(frozen=True)
class Tolerance:
    """What rounding may do in a dtype."""

    error: float
    scores: float
    """Largest difference between two scores that excuses an exchanged segment."""

    @classmethod
    def of(cls, case: Case, small: Workload) -> Tolerance:
        """1e-4 in float32; else twice what it does to the plain port at a small size."""
        if small.config.dtype == "float32":
            return cls(FLOAT32_BOUND, 0.0)
        exact, rounded = (_at_small_size(_PORT, case, small, d) for d in ("float32", None))
        error = worst_error(rounded.latents, exact.latents)
        return cls(ERROR_RATIO * error, 2 * ERROR_RATIO * score_error(rounded, exact))


def check_port(subject: Subject, case: Case, small: Workload) -> ShapeVerdict:
    """Compare a plain port with another one, in float32, at a small size."""
    exact = _at_small_size(_PORT, case, small, "float32")
    found = _at_small_size(subject.name, case, small)
    what = f"{_PORT} in float32, both at {small.size}; its own output at true shapes is finite"
    return _verdict(what, found, exact, Tolerance.of(case, small))


def check_against(
    found: RolloutResult, reference: RolloutResult, tolerance: Tolerance
) -> ShapeVerdict:
    """Compare the measured run of a subject with the same run of the reference."""
    what = f"{REFERENCE}, same dtype, same pools and noise, the measured run itself"
    return _verdict(what, found, reference, tolerance)


def require_finite(verdict: ShapeVerdict, found: RolloutResult) -> ShapeVerdict:
    """The verdict, unless what was measured holds NaN or infinities."""
    return verdict if np.isfinite(found.latents).all() else replace(verdict, passed=False)


def reference_run(path: Path, case: Case, work: Workload) -> RolloutResult:
    """The reference's run of a case: what its own item has kept, else made now and kept."""
    if not path.is_file():
        with _session(REFERENCE, work) as session:
            session.set_prompt(work.prompt())
            run_case(session, case).found.save(path)
    return RolloutResult.load(path)


def _at_small_size(
    name: str, case: Case, small: Workload, dtype: DType | None = None
) -> RolloutResult:
    work = small.as_dtype(dtype or small.config.dtype)
    with _session(name, work) as session:
        session.set_prompt(work.prompt())
        return run_case(session, case).found


def _session(name: str, work: Workload) -> AbstractContextManager[Session]:
    return SUBJECTS[name].open(work, "cpu", LoadClock())


def _verdict(
    what: str, found: RolloutResult, exact: RolloutResult, tolerance: Tolerance
) -> ShapeVerdict:
    kept = first_verdict(found, exact)
    if kept == "within rounding" and not is_excused(found, exact, tolerance.scores):
        kept = "different"
    error = worst_error(found.latents, exact.latents)
    passed = error <= tolerance.error and kept != "different"
    return ShapeVerdict(passed, what, error, tolerance.error, kept)
