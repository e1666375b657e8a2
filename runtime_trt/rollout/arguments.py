"""Checks of what callers give: a wrong type is told as clearly as a wrong value."""

from __future__ import annotations

import operator
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.errors import InputError, shown

THREADS_PER_CPU = 8
"""Most threads that are accepted, times the machine's CPUs: more only wait for each other, and from
some tens of thousands on they take minutes to start."""


def whole_number(name: str, value: Any, least: int, most: int | None = None, hint: str = "") -> int:
    """A Python integer of a whole number: Python's, numpy's, or whatever serves as an index.

    Args:
        name: what it is, for messages.
        value: what was given.
        least: least value that is allowed.
        most: greatest one; None for no limit.
        hint: what to do in place of a wrong value.

    Raises:
        InputError: not a whole number (a truth value is none), or out of range.
    """
    number = None
    if not isinstance(value, bool):
        try:
            number = operator.index(value)
        except Exception:  # Of a foreign class anything may come.
            number = None
    if number is not None and least <= number and (most is None or number <= most):
        return number
    limits = f"from {least} on" if most is None else f"from {least} to {_plain(most)}"
    raise InputError(f"{name} is {shown(value)}; give a whole number {limits}{hint}")


def _plain(number: int) -> str:
    return "2**64 - 1" if number == 2**64 - 1 else str(number)


def check_seed(seed: Any) -> int:
    """The key of the noise generator.

    Raises:
        InputError: not a whole number of 64 bits.
    """
    hint = " (one beyond that modulo 2**64; for a new video each time secrets.randbits(64))"
    return whole_number("seed", seed, 0, 2**64 - 1, hint)


def check_threads(num_threads: Any, name: str = "num_threads") -> int:
    """A number of CPU threads; 0 leaves the choice to what runs.

    Raises:
        InputError: not a whole number, or far more threads than this machine has CPUs.
    """
    most = THREADS_PER_CPU * (os.cpu_count() or 1)
    hint = f" ({THREADS_PER_CPU} for each CPU of this machine), or 0 for an automatic choice"
    return whole_number(name, num_threads, 0, most, hint)


def yes_or_no(name: str, value: Any) -> bool:
    """A truth value, Python's or numpy's.

    Raises:
        InputError: anything else.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name} is {shown(value)}; give True or False")
    return bool(value)


def file_path(name: str, value: Any) -> Path:
    """A path of a file or folder.

    Raises:
        InputError: no text or path object, empty, or with a NUL character.
    """
    try:
        path = os.fspath(value)
    except Exception:  # A foreign object's own method may raise anything.
        path = None
    if not isinstance(path, str) or not path or "\0" in path:
        raise InputError(f"{name} is {shown(value)}; give a path")
    return Path(path)


def float_array(
    name: str,
    value: Any,
    shape: tuple[int, ...] | None = None,
    hint: str = "",
    *,
    finite: bool = True,
) -> NDArray[np.float32]:
    """A contiguous float32 array of whatever numpy can make an array of.

    Args:
        name: what it is, for messages.
        value: an array of floats, nested lists, or a tensor in host memory.
        shape: what is needed; None takes any.
        hint: how one comes by such an array.
        finite: whether NaN and infinities are refused.

    Raises:
        InputError: not an array of floats, another shape, or not finite in float32.
    """
    if value is None or isinstance(value, (str, bytes, os.PathLike)):
        raise InputError(f"{name} is {_kind(value)}; give float32{hint}")
    try:
        array = np.asarray(value)
    except Exception as error:  # Ragged lists; tensors on a device or with a gradient.
        raise InputError(
            f"{name} is {_kind(value)}, of which numpy cannot make an array "
            f"({shown(str(error))}); give float32{hint}. A tensor of PyTorch: "
            ".detach().float().cpu()"
        ) from error
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        what = "" if isinstance(value, np.ndarray) else f" ({_kind(value)})"
        raise InputError(f"{name} has dtype {array.dtype}{what}; give float32{hint}")
    if shape is not None and array.shape != shape:
        raise InputError(f"{name} has shape {array.shape}; needed is {shape}{hint}")
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(array, np.float32)
    if finite and not np.isfinite(narrow).all():
        beyond = " in float32, whose largest is 3.4e38" if np.isfinite(array).all() else ""
        raise InputError(f"{name} holds NaN or infinite values{beyond}; give finite numbers")
    return narrow


def _kind(value: Any) -> str:
    kind = type(value)
    if value is None or isinstance(value, (str, bytes, os.PathLike)):
        return shown(value)
    return f"of type {kind.__module__}.{kind.__qualname__}"
