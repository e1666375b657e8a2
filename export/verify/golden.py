"""Rollouts of any backend against golden cases from the official code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from forcing_kv.export.bundle.write import BundleLabels, export_bundle
from forcing_kv.export.verify.bundle import plain
from forcing_kv.export.verify.eager import eager_session
from forcing_kv.export.verify.golden_case import GoldenCase
from forcing_kv.runtime_trt.backends.stream import Chunk
from forcing_kv.runtime_trt.bundle.atomic.files import scratch_folder
from forcing_kv.runtime_trt.open import choose_backend
from forcing_kv.runtime_trt.rollout.policy import HeadKind
from forcing_kv.runtime_trt.rollout.schedule import Schedule
from forcing_kv.runtime_trt.session import Session

LATENT_ATOL = 1e-4
"""Float32 implementations differ by <= 1.6e-6; one wrong segment moves latents by >= 1.6e-2."""


_CACHE_KEY = re.compile(
    r"cache/c(?P<chunk>\d{1,9})/L(?P<layer>\d{1,9})"
    r"/(?P<kind>static|dynamic)_(?P<part>sink|local|seg)_(?P<which>[kv])"
)
"""Cached tensors of heads that are grouped by kind; those of dense attention are not compared."""


@dataclass(frozen=True)
class ChunkCheck:
    """One chunk of a golden case."""

    chunk: int
    latent_error: float
    """Largest absolute difference of the output latents."""
    x0_error: float | None
    """Same, over the intermediate x0, where the case records them."""
    cache_error: float | None
    """Same, over the cached K and V after the chunk, where the case records them."""
    kept_equal: bool | None
    """Whether the kept segments are exactly the golden ones; None where none are selected."""

    @property
    def worst(self) -> float:
        """Largest error of any kind."""
        errors = (self.latent_error, self.x0_error, self.cache_error)
        return max(error for error in errors if error is not None)

    @property
    def passed(self) -> bool:
        return self.worst <= LATENT_ATOL and self.kept_equal is not False

    def line(self) -> str:
        parts = [f"latents {self.latent_error:.2e}"]
        if self.x0_error is not None:
            parts.append(f"x0 {self.x0_error:.2e}")
        if self.cache_error is not None:
            parts.append(f"cache {self.cache_error:.2e}")
        if self.kept_equal is not None:
            parts.append("segments equal" if self.kept_equal else "segments DIFFER")
        return f"chunk {self.chunk}: {', '.join(parts)} -> {'ok' if self.passed else 'FAIL'}"


@dataclass
class GoldenReport:
    """Verdict on one case."""

    case: str
    backend: str
    schedule_error: float
    """Largest difference of timesteps (in units of t / 1000) and sigmas."""
    chunks: list[ChunkCheck] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Every chunk and the schedule within tolerance."""
        return self.schedule_error <= 1e-6 and all(check.passed for check in self.chunks)

    def to_json(self) -> dict[str, Any]:
        """Plain data; an infinite error (another shape, or NaN) is the word `infinite`."""
        return plain({**asdict(self), "tolerance": LATENT_ATOL, "passed": self.passed})


@contextmanager
def golden_session(
    case: GoldenCase, backend: str, checkpoint: Path | None = None
) -> Iterator[Session]:
    """A session on `case`'s model and settings; engines are exported to a temporary bundle.

    Args:
        backend: `eager`, `inductor` (compiled here, without a bundle), or one of the runtime.
        checkpoint: weights to use instead of the case's own.
    """
    model, config = case.load_model(checkpoint), case.config
    if backend == "eager":
        with eager_session(model, config) as session:
            yield session
        return
    if backend == "inductor":
        from forcing_kv.export.inductor.compile import InductorOptions
        from forcing_kv.export.inductor.session import inductor_session

        options = InductorOptions("cuda" if torch.cuda.is_available() else "cpu")
        with inductor_session(model, config, options) as session:
            yield session
        return
    choose_backend(backend)
    with scratch_folder() as folder:
        bundle = folder / "bundle"
        export_bundle(model, config, bundle, BundleLabels(case.path.name), consume=True)
        if backend in ("tensorrt", "tensorrt-rtx"):
            from forcing_kv.export.tensorrt.build import run_build
            from forcing_kv.export.tensorrt.options import EngineOptions
            from forcing_kv.export.tensorrt.plan import plan_build, target_device

            engine = EngineOptions(cast(Any, backend))
            run_build(plan_build(bundle, engine, device=target_device(engine)))
        with Session.open(bundle, backend) as session:
            yield session


