"""Padding rows of a prompt as a few keys with a log-count bias: exact, and less to attend to.

Padding rows of the embedding are all zero, so their keys and values in cross-attention are equal.
`count` equal keys weigh as much as one whose score is raised by log(count). A 16-bit dtype cannot
hold that logarithm well enough, so up to `MAX_PAD_ROWS` keys share the count, each with a bias that
the dtype holds exactly.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.errors import InputError

Float32 = NDArray[np.float32]

MAX_PAD_ROWS = 3
"""Keys that stand for the padding; the count is then right to about 1e-5 in bfloat16."""


def fold_text(prompt_embeds: Float32, text_rows: int, dtype: str) -> tuple[Float32, Float32]:
    """Cut a prompt embedding to `text_rows` rows and weigh its padding.

    Args:
        prompt_embeds: [text_len, text_dim], padding rows zero.
        text_rows: rows that the graph attends to.
        dtype: compute dtype, in which the biases must be exact.

    Returns:
        The first `text_rows` rows, and the bias [text_rows] of their scores: 0 for text, the
        logarithm of the padding rows that a padding row stands for, minus infinity for the rest.

    Raises:
        InputError: the prompt does not leave room for the padding rows.
    """
    text_len = len(prompt_embeds)
    filled = np.flatnonzero(np.abs(prompt_embeds).max(axis=1))
    num_text = int(filled[-1]) + 1 if filled.size else 0
    weights = pad_biases(text_len - num_text, dtype)
    if num_text + len(weights) > text_rows:
        raise InputError(
            f"the prompt has {num_text} rows of text, but this engine folds prompts to {text_rows} "
            f"rows, {len(weights)} of them for padding; shorten the prompt, or build the engine "
            "with more text rows"
        )
    bias = np.full(text_rows, -np.inf, np.float32)
    bias[:num_text] = 0.0
    bias[num_text : num_text + len(weights)] = weights
    return np.ascontiguousarray(prompt_embeds[:text_rows]), bias


def pad_biases(count: int, dtype: str) -> list[float]:
    """Biases, exact in `dtype`, whose exponentials add up to `count`; empty for 0."""
    biases: list[float] = []
    left = float(count)
    while left > 0 and len(biases) < MAX_PAD_ROWS:
        # Rounded towards zero in absolute value; a remainder under one has a negative logarithm.
        bias = _round_down(math.log(left), dtype)
        biases.append(bias)
        left -= math.exp(bias)
        if dtype == "float32" or left < 1e-6 * count:
            break
    return biases


def _round_down(value: float, dtype: str) -> float:
    """Largest value of `dtype` that is not above `value`; the nearest for float32."""
    if dtype == "float32":
        return float(np.float32(value))
    if dtype == "float16":
        rounded = np.float16(value)
        above = float(rounded) > value
        return float(np.nextafter(rounded, np.float16(-np.inf)) if above else rounded)
    # bfloat16 is the upper half of a float32: cutting it off rounds towards zero. That is above a
    # negative value, and above a positive one that float32 has rounded up.
    bits = np.float32(value).view(np.int32) & np.int32(-0x10000)
    if float(bits.view(np.float32)) > value:
        bits += np.int32(0x10000 if value < 0 else -0x10000)
    return float(bits.view(np.float32))
