"""A backend against eager PyTorch on a bundle's own weights: every graph output, and a rollout.

Two runs of the same chunks. In *lockstep* every pass of the backend gets the latents of the
reference, so that an error is seen where it arises: the report names the worst tensor and its
layer. A *free* rollout then shows how errors add up.

The reference is eager in float32. A 16-bit backend is allowed twice the error that eager of the
same dtype has, plus a little of the tensor's largest value. So is one with layers in FP8: their
reference has the rounded weights but does not round activations, where the last bit of a sum
decides between values 6% apart, so that no two correct backends agree. Errors are then root mean
squares, and a free rollout, whose videos drift apart, is judged by all of its chunks so far.

What is not finite, in a weight, in the reference or in the backend, fails and outranks every error:
of such tensors the first that is computed is the one to look at.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from forcing_kv.export.bundle.read import read_bundle_weights
from forcing_kv.export.checkpoint.finite import FiniteCheck
from forcing_kv.export.model.fp8_layers import dequantized
from forcing_kv.export.verify.eager import EagerBackend
from forcing_kv.runtime_trt.backends.base import (
    Backend,
    ChunkPositions,
    Float32,
    StepScalars,
)
from forcing_kv.runtime_trt.bundle.manifest import Manifest, read_manifest
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import HeadPartition
from forcing_kv.runtime_trt.rollout.noise import draw_noise
from forcing_kv.runtime_trt.rollout.ports import ports, split_name
from forcing_kv.runtime_trt.rollout.text_fold import MAX_PAD_ROWS
from forcing_kv.runtime_trt.rollout.timeline import ChunkPlan, Timeline
from forcing_kv.runtime_trt.session import Session

_Owner = TypeVar("_Owner", bound=Hashable)
_T = TypeVar("_T")

SLACK = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Allowed share of a tensor's largest value beside the yardstick: 2 roundings of the dtype, and for
float32 the tolerance of the golden cases."""

SLACK_FP8 = 2.0**-5
"""The same for FP8, as a share of the root mean square: half the largest rounding of E4M3."""

ROLLOUT_FACTOR = 2.0
"""Allowed multiple of the error of eager in the same dtype."""


@dataclass(frozen=True)
class TensorCheck:
    """One output of one graph, where it was worst."""

    graph: str
    tensor: str
    layer: int | None
    chunk: int
    step: int | None
    """Denoise step; n for the clean pass; None where the graph runs once."""
    error: float
    """Largest absolute difference from the float32 reference; for FP8 root mean square."""
    allowed: float
    num_non_finite: int = 0
    """NaN and infinite values, of the reference or of the backend, whichever has more."""

    @classmethod
    def of(
        cls,
        place: tuple[str, str, int, int | None],
        arrays: Sequence[NDArray[Any]],
        dtype: str,
        *,
        fp8: bool = False,
    ) -> TensorCheck:
        """Compare one output.

        Args:
            place: its graph, its name, the chunk, the step.
            arrays: of the reference, of eager in `dtype`, and of the backend.
        """
        graph, name, chunk, step = place
        reference, yardstick, found = (array.astype(np.float64) for array in arrays)
        with np.errstate(invalid="ignore"):
            allowed = allowed_error(reference, yardstick, dtype, fp8=fp8)
            error = error_of(found, reference, fp8=fp8)
        bad = max(int(np.count_nonzero(~np.isfinite(array))) for array in (reference, found))
        return cls(graph, name, split_name(name)[1], chunk, step, error, allowed, bad)

    @property
    def ratio(self) -> float:
        """Error as a share of what is allowed; infinite where something is not finite."""
        if self.num_non_finite:
            return np.inf
        return self.error / self.allowed if self.allowed else float(self.error > 0) * np.inf

    @property
    def passed(self) -> bool:
        """Within what is allowed, and finite."""
        return bool(self.ratio <= 1)

    @property
    def rank(self) -> tuple[float, ...]:
        """By which checks are sorted, worst first: what is not finite by when it is computed."""
        if not self.num_non_finite:
            return (1, -self.ratio)
        layer = np.inf if self.layer is None else self.layer
        return (0, self.chunk, _ORDER.get(self.graph, 0), self.step or 0, layer)

    def line(self) -> str:
        layer = "" if self.layer is None else f", layer {self.layer}"
        step = "" if self.step is None else f", step {self.step}"
        where = f"{self.graph}: {self.tensor}{layer} (chunk {self.chunk}{step})"
        if self.num_non_finite:
            return f"{where}: {self.num_non_finite} values are NaN or infinite"
        return f"{where}: error {self.error:.2e}, allowed {self.allowed:.2e}"


