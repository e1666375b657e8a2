"""The stand-in for a text encoder: captions of known words, one fixed vector a word. numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.errors import InputError, shown

TEXT_LEN = 8
"""Rows of a prompt embedding; a caption has six words, the rest is zero padding as in UMT5's."""
TEXT_DIM = 32
"""Width of a word vector."""
DIRECTIONS = ("left", "right", "up", "down")
WORDS = ("a", "digit", *(str(digit) for digit in range(10)), "moving", *DIRECTIONS, ".")


def caption_of(digit: int, direction: str) -> str:
    """The caption of a clip, such as `a digit 3 moving left .`."""
    return f"a digit {digit} moving {direction} ."


def parse_caption(caption: str) -> tuple[int, str]:
    """Digit and starting direction that a caption asks for.

    Raises:
        InputError: not exactly one digit and one direction.
    """
    words = caption.split()
    digits = [int(word) for word in words if word.isdecimal() and len(word) == 1]
    directions = [word for word in words if word in DIRECTIONS]
    if len(digits) != 1 or len(directions) != 1:
        raise InputError(
            f"caption {caption!r}: one digit 0-9 and one of {list(DIRECTIONS)} are needed, "
            f"as in {caption_of(3, 'left')!r}"
        )
    return digits[0], directions[0]


def word_table() -> NDArray[np.float32]:
    """Word vectors [words, TEXT_DIM]: rows 1.. of a Hadamard matrix, so orthogonal and exact."""
    table = np.ones((1, 1), np.float32)
    while len(table) < TEXT_DIM:
        table = np.block([[table, table], [table, -table]])
    return table[1 : len(WORDS) + 1].astype(np.float32)


def encode_prompt(prompt: str) -> NDArray[np.float32]:
    """Embed a caption as [TEXT_LEN, TEXT_DIM] float32, zero-padded after the last word.

    Words are separated by spaces; the full stop is a word.

    Raises:
        InputError: an unknown word, no word, or too many of them.
    """
    words = prompt.split()
    unknown = [word[:40] for word in words if word not in WORDS]
    if unknown:
        raise InputError(
            f"prompt {shown(prompt)}: unknown words {shown(unknown[:5])}; the digits model knows "
            f"{list(WORDS)}"
        )
    if not 1 <= len(words) <= TEXT_LEN:
        raise InputError(
            f"prompt {shown(prompt)} has {len(words)} words; the digits model takes 1 to {TEXT_LEN}"
        )
    embeds = np.zeros((TEXT_LEN, TEXT_DIM), np.float32)
    embeds[: len(words)] = word_table()[[WORDS.index(word) for word in words]]
    return embeds