def verify_golden(case: GoldenCase, session: Session) -> Iterator[ChunkCheck]:
    """Roll a case out on `session`, yielding the check of each chunk."""
    # What is not finite is an infinite error, and no reason to stop.
    session.allow_non_finite = True
    inputs = case.inputs
    prompts, frames = inputs["prompt_embeds"], session.config.chunk.num_frames
    draws = session.config.schedule.num_steps - 1
    switches = sorted(case.settings.switch_frame_indices)
    session.set_prompt(prompts[0])
    num_prompt = 0
    for chunk in range(case.num_chunks):
        first = chunk * frames
        if num_prompt < len(switches) and first >= switches[num_prompt]:
            num_prompt += 1
            session.switch_prompt(prompts[num_prompt])
        noise = inputs["noise"][0, first : first + frames]
        made = session.generate_chunk(noise, inputs["renoise"][chunk, :draws], keep_x0=True)
        yield _check_chunk(case, session, made)


def _check_chunk(case: GoldenCase, session: Session, made: Chunk) -> ChunkCheck:
    golden, frames = case.golden, session.config.chunk.num_frames
    first = made.index * frames
    latent_error = _error(made.latents, golden["latents"][first : first + frames])
    x0_error = None
    if "x0_intermediate" in golden and made.x0_steps is not None:
        wanted = golden["x0_intermediate"][made.index]
        pairs = zip(made.x0_steps, wanted, strict=False)  # The last step's is the latents.
        x0_error = max((_error(*pair) for pair in pairs), default=0.0)
    kept_equal = None
    wanted_kept = golden.get(f"kept/c{made.index}")
    if wanted_kept is not None or made.kept is not None:
        kept_equal = (
            wanted_kept is not None
            and made.kept is not None
            and np.array_equal(made.kept, wanted_kept)
        )
    cache_error = _cache_error(case, session, made.index)
    return ChunkCheck(made.index, latent_error, x0_error, cache_error, kept_equal)


def _cache_error(case: GoldenCase, session: Session, chunk: int) -> float | None:
    """Compare the pools with every grouped cache tensor recorded after `chunk`."""
    policy, tokens = session.config.policy, session.config.chunk.tokens_per_frame
    sink = policy.num_sink_frames * tokens
    errors = []
    for key, wanted in case.golden.items():
        match = _CACHE_KEY.fullmatch(key)
        if match is None or match["chunk"] != str(chunk):
            continue
        layer, kind, part, which = (match[name] for name in ("layer", "kind", "part", "which"))
        if int(layer) >= len(session.config.layouts) or wanted.ndim != 3:
            errors.append(float("inf"))
            continue
        group = session.config.layouts[int(layer)].group(cast(HeadKind, kind))
        if group is None or wanted.size == 0:
            continue
        pool = session.backend.read_pool(int(layer))[which == "v"][group.rows]
        rows = pool.reshape(group.num_heads, -1, pool.shape[-1])
        local = policy.local_frames(group.kind, warmup=False) * tokens
        begin = {"sink": 0, "local": sink, "seg": sink + local}[part]
        errors.append(_error(rows[:, begin : begin + len(wanted)].transpose(1, 0, 2), wanted))
    return max(errors) if errors else None


def _error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Largest absolute difference; infinite where shapes differ or values are not finite."""
    if found.shape != wanted.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):
        error = float(np.abs(found.astype(np.float64) - wanted).max()) if wanted.size else 0.0
    return error if np.isfinite(error) else float("inf")


def schedule_error(case: GoldenCase, schedule: Schedule) -> float:
    """Difference of our timesteps and sigmas from the case's."""
    if "timesteps" not in case.golden:
        return 0.0
    timesteps = _error(schedule.timesteps, case.golden["timesteps"]) / 1000
    return max(timesteps, _error(schedule.sigmas, case.golden["sigmas"]))
