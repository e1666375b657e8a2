"""Types of a manifest's entries, each checked when it is read: paths, hashes, counts, free text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any

from forcing_kv.runtime_trt.errors import InputError

MAX_COUNT = 1 << 50
"""More bytes, elements or milliseconds than any machine has."""
_MAX_TEXT = 1000
_MAX_PATH = 500
_MAX_SHOWN = 100


@dataclass(frozen=True)
class Checked:
    """Marks a type: `check` returns the value that is taken, or raises `InputError`."""

    check: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.check, handler(source))


def _path(text: str) -> str:
    path = PurePosixPath(text)
    plain = text.isprintable() and "\\" not in text and len(text.encode()) <= _MAX_PATH
    inside = not path.is_absolute() and ".." not in path.parts and path.parts
    if not (plain and inside and str(path) == text):
        raise InputError(
            f"{shortened(text)} is no path within the bundle; allowed are relative ones with "
            "forward slashes, such as graphs/step.onnx"
        )
    return text


def _sha256(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise InputError(f"{shortened(text)} is no SHA-256; it must be 64 hexadecimal digits")
    return text


def _text(text: str) -> str:
    if len(text) > _MAX_TEXT:
        raise InputError(f"{len(text)} characters; at most {_MAX_TEXT} are allowed")
    if len(text.splitlines()) > 1 or text.endswith("\n"):
        raise InputError(f"{shortened(text)} has several lines; one is allowed")
    return text


def _word(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}", text):
        raise InputError(
            f"{shortened(text)} is no name; allowed are letters, digits and _ . + - in between"
        )
    return text


def _plain(value: Any) -> Any:
    """A text, a number, a truth value or null; or an object of such."""
    for each in value.values() if isinstance(value, dict) else (value,):
        if isinstance(each, str):
            _text(each)
        elif isinstance(each, (dict, list)):
            raise InputError(f"{shortened(value)} is nested; allowed are texts and numbers")
    return value


def within(least: float, most: float) -> Checked:
    """Numbers in a range, both ends included."""

    def check(value: float) -> float:
        if not (least <= value <= most and math.isfinite(value)):
            raise InputError(f"{value} is outside of {least} to {most}")
        return value

    return Checked(check)


def shortened(value: Any) -> str:
    """A value as a message may show it."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


BundlePath = Annotated[str, Checked(_path)]
"""Path of a file or folder within the bundle."""
Sha256 = Annotated[str, Checked(_sha256)]
Text = Annotated[str, Checked(_text)]
"""For people, or the name of a tensor."""
Word = Annotated[str, Checked(_word)]
"""A name that commands and file names may hold."""
Plain = Annotated[Any, Checked(_plain)]
"""What a record may hold for people: a text, a number, or an object of such."""
Count = Annotated[int, within(0, MAX_COUNT)]
Extent = Annotated[int, within(1, MAX_COUNT)]
"""Size of a tensor along one axis."""
Seconds = Annotated[float, within(0, 1e9)]
