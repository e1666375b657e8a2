"""Chunks whose noise is drawn before the clock starts."""

from __future__ import annotations

from typing import Any

import numpy as np

from forcing_kv.runtime_trt.backends.stream import Chunk
from forcing_kv.runtime_trt.rollout.noise import draw_noise
from forcing_kv.runtime_trt.session import Session

MEASURE_SEED = 9
NUM_NOISES = 4
"""Chunks take these in turn."""


class Chunks:
    """Generates the chunks of a session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._noises = [draw_chunk_noise(session, index) for index in range(NUM_NOISES)]

    def generate(self, index: int) -> Chunk:
        """The next chunk, from the noise that is `index`'s turn."""
        return self.session.generate_chunk(*self._noises[index % NUM_NOISES])


def draw_chunk_noise(session: Session, index: int) -> tuple[Any, Any]:
    """Initial noise [F, C, h, w] and re-noise [n - 1, F, C, h, w]."""
    shape, draws = session.config.latent_shape, session.config.schedule.num_steps - 1
    eps = [draw_noise(MEASURE_SEED, index, draw + 1, shape) for draw in range(draws)]
    drawn = np.stack(eps) if eps else np.zeros((0, *shape), np.float32)
    return draw_noise(MEASURE_SEED, index, 0, shape), drawn


def timings(chunk: Chunk) -> dict[str, float]:
    """Times by part; `chunk` is the sum where the backend gives none."""
    times = dict(chunk.timings_ms)
    times.setdefault("chunk", sum(times.values()))
    return times
