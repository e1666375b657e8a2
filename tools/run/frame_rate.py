"""Frame rates of videos: exact fractions, as containers hold them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Annotated

from cyclopts import CoercionError, Parameter, Token

from forcing_kv.runtime_trt.errors import InputError, shown

LEAST, MOST = Fraction(1, 10), Fraction(1000)
"""Frames per second that are accepted."""
MOST_OF_GIF = 50
"""A GIF counts hundredths of a second, and players slow frames that last less than two."""
NTSC = (24, 30, 48, 60, 120, 240)
"""Rates that television runs 1000/1001 times as fast."""
_MAX_PART = 1_001_000
"""Largest numerator and denominator, as in FFmpeg."""
_MAX_DENOMINATOR = 1001
"""Of a decimal that stands for a fraction, such as 16.6667."""


def parse_rate(option: str, text: str) -> Fraction:
    """Read a frame rate: a number, or a ratio of two whole numbers.

    A decimal that is one of television's rates rounded is that rate: 23.976 is 24000/1001. Any
    other decimal is the nearest fraction with a small denominator.

    Args:
        option: the flag that it was given with, for messages.
        text: what was given.

    Raises:
        InputError: neither, or out of range.
    """
    plain = text.strip()
    if ratio := re.fullmatch(r"([0-9]{1,7})/([0-9]{1,7})", plain):
        numerator, denominator = int(ratio[1]), int(ratio[2])
        small = 0 < denominator <= _MAX_PART and numerator <= _MAX_PART
        rate = Fraction(numerator, denominator) if small else None
    elif re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,20})?|\.[0-9]{1,20}", plain):
        rate = _of_decimal(Decimal(plain))
    else:
        rate = None
    if rate is None or not LEAST <= rate <= MOST:
        raise InputError(
            f"{option} is {shown(text)}; give {float(LEAST)} to {MOST} frames per second, such as "
            "24, 23.976, 29.97 or 30000/1001"
        )
    return rate


def _of_decimal(number: Decimal) -> Fraction:
    exponent = number.as_tuple().exponent
    digits = -exponent if isinstance(exponent, int) else 0
    if digits >= 2 and number % 1:
        for whole in NTSC:
            rate = Fraction(1000 * whole, 1001)
            if round(rate, digits) == Fraction(number):
                return rate
    return Fraction(number).limit_denominator(_MAX_DENOMINATOR)


def check_rate(rate: Fraction, suffix: str) -> None:
    """Refuse a rate that a kind of file cannot show.

    Raises:
        InputError: more than a GIF plays.
    """
    if suffix == ".gif" and rate > MOST_OF_GIF:
        raise InputError(
            f"--fps is {rate_text(rate)}; a GIF plays at most {MOST_OF_GIF} frames per second, so "
            "give less, or write an .mp4"
        )


def rate_text(rate: Fraction) -> str:
    """A rate for people: 24, or 23.976 (24000/1001)."""
    if rate.denominator == 1:
        return str(rate.numerator)
    return f"{float(rate):.5g} ({rate.numerator}/{rate.denominator})"


def _converted(_: object, tokens: Sequence[Token]) -> Fraction:
    try:
        return parse_rate(tokens[-1].keyword or "frame rate", tokens[-1].value)
    except InputError as error:
        raise CoercionError(str(error)) from error


FrameRate = Annotated[
    Fraction, Parameter(converter=_converted, n_tokens=1, metavar=f"{float(LEAST)}..{MOST}")
]
"""A flag, as `parse_rate` reads it."""