_ORDER = {"prompt": 0, "step": 1, "evict": 2}
"""Graphs of a chunk in the order in which they run."""


@dataclass
class BundleReport:
    """Verdict on one backend."""

    bundle: str
    backend: str
    dtype: str
    fp8: bool = False
    """Whether layers run in FP8."""
    tensors: list[TensorCheck] = field(default_factory=list)
    """Every output at its worst, the worst first."""
    rollout: list[TensorCheck] = field(default_factory=list)
    """Latents of every chunk of the free rollout."""
    kept_equal: bool = True
    """Whether every selection of the lockstep run equals that of eager in the same dtype."""
    bad_weights: dict[str, str] = field(default_factory=dict)
    """What is wrong with each of the bundle's weights that are not finite, by official name."""
    notes: list[str] = field(default_factory=list)

    @property
    def precision(self) -> str:
        return self.dtype + (" with FP8" if self.fp8 else "")

    @property
    def exact(self) -> bool:
        """Whether the backend should compute what the reference does: float32 and no FP8."""
        return self.dtype == "float32" and not self.fp8

    @property
    def passed(self) -> bool:
        """Everything within what is allowed; in plain float32 the same segments too."""
        checks = all(check.passed for check in (*self.tensors, *self.rollout))
        return checks and not self.bad_weights and (self.kept_equal or not self.exact)

    @property
    def worst(self) -> TensorCheck:
        """The output that is furthest from what is allowed."""
        return self.tensors[0]

    @property
    def verdict(self) -> str:
        """The worst of all, for people: a weight that is not finite before any output."""
        worst = f"worst tensor: {self.worst.line()}"
        if not self.bad_weights:
            return worst
        name = min(self.bad_weights, key=_natural)
        more = len(self.bad_weights) - 1
        others = f" (and {more} other weights)" if more else ""
        return f"weight {name} holds {self.bad_weights[name]}{others}; {worst}"

    def to_json(self) -> dict[str, Any]:
        return plain({"passed": self.passed, **asdict(self)})


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts names so that layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def plain(value: Any) -> Any:
    """What JSON can hold of a report: a number that is not finite is the word `infinite`."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return "infinite" if isinstance(value, float) and not np.isfinite(value) else value


def sorted_config(config: RolloutConfig) -> RolloutConfig:
    """The configuration of a model whose heads are in exported order already."""
    static = tuple(tuple(range(len(heads))) for heads in config.partition.static_heads)
    return replace(config, partition=HeadPartition(config.partition.num_heads, static))


def verify_bundle(
    bundle: Path,
    backend: Backend,
    manifest: Manifest | None = None,
    *,
    num_chunks: int | None = None,
    seed: int = 0,
) -> BundleReport:
    """Compare a backend with eager PyTorch.

    Args:
        backend: opened on it; not closed.
        manifest: the one that it was opened with; read if None.
        num_chunks: chunks of either run; None runs two past the first eviction.
        seed: key of prompt and noise.
    """
    manifest = manifest or read_manifest(bundle)
    config = sorted_config(manifest.config)
    num_chunks = num_chunks or config.policy.last_warmup_chunk + 4
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = read_bundle_weights(bundle, manifest).model
    report = BundleReport(str(bundle), backend.name, config.dtype, manifest.fp8 is not None)
    weights = FiniteCheck(str(bundle))
    weights.look_at(model)
    report.bad_weights = weights.faults
    float32 = replace(config, dtype="float32")
    reference = EagerBackend(dequantized(model).float(), float32, device)
    same_dtype = reference if report.exact else EagerBackend(model, config, device)
    prompt = _prompt(config, seed, backend.num_text_rows)
    backends = (reference, same_dtype, backend)
    report.tensors = _Lockstep(backends, report).run(prompt, num_chunks, seed)
    sessions = _once_each(backends, partial(Session, allow_non_finite=True))
    report.rollout = list(_rollout(sessions, report, prompt, num_chunks, seed))
    return report


def _prompt(config: RolloutConfig, seed: int, num_rows: int) -> Float32:
    """A random prompt of which a quarter is padding, or more where an engine takes fewer rows."""
    model = config.model
    num_text = model.text_len - model.text_len // 4
    if num_rows < model.text_len:
        num_text = max(0, min(num_text, num_rows - MAX_PAD_ROWS))
    prompt = draw_noise(seed, 0, 0, (model.text_len, model.text_dim))
    prompt[num_text:] = 0
    return prompt


def _once_each(owners: Sequence[_Owner], work: Callable[[_Owner], _T]) -> list[_T]:
    """What `work` makes of each owner; one that is there twice works once."""
    made = {owner: work(owner) for owner in dict.fromkeys(owners)}
    return [made[owner] for owner in owners]


class _Lockstep:
    """Runs every pass on all backends with the reference's latents.

    Args:
        backends: the reference, eager of the same dtype (maybe the same), and the one to check.
    """

    def __init__(self, backends: tuple[Backend, Backend, Backend], report: BundleReport) -> None:
        self._backends, self._report = backends, report
        self._reference, _, self._backend = backends
        self._ports = ports(self._backend.config)
        self._worst: dict[tuple[str, str], TensorCheck] = {}

    def run(self, prompt: Float32, num_chunks: int, seed: int) -> list[TensorCheck]:
        """Roll out, comparing every output of every graph; the worst of each, worst first."""
        config = self._backend.config
        _once_each(self._backends, methodcaller("set_prompt", prompt))
        self._compare("prompt", 0, None)
        timeline = Timeline(config.policy, config.chunk.num_frames)
        for _ in range(num_chunks):
            plan = timeline.advance()
            self._chunk(plan, seed)
            if plan.evict and not self._evict(plan):
                break
            _once_each(self._backends, methodcaller("commit", plan))
        return sorted(self._worst.values(), key=lambda check: check.rank)

    def _chunk(self, plan: ChunkPlan, seed: int) -> None:
        config = self._backend.config
        positions = ChunkPositions.of(plan, config)
        x: Float32 = draw_noise(seed, plan.index, 0, config.latent_shape)
        num_steps = config.schedule.num_steps
        for i, scalars in enumerate(self._reference.step_scalars):
            last = i + 1 == num_steps
            eps = None if last else draw_noise(seed, plan.index, i + 1, config.latent_shape)
            x0, x_next = self._step(x, eps, scalars, positions)
            x = x0 if last else x_next
        self._step(x, None, self._reference.clean_scalars, positions)

    def _step(
        self, x: Float32, eps: Float32 | None, scalars: StepScalars, positions: ChunkPositions
    ) -> tuple[Float32, Float32]:
        """One pass everywhere; returns the reference's x0 and x_next."""

        def run(backend: Backend) -> tuple[Float32, Float32]:
            x0, x_next = backend.run_step(x, eps, scalars, positions)
            return backend.to_host(x0), backend.to_host(x_next)

        made = _once_each(self._backends, run)
        chunk, step = positions.plan.index, scalars.index
        clean = step == self._backend.config.schedule.num_steps
        if not clean:
            for name, arrays in zip(("x0", "x_next"), zip(*made, strict=True), strict=True):
                self._note("step", name, chunk, step, arrays)
        self._compare("step", chunk, step, "clean" if clean else "step")
        return made[0]

    def _evict(self, plan: ChunkPlan) -> bool:
        """Score and select everywhere; False where the caches would now differ."""
        selections = [kept for _, kept in _once_each(self._backends, methodcaller("run_evict"))]
        if np.array_equal(selections[1], selections[2]):
            if np.array_equal(selections[0], selections[1]):
                self._compare("evict", plan.index, None)
                return True
            self._report.notes.append(
                f"chunk {plan.index}: {self._report.precision} selects other segments than "
                "float32, in eager too; the lockstep run ends here"
            )
            return False
        self._report.kept_equal = False
        self._report.notes.append(
            f"chunk {plan.index}: kept segments {selections[2].tolist()}, eager "
            f"{selections[1].tolist()}; the lockstep run ends here"
        )
        return False

    def _compare(self, graph: str, chunk: int, step: int | None, ran: str | None = None) -> None:
        """Compare every output that a graph leaves in its buffers.

        Args:
            step: denoise step, n for the clean pass.
            ran: which of an engine's graphs ran in its place; one may return less.
        """
        left = self._backend.outputs_of(ran or graph)
        for port in self._ports[graph].outputs:
            if port.name in ("x0", "x_next", "kept"):
                continue
            if left is not None and port.name not in left:
                continue
            arrays = [backend.read_tensor(port.name) for backend in self._backends]
            if graph == "prompt":
                # An engine that folds the padding of prompts leaves out its last rows.
                num_rows = arrays[-1].shape[1]
                arrays = [array[:, :num_rows] for array in arrays]
            self._note(graph, port.name, chunk, step, arrays)

    def _note(
        self, graph: str, name: str, chunk: int, step: int | None, arrays: Sequence[NDArray[Any]]
    ) -> None:
        report, place = self._report, (graph, name, chunk, step)
        check = TensorCheck.of(place, arrays, report.dtype, fp8=report.fp8)
        before = self._worst.get((graph, name))
        if before is None or check.rank < before.rank:
            self._worst[graph, name] = check


