"""Constants of a compiled engine as runs of bytes in the bundle's files.

An engine needs its weights under its own names and maybe stacked (q, k and v in one matrix). Both
are descriptions of bytes that the bundle's weight file already holds, so nothing is stored twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.errors import BundleError


@dataclass(frozen=True)
class Piece:
    """A run of bytes."""

    file: str
    """Path within the bundle."""
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ConstantEntry:
    """One constant: its pieces one after another."""

    shape: tuple[int, ...]
    dtype: str
    """Name in `DTYPES`."""
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the constant."""
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
        content: dict[str, dict[str, Any]] = json.loads(path.read_text())
        return {
            name: ConstantEntry(
                tuple(entry["shape"]),
                entry["dtype"],
                tuple(Piece(**piece) for piece in entry["pieces"]),
            )
            for name, entry in content.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path}: not readable ({error}); build the engine again") from error


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
