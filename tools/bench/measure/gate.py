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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.backends.stream import Chunk
from forcing_kv.runtime_trt.bundle.arrays import read_arrays
from forcing_kv.runtime_trt.bundle.atomic.files import replaced_file
from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.ports import port_name, split_name
from forcing_kv.runtime_trt.session import Session
from forcing_kv.tools.bench.workloads import Workload

GATE_SEED = 5
ERROR_RATIO = 2.0
"""Allowed error over the same-dtype plain port's."""
_REMEDY = "delete it, and it is made again"
FLOAT32_BOUND = 1e-4
"""Allowed relative error in float32, where the plain port in the same dtype is the reference."""

Kept = dict[int, NDArray[np.int32]]
Verdict = Literal["equal", "within rounding", "different", "none"]


@dataclass(frozen=True)
class RolloutResult:
    """What a rollout made, chunk by chunk."""

    latents: NDArray[np.float32]
    """[chunks, F, C, h, w]."""
    scores: Mapping[int, NDArray[np.float32]]
    """By chunk that selected."""
    kept: Mapping[int, NDArray[np.int32]]

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> RolloutResult:
        """From the chunks themselves."""
        made = list(chunks)
        return cls(
            np.stack([chunk.latents for chunk in made]),
            {chunk.index: chunk.scores for chunk in made if chunk.scores is not None},
            {chunk.index: chunk.kept for chunk in made if chunk.kept is not None},
        )

    def save(self, path: Path) -> None:
        """Write it whole or not at all; missing folders are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {"latents": self.latents}
        arrays |= {port_name("scores", i): scores for i, scores in self.scores.items()}
        arrays |= {port_name("kept", i): kept for i, kept in self.kept.items()}
        with replaced_file(path) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> RolloutResult:
        """Read what `save` wrote.

        Raises:
            InputError: it is something else.
        """
        data = read_arrays(path, "reference rollout", _REMEDY)
        if "latents" not in data:
            raise InputError(f"{path}: holds {list(data)} and no latents; {_REMEDY}")
        return cls(data["latents"], _numbered(data, "scores"), _numbered(data, "kept"))


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


def roll_out(session: Session, prompt: NDArray[np.float32], num_chunks: int) -> RolloutResult:
    """Generate from the gate's seed; the session must be fresh or reset."""
    session.set_prompt(prompt)
    return RolloutResult.of(session.stream(num_chunks, seed=GATE_SEED))


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
            self.scale.port_errors()
            self.get(self.dtype)

    def port_errors(self) -> tuple[float, float]:
        """Errors of the plain port in the subjects' dtype against float32, same segments kept.

        Returns:
            That of the latents, relative, and that of the scores.
        """
        exact = self.get("float32")
        port = self.get(self.dtype, dict(exact.kept) or None)
        return self.error(port, exact), score_error(port, exact)

    def error(self, found: RolloutResult, exact: RolloutResult) -> float:
        """Relative error of the latents: of the worst chunk, in FP8 of all together.

        The last bit of a sum decides between values of E4M3 that are 6% apart, so that the chunks
        of two correct rollouts drift apart by more or less.
        """
        if self.workload.fp8:
            return worst_error(found.latents[None], exact.latents[None])
        return worst_error(found.latents, exact.latents)

    def get(self, dtype: DType, forced: Kept | None = None) -> RolloutResult:
        """The rollout in `dtype`, with `forced` segments in place of its own selection."""
        path = self.folder / f"{self._key(dtype, forced)}.npz"
        if not path.is_file():
            self._make(dtype, forced).save(path)
        return RolloutResult.load(path)

    def _key(self, dtype: DType, forced: Kept | None) -> str:
        work, config = self.workload, replace(self.workload.config, dtype=dtype)
        choice = None if forced is None else sorted((i, k.tolist()) for i, k in forced.items())
        parts = (work.model, config.to_json(), work.fp8, self.device, self.num_chunks, choice)
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        return f"{work.model}-{work.size}-{work.policy}-{dtype}-{digest}"

    def _make(self, dtype: DType, forced: Kept | None) -> RolloutResult:
        from forcing_kv.export.model.fp8_layers import dequantized
        from forcing_kv.tools.bench.pytorch.backend import TorchBackend
        from forcing_kv.tools.bench.pytorch.options import TorchOptions

        work = self.workload.as_dtype(dtype)
        options = TorchOptions("dense" if work.policy == "dense" else "grouped")
        model = work.load(self.device)
        if dtype == "float32":
            # The truth for FP8 too, which rounds the same weights and activations besides.
            model = dequantized(model)
        backend = TorchBackend(model, work.config, self.device, options, forced)
        del model
        with Session(backend) as session:
            return roll_out(session, work.prompt(), self.num_chunks)