def allowed_error(
    reference: NDArray[Any], yardstick: NDArray[Any], dtype: str, *, fp8: bool = False
) -> float:
    """What a backend may differ from float32, given what eager in `dtype` does."""
    slack = SLACK_FP8 if fp8 else SLACK[dtype]
    size = error_of(reference, np.zeros_like(reference), fp8=fp8)
    return ROLLOUT_FACTOR * error_of(yardstick, reference, fp8=fp8) + slack * max(size, 1e-3)


def error_of(found: NDArray[Any], wanted: NDArray[Any], *, fp8: bool = False) -> float:
    """Largest absolute difference, for FP8 its root mean square; infinite where not finite."""
    difference = np.abs(found - wanted)
    error = float(np.sqrt(np.mean(difference**2)) if fp8 else difference.max(initial=0.0))
    return error if np.isfinite(error) else float("inf")


def _rollout(
    sessions: list[Session], report: BundleReport, prompt: Float32, num_chunks: int, seed: int
) -> Iterator[TensorCheck]:
    """Latents of every chunk, each backend on its own."""

    def begin(session: Session) -> None:
        session.reset()
        session.set_prompt(prompt)

    def latents(session: Session) -> NDArray[Any]:
        return session.generate_chunk(seed=seed).latents.astype(np.float64)

    _once_each(sessions, begin)
    made: list[list[NDArray[Any]]] = []
    for chunk in range(num_chunks):
        made.append(_once_each(sessions, latents))
        judged = made if report.fp8 else made[-1:]
        arrays = [np.stack(each) for each in zip(*judged, strict=True)]
        place = ("rollout", "latents", chunk, None)
        yield TensorCheck.of(place, arrays, report.dtype, fp8=report.fp8)
