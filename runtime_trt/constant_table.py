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
    """As torch names it: float32, bfloat16, int32, ..."""
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
    files: dict[str, NDArray[np.uint8]] = {}
    for name, entry in table.items():
        content = np.empty(entry.nbytes, np.uint8)
        begin = 0
        for piece in entry.pieces:
            if piece.file not in files:
                files[piece.file] = _mapped(bundle / piece.file)
            run = files[piece.file][piece.offset : piece.offset + piece.nbytes]
            if len(run) != piece.nbytes:
                raise BundleError(
                    f"{bundle / piece.file}: {len(files[piece.file])} bytes, but constant {name} "
                    f"ends at {piece.offset + piece.nbytes}; build the engine again"
                )
            content[begin : begin + piece.nbytes] = run
            begin += piece.nbytes
        yield name, entry, content


def _mapped(path: Path) -> NDArray[np.uint8]:
    try:
        return np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read ({error}); export the bundle again") from error