def _numbered(data: Any, name: str) -> dict[int, Any]:
    keys = {key: split_name(key) for key in data}
    return {i: data[key] for key, (stem, i) in keys.items() if stem == name and i is not None}


def check(found: RolloutResult, references: References) -> GateResult:
    """Compare a subject's rollout with the references."""
    if references.scale is not None:
        return _check_same_dtype(found, references, references.scale.port_errors())
    dtype = references.dtype
    exact = references.get("float32")
    verdict = first_verdict(found, exact)
    # What selected in other chunks follows no choice of it: the comparison goes its own way.
    forced = dict(found.kept) if verdict in ("equal", "within rounding") else None
    if verdict == "within rounding":
        exact = references.get("float32", forced)
    # Same-dtype eager follows the subject's segments too: only arithmetic is compared.
    eager = exact if dtype == "float32" else references.get(dtype, forced)
    if verdict == "within rounding" and not is_excused(found, exact, 2 * score_error(eager, exact)):
        verdict = "different"
    error, eager_error = (references.error(made, exact) for made in (found, eager))
    bound = FLOAT32_BOUND if dtype == "float32" else ERROR_RATIO * eager_error
    passed = bool(np.isfinite(error)) and error <= bound and verdict != "different"
    return GateResult(passed, len(found.latents), error, eager_error, bound, verdict)


def _check_same_dtype(
    found: RolloutResult, references: References, port_errors: tuple[float, float]
) -> GateResult:
    port_error, rounding = port_errors
    port = references.get(references.dtype)
    verdict = first_verdict(found, port)
    if verdict == "within rounding":
        port = references.get(references.dtype, dict(found.kept))
        # Both are off by the dtype's rounding here.
        if not is_excused(found, port, 4 * rounding):
            verdict = "different"
    error, bound = references.error(found, port), ERROR_RATIO * port_error
    passed = bool(np.isfinite(error)) and error <= bound and verdict != "different"
    return GateResult(passed, len(found.latents), error, port_error, bound, verdict, "same dtype")


def first_verdict(found: RolloutResult, reference: RolloutResult) -> Verdict:
    """Before scores are looked at: other segments may be an affair of rounding."""
    if found.kept.keys() != reference.kept.keys():
        return "different"
    if not found.kept:
        return "none"
    same = all(np.array_equal(found.kept[i], reference.kept[i]) for i in found.kept)
    return "equal" if same else "within rounding"


def is_excused(found: RolloutResult, reference: RolloutResult, margin: float) -> bool:
    """Whether every wrong choice is between scores of the reference that differ by no more."""
    for chunk, kept in found.kept.items():
        scores = reference.scores[chunk].astype(np.float64).ravel()
        chosen = np.zeros(scores.size, bool)
        chosen[kept] = True
        if scores[chosen].max() - scores[~chosen].min() > margin:
            return False
    return True


def score_error(found: RolloutResult, exact: RolloutResult) -> float:
    """Largest difference of a score; 0 where nothing is scored."""
    pairs = ((found.scores[i], exact.scores[i]) for i in exact.scores)
    return max((float(np.abs(a.astype(np.float64) - b).max()) for a, b in pairs), default=0.0)


def worst_error(found: Sequence[Any] | NDArray[Any], exact: NDArray[Any]) -> float:
    """Largest relative error of a chunk; infinite where something is not finite."""
    errors = []
    for made, wanted in zip(found, exact, strict=True):
        wanted64 = np.asarray(wanted, np.float64)
        errors.append(float(np.linalg.norm(made - wanted64) / np.linalg.norm(wanted64)))
    worst = max(errors)
    return worst if np.isfinite(worst) else float("inf")
