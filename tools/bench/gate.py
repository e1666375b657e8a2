"""The correctness gate in front of every number.

A subject's rollout is compared with the plain port in float32: its error may be at most twice that
of the plain port in the subject's own dtype, and it must keep the same segments wherever the
float32 scores differ by more than rounding. Where a subject rightly keeps others, both references
follow its choice, so that the comparison goes on.

At large sizes a float32 rollout takes minutes. There a subject can be compared with the plain port
in its own dtype instead, and the allowed error comes from a smaller size: it may be twice that of
the port against float32 there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.config import DType
from forcing_kv.runtime_trt.session import Session
from forcing_kv.tools.bench.workloads import Workload

GATE_SEED = 5
ERROR_RATIO = 2.0
"""Allowed error over the same-dtype plain port's."""
FLOAT32_BOUND = 1e-4
"""Allowed relative error in float32, where the plain port in the same dtype is the reference."""

Kept = dict[int, NDArray[np.int32]]
Verdict = Literal["equal", "within rounding", "different", "none"]


@dataclass(frozen=True)
class Rollout:
    """What a rollout made, chunk by chunk."""

    latents: NDArray[np.float32]
    """[chunks, F, C, h, w]."""
    scores: Mapping[int, NDArray[np.float32]]
    """By chunk that selected."""
    kept: Mapping[int, NDArray[np.int32]]


@dataclass(frozen=True)
class GateResult:
    """Verdict of the gate."""

    passed: bool
    num_chunks: int
    error: float
    """Largest relative error ||out - ref|| / ||ref|| of a chunk's latents."""
    eager_error: float
    """Same, of the plain port in the same dtype."""
    bound: float
    kept: Verdict
    """Whether the kept segments are those of the reference."""
    reference: Literal["float32", "same dtype"] = "float32"
    """What `error` is against."""


def roll_out(session: Session, prompt: NDArray[np.float32], num_chunks: int) -> Rollout:
    """Generate from the gate's seed; the session must be fresh or reset."""
    session.set_prompt(prompt)
    chunks = list(session.stream(num_chunks, seed=GATE_SEED))
    return Rollout(
        np.stack([chunk.latents for chunk in chunks]),
        {chunk.index: chunk.scores for chunk in chunks if chunk.scores is not None},
        {chunk.index: chunk.kept for chunk in chunks if chunk.kept is not None},
    )


@dataclass
class References:
    """Rollouts of the plain port, made once and kept on disk.

    Args:
        workload: model, size and policy; its dtype is the subjects'.
        device: where to run.
        num_chunks: length of the rollouts.
        folder: where finished rollouts are kept between processes.
        scale: references of a smaller size, whose error bounds this one's; given, the reference
            here is the plain port in the subjects' dtype and no float32 rollout is made.
    """

    workload: Workload
    device: str
    num_chunks: int
    folder: Path
    scale: References | None = None

    @property
    def dtype(self) -> DType:
        """The subjects' dtype."""
        return self.workload.config.dtype

    def prepare(self) -> None:
        """Make what every subject needs, so that its memory is free again when one is opened."""
        if self.scale is None:
            self.get("float32")
        else:
            self.scale.port_error()
            self.get(self.dtype)

    def port_error(self) -> float:
        """Error of the plain port in the subjects' dtype against float32, same segments kept."""
        exact = self.get("float32")
        return worst_error(self.get(self.dtype, dict(exact.kept) or None).latents, exact.latents)

    def get(self, dtype: DType, forced: Kept | None = None) -> Rollout:
        """The rollout in `dtype`, with `forced` segments in place of its own selection."""
        path = self.folder / f"{self._key(dtype, forced)}.npz"
        if not path.is_file():
            made = self._make(dtype, forced)
            path.parent.mkdir(parents=True, exist_ok=True)
            arrays: dict[str, Any] = {"latents": made.latents}
            arrays |= {f"scores.{i}": scores for i, scores in made.scores.items()}
            arrays |= {f"kept.{i}": kept for i, kept in made.kept.items()}
            partial = path.with_name(f".{path.name}")
            np.savez(partial, **arrays)
            partial.replace(path)
        with np.load(path) as data:
            return Rollout(data["latents"], _numbered(data, "scores"), _numbered(data, "kept"))

    def _key(self, dtype: DType, forced: Kept | None) -> str:
        work, config = self.workload, replace(self.workload.config, dtype=dtype)
        choice = None if forced is None else sorted((i, k.tolist()) for i, k in forced.items())
        parts = (work.model, config.to_json(), self.device, self.num_chunks, choice)
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        return f"{work.model}-{work.size}-{work.policy}-{dtype}-{digest}"

    def _make(self, dtype: DType, forced: Kept | None) -> Rollout:
        from forcing_kv.tools.bench.torch_backend import TorchBackend, TorchOptions

        work = self.workload.as_dtype(dtype)
        options = TorchOptions("dense" if work.policy == "dense" else "grouped")
        model = work.load(self.device)
        backend = TorchBackend(model, work.config, self.device, options, forced)
        del model
        with Session(backend) as session:
            return roll_out(session, work.prompt(), self.num_chunks)


