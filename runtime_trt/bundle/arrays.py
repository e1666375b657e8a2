"""Arrays of `.npy` and `.npz` files from anywhere: never unpickled, memory bounded by the file's.

numpy's own loader takes the memory that a header claims before it looks at what the file holds.
"""

from __future__ import annotations

import io
import os
import zipfile
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from forcing_kv.runtime_trt.bundle.hashes import open_regular
from forcing_kv.runtime_trt.errors import InputError

MAX_NBYTES = 4 << 30
"""Most bytes of the arrays of a file; 500 prompts of UMT5 have 4 GiB."""
_MAX_EXPANSION = 200
_SMALL_NBYTES = 64 << 20
"""Compressed arrays take at most so many times the bytes of their file, or so many bytes; prompts
whose padding is zeros expand 30 times."""
_MAX_ARRAYS = 1 << 12
_ZIP = b"PK"
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
"""By version; the third is for names of fields, which no array here has."""


def read_arrays(path: Path, what: str, remedy: str) -> dict[str, NDArray[Any]]:
    """Read every array of a file.

    Args:
        path: `.npy` or `.npz`, told apart by its content.
        what: what it should hold, for messages.
        remedy: what to do without it.

    Returns:
        Arrays of numbers by name, C-contiguous and in this machine's byte order; the one of an
        `.npy` file has an empty name.

    Raises:
        InputError: missing, no file, truncated, too large, or of objects.
    """
    try:
        with open_regular(path) as file:
            is_zip = file.read(len(_ZIP)) == _ZIP
            file.seek(0)
            if not is_zip:
                return {"": _array(file, os.fstat(file.fileno()).st_size)}
            with zipfile.ZipFile(file) as archive:
                return _members(archive)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such {what}; {remedy}") from error
    except Exception as error:
        # What the parsers of zip, deflate and numpy raise is not bounded by any list.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = str(reason).partition("\n")[0][:200]
        raise InputError(
            f"{path}: cannot be read as {what} in .npy or .npz ({reason}); {remedy}"
        ) from error


def _members(archive: zipfile.ZipFile) -> dict[str, NDArray[Any]]:
    entries = archive.infolist()
    names = [entry.filename.removesuffix(".npy") for entry in entries]
    if len(entries) > _MAX_ARRAYS or sum(entry.file_size for entry in entries) > MAX_NBYTES:
        raise ValueError(f"{len(entries)} arrays of more than {MAX_NBYTES >> 30} GiB")
    packed = sum(entry.compress_size for entry in entries)
    if sum(entry.file_size for entry in entries) > max(_SMALL_NBYTES, _MAX_EXPANSION * packed):
        raise ValueError(f"{packed} compressed bytes expand more than {_MAX_EXPANSION} times")
    if len(set(names)) != len(names):
        raise ValueError("two arrays have one name")
    found = {}
    for name, entry in zip(names, entries, strict=True):
        content = archive.read(entry)
        found[name] = _array(io.BytesIO(content), len(content))
    return found


def _array(file: BinaryIO, nbytes: int) -> NDArray[Any]:
    """The array that a stream of `nbytes` bytes holds.

    Raises:
        ValueError: it is none, or holds more or less than its header says.
    """
    version = npy.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of the format; arrays of numbers have 1.0 or 2.0")
    shape, is_fortran, dtype = _HEADERS[version](file)
    if dtype.kind not in "fiub":
        raise ValueError(f"it holds {str(dtype)[:40]}, and no plain numbers")
    claimed, left = prod(shape) * dtype.itemsize, nbytes - file.tell()
    if claimed != left or claimed > MAX_NBYTES:
        raise ValueError(
            f"its header says {claimed} bytes of {dtype} {list(shape)[:8]}, and {left} follow"
        )
    array = np.frombuffer(file.read(claimed), dtype)
    array = array.reshape(shape, order="F" if is_fortran else "C")
    return np.array(array, dtype.newbyteorder("="), order="C")
