"""Constants of a compiled engine as runs of bytes in the bundle's files.

An engine needs its weights under its own names and maybe stacked (q, k and v in one matrix). Both
are descriptions of bytes that the bundle's weight file already holds, so nothing is stored twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from io import BufferedReader
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.bundle.fields import BundlePath, Count
from forcing_kv.runtime_trt.bundle.hashes import (
    HashedFiles,
    mapped,
    open_regular,
    read_piece,
)
from forcing_kv.runtime_trt.bundle.schema import load_as, parse_json_file
from forcing_kv.runtime_trt.dtypes import DTYPES
from forcing_kv.runtime_trt.errors import BundleError, InputError

_REMEDY = "build the engine again"


@dataclass(frozen=True)
class Piece:
    """A run of bytes.

    Raises:
        InputError: it begins before its file, or ends before it begins.
    """

    file: BundlePath
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

    shape: tuple[Count, ...]
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


def parse_table(content: bytes, path: Path) -> dict[str, ConstantEntry]:
    """Read what `write_table` wrote.

    Args:
        content: of the file.
        path: the file, for messages.

    Raises:
        BundleError: malformed.
    """
    try:
        data = parse_json_file(content, path, "table of constants", _REMEDY)
        return dict(load_as(Mapping[str, ConstantEntry], data, str(path)))  # type: ignore[type-abstract]
    except InputError as error:
        raise BundleError(f"{error}; {_REMEDY}") from error


def read_constants(
    bundle: HashedFiles | Path, table: Mapping[str, ConstantEntry]
) -> Iterator[tuple[str, ConstantEntry, NDArray[np.uint8]]]:
    """Read every constant.

    Args:
        bundle: files that are checked when they are opened, or a folder of files that need none.

    Yields:
        Its name, its entry and its bytes, a new array.

    Raises:
        BundleError: a file is missing or shorter than the table says.
    """
    for name, entry in table.items():
        runs = [_run(bundle, piece, name) for piece in entry.pieces]
        yield name, entry, runs[0] if len(runs) == 1 else np.concatenate(runs)


def map_constants(
    bundle: HashedFiles | Path, table: Mapping[str, ConstantEntry]
) -> Iterator[tuple[str, ConstantEntry, NDArray[np.uint8]]]:
    """Every constant where it lies, without a copy; each is one piece.

    Args:
        bundle: as of `read_constants`.

    Yields:
        Its name, its entry and its bytes, mapped from the file for as long as the array lives.

    Raises:
        BundleError: a file is missing or shorter than the table says.
    """
    files: dict[str, NDArray[np.uint8]] = {}
    for name, entry in table.items():
        if len(entry.pieces) != 1:
            raise BundleError(
                f"{bundle}: constant {name} is in {len(entry.pieces)} pieces; {_REMEDY}"
            )
        (piece,) = entry.pieces
        if piece.file not in files:
            files[piece.file] = _mapped(bundle, piece.file)
        run = files[piece.file][piece.offset : piece.offset + piece.nbytes]
        yield name, entry, _whole(run, bundle, piece, name)


def _run(bundle: HashedFiles | Path, piece: Piece, name: str) -> NDArray[np.uint8]:
    """The bytes of one piece of constant `name`, a new array."""
    if isinstance(bundle, HashedFiles):
        run = bundle.piece(piece.file, piece.offset, piece.nbytes)
    else:
        with _opened(bundle / piece.file) as file:
            run = read_piece(file, piece.offset, piece.nbytes)
    return _whole(run, bundle, piece, name)


def _mapped(bundle: HashedFiles | Path, name: str) -> NDArray[np.uint8]:
    if isinstance(bundle, HashedFiles):
        return bundle.map(name)
    with _opened(bundle / name) as file:
        return mapped(file)


def _opened(path: Path) -> BufferedReader:
    try:
        return open_regular(path)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error}); export the bundle again") from error


def _whole(
    run: NDArray[np.uint8], bundle: HashedFiles | Path, piece: Piece, name: str
) -> NDArray[np.uint8]:
    """The same bytes, if there are as many as the piece has."""
    if len(run) != piece.nbytes:
        raise BundleError(
            f"{bundle}/{piece.file}: too short, for constant {name} ends at "
            f"{piece.offset + piece.nbytes}; {_REMEDY}"
        )
    return run