def _numbered(data: Any, name: str) -> dict[int, Any]:
    return {int(key.partition(".")[2]): data[key] for key in data if key.startswith(f"{name}.")}


def check(found: Rollout, references: References) -> GateResult:
    """Compare a subject's rollout with the references."""
    if references.scale is not None:
        return _check_same_dtype(found, references, references.scale.port_error())
    dtype = references.dtype
    exact = references.get("float32")
    verdict: Verdict = "none"
    forced: Kept | None = None
    if found.kept:
        verdict = "equal" if _same(found.kept, exact.kept) else "within rounding"
        forced = dict(found.kept)
    if verdict == "within rounding":
        exact = references.get("float32", forced)
    # Same-dtype eager follows the subject's segments too: only arithmetic is compared.
    eager = exact if dtype == "float32" else references.get(dtype, forced)
    if verdict == "within rounding" and not _within_rounding(found.kept, exact, eager):
        verdict = "different"
    error, eager_error = (worst_error(made.latents, exact.latents) for made in (found, eager))
    bound = FLOAT32_BOUND if dtype == "float32" else ERROR_RATIO * eager_error
    passed = bool(np.isfinite(error)) and error <= bound and verdict != "different"
    return GateResult(passed, len(found.latents), error, eager_error, bound, verdict)


def _check_same_dtype(found: Rollout, references: References, port_error: float) -> GateResult:
    port = references.get(references.dtype)
    verdict: Verdict = "none"
    if found.kept:
        verdict = "equal" if _same(found.kept, port.kept) else "within rounding"
    if verdict == "within rounding":
        port = references.get(references.dtype, dict(found.kept))
        if not _within_rounding(found.kept, port, found):
            verdict = "different"
    error, bound = worst_error(found.latents, port.latents), ERROR_RATIO * port_error
    passed = bool(np.isfinite(error)) and error <= bound and verdict != "different"
    return GateResult(passed, len(found.latents), error, port_error, bound, verdict, "same dtype")


def _same(found: Mapping[int, Any], wanted: Mapping[int, Any]) -> bool:
    return found.keys() == wanted.keys() and all(
        np.array_equal(found[i], wanted[i]) for i in wanted
    )


def _within_rounding(
    found: Mapping[int, NDArray[np.int32]], exact: Rollout, eager: Rollout
) -> bool:
    """Whether every wrong choice is between scores that the dtype's rounding can swap."""
    if found.keys() != exact.scores.keys():
        return False
    for chunk, kept in found.items():
        scores = exact.scores[chunk].astype(np.float64).ravel()
        rounding = 2 * np.abs(eager.scores[chunk].astype(np.float64).ravel() - scores).max()
        chosen = np.zeros(scores.size, bool)
        chosen[kept] = True
        if scores[chosen].max() - scores[~chosen].min() > rounding:
            return False
    return True


def worst_error(found: Sequence[Any] | NDArray[Any], exact: NDArray[Any]) -> float:
    """Largest relative error of a chunk; infinite where something is not finite."""
    errors = []
    for made, wanted in zip(found, exact, strict=True):
        wanted64 = np.asarray(wanted, np.float64)
        errors.append(float(np.linalg.norm(made - wanted64) / np.linalg.norm(wanted64)))
    worst = max(errors)
    return worst if np.isfinite(worst) else float("inf")
