"""Files and folders that appear whole or not at all.

What is being made stands beside its target under a hidden name that nobody can foresee, so that two
writers never share it and no link can lie in wait there. It takes the target's place by one rename,
and is removed on any error, an interruption included.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from forcing_kv.runtime_trt.errors import ForcingKvError, InputError


def check_folder(folder: Path, option: str = "--out") -> None:
    """Refuse a folder that can neither be written nor made.

    Args:
        folder: where something is to be written.
        option: the option that names it.

    Raises:
        InputError: it, or the nearest folder above it that exists, is none or is not writable.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise InputError(f"{folder}: {place} is not a writable folder; choose another {option}")


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """An open file that takes the place of `path` if the block ends well.

    Its `name` is the path at which it stands until then. A link at `path` is replaced itself.

    Raises:
        ForcingKvError: it cannot be made, written or moved; names `path`.
    """
    temporary = _beside(path)
    with _naming(path, temporary), open(temporary, "xb", opener=_open_private) as file:
        try:
            yield file
            file.close()  # What is still to be written may fail, and must before the rename.
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; see `replaced_file`."""
    with replaced_file(path) as file:
        file.write(content)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON file as a whole or not at all; missing folders are made.

    Raises:
        ValueError: a number in it is NaN or infinite.
    """
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.encode())


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of `target` if the block ends well.

    A link at `target` stays, and what it points to is replaced. Folders above it are made.

    Raises:
        ForcingKvError: it cannot be made, written or moved; names `target`.
    """
    target = target.resolve()
    temporary = _beside(target)
    with _naming(target, temporary):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            _put_folder(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _put_folder(temporary: Path, target: Path) -> None:
    """Rename a folder; the one that is there goes, or comes back where the rename fails."""
    if not target.exists():
        temporary.rename(target)
        return
    old = temporary.with_name(temporary.name + ".old")
    target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def _open_private(path: str, flags: int) -> int:
    """Open a file that is not there yet, with the rights that the user's mask leaves."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """Name `path` in errors of the system that name the temporary one, or none at all."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and str(error.filename) not in (str(path), str(temporary)):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; free some, or choose another disk" if full else ""
        raise ForcingKvError(f"{path}: {error.strerror or error}{remedy}") from error
