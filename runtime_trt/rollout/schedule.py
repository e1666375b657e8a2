"""Few-step schedule, time sinusoid and temporal RoPE tables, all in float64 on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.errors import InputError

NUM_TRAIN_TIMESTEPS = 1000
ROPE_THETA = 10000.0
_SHIFTS = (1e-3, 1e3)
"""Published models have 5 to 8; beyond these no noise level would be a number."""

Float32 = NDArray[np.float32]


def shifted_sigma(u: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    """Noise level of the flow-match schedule at u in (0, 1]: shift * u / (1 + (shift - 1) * u)."""
    return shift * u / (1 + (shift - 1) * u)


@dataclass(frozen=True)
class Schedule:
    """Timesteps and noise levels of the denoise steps."""

    steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    """Entries as configured, descending; the last may be 0."""
    warped: bool = True
    """Whether entries index the shifted schedule (750 -> t = 937.5) or are timesteps themselves."""
    shift: float = 5.0
    """Timestep shift of the flow-match schedule."""
    exact_sigma: bool = False
    """Whether a step's noise level is t / 1000 itself (RAVEN), not the nearest schedule entry."""

    def __post_init__(self) -> None:
        steps = tuple(float(step) for step in self.steps)
        object.__setattr__(self, "steps", steps)
        descending = all(a > b for a, b in pairwise(steps))
        few = 0 < len(steps) <= NUM_TRAIN_TIMESTEPS
        if not (few and descending and steps[0] <= NUM_TRAIN_TIMESTEPS and steps[-1] >= 0):
            raise InputError(
                f"Schedule.steps is {list(steps[:8])} ({len(steps)}); give 1 to "
                f"{NUM_TRAIN_TIMESTEPS} descending entries within [0, {NUM_TRAIN_TIMESTEPS}]"
            )
        least, most = _SHIFTS
        if not least <= self.shift <= most:
            raise InputError(f"Schedule.shift is {self.shift}; it must be {least} to {most}")

    @property
    def num_steps(self) -> int:
        """Denoise steps per chunk, n (the clean pass not counted)."""
        return len(self.steps)

    @property
    def timesteps(self) -> Float32:
        """Timestep given to the model at each step, [n] float32."""
        if not self.warped:
            return np.asarray(self.steps, np.float32)
        u = np.asarray(self.steps, np.float64) / NUM_TRAIN_TIMESTEPS
        return (shifted_sigma(u, self.shift) * NUM_TRAIN_TIMESTEPS).astype(np.float32)

    @property
    def sigmas(self) -> Float32:
        """Noise level of each step, [n] float32: the schedule entry nearest to t / 1000."""
        if self.exact_sigma:
            return (self.timesteps.astype(np.float64) / NUM_TRAIN_TIMESTEPS).astype(np.float32)
        u = np.arange(NUM_TRAIN_TIMESTEPS, 0, -1, dtype=np.float64) / NUM_TRAIN_TIMESTEPS
        table = shifted_sigma(u, self.shift)
        wanted = self.timesteps.astype(np.float64) / NUM_TRAIN_TIMESTEPS
        nearest = np.abs(table[None, :] - wanted[:, None]).argmin(axis=1)
        return table[nearest].astype(np.float32)


def time_sinusoid(timestep: float, freq_dim: int) -> Float32:
    """Sinusoid of one timestep, [1, freq_dim] float32: cosines first, computed in float64."""
    half = freq_dim // 2
    frequencies = ROPE_THETA ** (-np.arange(half, dtype=np.float64) / half)
    angles = np.float64(np.float32(timestep)) * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)])[None].astype(np.float32)


def rope_table(
    positions: Sequence[int] | NDArray[np.int64], num_pairs: int
) -> tuple[Float32, Float32]:
    """Cosines and sines [len(positions), num_pairs] of one rotary axis; positions have no limit."""
    exponents = np.arange(num_pairs, dtype=np.float64) / num_pairs
    angles = np.asarray(positions, np.float64)[:, None] * ROPE_THETA ** -exponents[None]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
