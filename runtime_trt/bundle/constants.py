"""Constants of a compiled engine as runs of bytes in the bundle's files.

An engine needs its weights under its own names and maybe stacked (q, k and v in one matrix). Both
are descriptions of bytes that the bundle's weight file already holds, so nothing is stored twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.bundle.schema import load_as, read_json
from forcing_kv.runtime_trt.dtypes import DTYPES
from forcing_kv.runtime_trt.errors import BundleError, InputError

_REMEDY = "build the engine again"


@dataclass(frozen=True)
class Piece:
    """A run of bytes.

    Raises:
        InputError: it begins before its file, or ends before it begins.
    """

    file: str
    """Path within the bundle."""
    offset: int
    nbytes: int

    def __post_init__(self) -> None:
        if min(self.offset, self.nbytes) < 0:
            raise InputError(f"{self.nbytes} bytes at {self.offset} are no part of {self.file}")


@dataclass(frozen=True)
class ConstantEntry:
    """One constant: its pieces one after another.

    Raises:
        InputError: there is no such dtype, or the pieces are not the bytes of its elements.
    """

    shape: tuple[int, ...]
    dtype: str
    """Name in `DTYPES`."""
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype is {self.dtype!r}; allowed are {list(DTYPES)}")
        needed = prod(self.shape) * DTYPES[self.dtype].nbytes
        if self.nbytes != needed:
            raise InputError(
                f"{self.nbytes} bytes are given for {self.dtype} {list(self.shape)}, which has "
                f"{needed}"
            )

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def write_table(path: Path, table: Mapping[str, ConstantEntry]) -> None:
    """Write a table as JSON."""
    path.write_text(json.dumps({name: asdict(entry) for name, entry in table.items()}, indent=0))


def read_table(path: Path) -> dict[str, ConstantEntry]:
    """Read what `write_table` wrote.

    Raises:
        BundleError: missing or malformed.
    """
    try:
        content = read_json(path, "table of constants", _REMEDY)
        return dict(load_as(Mapping[str, ConstantEntry], content, str(path)))  # type: ignore[type-abstract]
    except InputError as error:
        raise BundleError(f"{error}; {_REMEDY}") from error


def read_constants(
    bundle: Path, table: Mapping[str, ConstantEntry]
) -> Iterator[tuple[str, ConstantEntry, NDArray[np.uint8]]]:
    """Read every constant.

    Yields:
        Its name, its entry and its bytes, a new array.

    Raises:
        BundleError: a file is missing or shorter than the table says.
    """
    files = _Files(bundle)
    for name, entry in table.items():
        content = np.empty(entry.nbytes, np.uint8)
        begin = 0
        for piece in entry.pieces:
            content[begin : begin + piece.nbytes] = files.run(piece, name)
            begin += piece.nbytes
        yield name, entry, content


def map_constants(
    bundle: Path, table: Mapping[str, ConstantEntry]
) -> Iterator[tuple[str, ConstantEntry, NDArray[np.uint8]]]:
    """Every constant where it lies, without a copy; each is one piece.

    Yields:
        Its name, its entry and its bytes, mapped from the file for as long as the array lives.

    Raises:
        BundleError: a file is missing or shorter than the table says.
    """
    files = _Files(bundle)
    for name, entry in table.items():
        (piece,) = entry.pieces
        yield name, entry, files.run(piece, name)


class _Files:
    """Files of a bundle, mapped when they are first read."""

    def __init__(self, bundle: Path) -> None:
        self._bundle = bundle
        self._mapped: dict[str, NDArray[np.uint8]] = {}

    def run(self, piece: Piece, name: str) -> NDArray[np.uint8]:
        """The bytes of one piece of constant `name`.

        Raises:
            BundleError: there are fewer.
        """
        path = self._bundle / piece.file
        if piece.file not in self._mapped:
            self._mapped[piece.file] = _mapped(path)
        content = self._mapped[piece.file]
        run = content[piece.offset : piece.offset + piece.nbytes]
        if len(run) != piece.nbytes:
            raise BundleError(
                f"{path}: {len(content)} bytes, but constant {name} ends at "
                f"{piece.offset + piece.nbytes}; build the engine again"
            )
        return run


def _mapped(path: Path) -> NDArray[np.uint8]:
    try:
        return np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read ({error}); export the bundle again") from error
