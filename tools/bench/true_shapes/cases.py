"""What is run at true shapes: a steady chunk, a steady denoise step, or the first chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any

import numpy as np

from forcing_kv.runtime_trt.backends.base import ChunkPositions, ChunkRequest
from forcing_kv.runtime_trt.rollout.timeline import steady_plan
from forcing_kv.runtime_trt.session import Session
from forcing_kv.tools.bench.measure.chunks import draw_chunk_noise
from forcing_kv.tools.bench.measure.gate import GATE_SEED, RolloutResult
from forcing_kv.tools.bench.true_shapes.pools import fill_history
from forcing_kv.tools.bench.workloads import CLIP_CHUNKS, Case


@dataclass
class CaseTimes:
    """What a case made, and what it took on the host's clock and on the CPU's."""

    found: RolloutResult
    """x0 of every denoise step of a steady case; latents of every chunk of a clip."""
    wall_ms: float
    cpu_ms: float
    pass_cpu_ms: list[float] = field(default_factory=list)
    """CPU time of each forward pass: denoise steps, then the clean pass, chunk by chunk."""


def run_case(session: Session, case: Case) -> CaseTimes:
    """Run a case once.

    Args:
        session: fresh, its prompt set. In a steady case its pools are overwritten, and its own
            timeline stays where it is.
    """
    if case == "clip":
        return _timed(session, lambda: _clip(session))
    plan = steady_plan(session.config.policy, session.config.chunk.num_frames)
    fill_history(session.backend, plan)
    noise, eps = draw_chunk_noise(session, 0)
    if case == "steady-chunk":
        request = ChunkRequest(plan, noise, eps, keep_x0=True)
        return _timed(session, lambda: _chunk(session, request))
    positions = ChunkPositions.of(plan, session.config)
    return _timed(session, lambda: _step_alone(session, noise, eps, positions))


def _timed(session: Session, run: Any) -> CaseTimes:
    with _pass_times(session.backend) as pass_cpu_ms:
        begin, cpu_begin = perf_counter(), process_time()
        found = run()
        cpu_ms = 1e3 * (process_time() - cpu_begin)
        wall_ms = 1e3 * (perf_counter() - begin)
    return CaseTimes(found, wall_ms, cpu_ms, pass_cpu_ms)


def _clip(session: Session) -> RolloutResult:
    return RolloutResult.of(session.stream(CLIP_CHUNKS, seed=GATE_SEED))


def _chunk(session: Session, request: ChunkRequest) -> RolloutResult:
    made = session.backend.submit(request).result()
    assert made.x0_steps is not None, "they were asked for"
    scores = {} if made.scores is None else {0: made.scores}
    return RolloutResult(
        np.stack(made.x0_steps), scores, {} if made.kept is None else {0: made.kept}
    )


def _step_alone(session: Session, noise: Any, eps: Any, positions: ChunkPositions) -> RolloutResult:
    backend = session.backend
    renoise = eps[0] if len(eps) else None
    x0, _ = backend.run_step(noise, renoise, backend.step_scalars[0], positions)
    return RolloutResult(backend.to_host(x0)[None], {}, {})


@contextmanager
def _pass_times(backend: Any) -> Iterator[list[float]]:
    """Collects the CPU time of every forward pass; PyTorch's subjects have a method of their own.

    Passes that call each other count once.
    """
    name = "_forward" if hasattr(backend, "_forward") else "run_step"
    run, times = getattr(backend, name), []

    def timed(*arguments: Any) -> Any:
        begin = process_time()
        made = run(*arguments)
        times.append(1e3 * (process_time() - begin))
        return made

    setattr(backend, name, timed)
    try:
        yield times
    finally:
        delattr(backend, name)
