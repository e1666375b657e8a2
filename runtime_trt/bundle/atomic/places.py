"""Where things take their place: hidden names beside a target, and renames that destroy nothing."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from forcing_kv.runtime_trt.errors import ForcingKvError, explained

MARK = ".fkv-"
CLAIM = "lock"
OLD = ".old"
LITTER = re.compile(r"\..+\.fkv-([0-9a-f]{16}(\.old)?|lock)", re.DOTALL)
"""Names of what a killed process may leave: what it made, what it replaced, what it had claimed."""
_MAX_LABEL_NBYTES = 200

_NOREPLACE, _EXCHANGE = 1, 2
"""Flags of Linux's `renameat2`."""
_AT_FDCWD = -100
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def hidden(target: Path, tail: str = "") -> Path:
    """A hidden path beside `target`, by default one that nobody can foresee.

    It is short enough wherever the name of `target` is.
    """
    name = os.fsencode(target.name)
    label = target.name if len(name) <= _MAX_LABEL_NBYTES else hashlib.sha256(name).hexdigest()
    return target.with_name(f".{label}{MARK}{tail or secrets.token_hex(8)}")


def target_of(hidden_path: Path) -> Path:
    """The path that a hidden one stands beside."""
    return hidden_path.with_name(hidden_path.name[1:].rpartition(MARK)[0])


def without_links(path: Path) -> Path:
    """The path that a path leads to, which need not exist.

    Raises:
        OSError: its links lead in a circle.
    """
    try:
        return path.resolve()
    except RuntimeError as error:  # What Python before 3.13 makes of that.
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in errors of the system that name a hidden file, or none at all.

    Raises:
        ForcingKvError: such an error, with what to do.
    """
    try:
        yield
    except OSError as error:
        named = "" if error.filename is None else os.fsdecode(error.filename)
        if named not in ("", str(path)) and MARK not in Path(named).name:
            raise
        raise ForcingKvError(f"{path}: {explained(error)}") from error


def surely(remove: Callable[[], object]) -> None:
    """Remove something also where the Ctrl-C or SIGTERM that ends us comes just then."""
    try:
        remove()
    except BaseException:
        remove()
        raise


@contextmanager
def made_parents(path: Path) -> Iterator[None]:
    """Folders above `path` for the block; those that were made go where they stay empty."""
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def place(source: Path, target: Path) -> None:
    """Rename a file or folder to a name that is free.

    Raises:
        FileExistsError: it is not.
    """
    if _rename(source, target, _NOREPLACE):
        return
    # Making it fails where anything is there; then it is our own that is replaced.
    if source.is_dir():
        target.mkdir()
    else:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    source.replace(target)


def exchange(source: Path, target: Path) -> None:
    """Swap two folders, so that there is always one at `target`, where the system can.

    Elsewhere `target` is missing for a moment, and what was there has the hidden name that ends in
    `OLD`. Where the process ends just then, `target_of` that name is where it belongs.

    Raises:
        FileNotFoundError: nothing is at `target`.
    """
    if _rename(source, target, _EXCHANGE):
        return
    old = source.with_name(source.name + OLD)
    target.rename(old)
    try:
        source.rename(target)
    except BaseException:
        old.rename(target)
        raise
    old.rename(source)


def _rename(source: Path, target: Path, flag: int) -> bool:
    """Call `renameat2`; False where the system or the file system does not have it."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))
