"""Counter-based noise: the same seed gives the same video on every backend."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.rollout.arguments import check_seed


def draw_noise(seed: int, chunk: int, draw: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal noise addressed by (seed, chunk, draw), independent of call order.

    Args:
        seed: 0 .. 2**64 - 1.
        draw: 0 is the chunk's initial noise; d > 0 is added after denoise step d - 1.

    Returns:
        float32 array of `shape`, from a Philox generator keyed by the three numbers.

    Raises:
        InputError: the seed is no whole number of 64 bits.
    """
    seed = check_seed(seed)
    # A list with an entry above 2**63 would pass through float64 and lose its value.
    key, counter = np.array([seed, 0], np.uint64), np.array([0, 0, draw, chunk], np.uint64)
    bits = np.random.Philox(key=key, counter=counter)
    return np.random.Generator(bits).standard_normal(shape, dtype=np.float32)
