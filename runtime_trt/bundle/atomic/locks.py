"""Who may write: locks of the system, which end with the process that holds them.

A folder that is changed is locked itself. What is only to be made is claimed by a hidden file
beside it, which goes with the claim; one that a killed process left is taken over by the next.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from forcing_kv.runtime_trt.bundle.atomic.places import (
    CLAIM,
    hidden,
    made_parents,
    naming,
    surely,
    without_links,
)
from forcing_kv.runtime_trt.errors import ForcingKvError, InputError

_log = logging.getLogger(__name__)

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL)
"""What a file system without locks answers, or NFS for a folder."""
_MAGIC = b"forcing_kv "
_held: ContextVar[frozenset[tuple[int, int]]] = ContextVar("held", default=frozenset())
"""Folders that this thread has locked."""


class NoLocksError(Exception):
    """The file system knows no locks."""


def lock(descriptor: int, *, wait: bool) -> bool:
    """Lock an open file or folder until it is closed.

    Args:
        wait: until another process lets it go.

    Returns:
        Whether it is locked now; False where another holds it and `wait` is off.

    Raises:
        NoLocksError: that cannot be told here.
    """
    try:
        import fcntl
    except ImportError as error:
        raise NoLocksError from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            raise NoLocksError from error
        raise
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file or folder stands at `path`, and not another or none."""
    try:
        found = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))


@contextmanager
def claimed(target: Path, *, wait: bool = False) -> Iterator[None]:
    """The right to make `target`, which one process has at a time.

    Args:
        target: the file or folder that will be made.
        wait: for whoever has it, and say so; otherwise that is an error.

    Raises:
        InputError: another process is making it.
    """
    with made_parents(target):
        path = hidden(without_links(target.parent) / target.absolute().name, CLAIM)
        try:
            with naming(target):
                descriptor = _claim(path, target, wait=wait)
        except BaseException:
            remove_dead_claim(path)
            raise
        try:
            yield
        finally:
            # While it is locked, so that nobody else has it yet.
            surely(lambda: path.unlink(missing_ok=True))
            os.close(descriptor)


def remove_dead_claim(path: Path) -> None:
    """Remove the file of a claim whose holder has ended, if it is one."""
    with suppress(OSError, ForcingKvError, NoLocksError):
        descriptor = _open_claim(path, make=False)
        try:
            if lock(descriptor, wait=False) and is_at(descriptor, path):
                path.unlink()
        finally:
            os.close(descriptor)


@contextmanager
def claimed_in(folder: Path, name: str) -> Iterator[None]:
    """The right to write files to a folder that may hold others; `name` is one of them.

    Raises:
        InputError: another process is doing so.
    """
    # Where the folder is there, the one above it may belong to somebody else.
    with claimed(folder / name if folder.exists() else folder):
        yield


def _claim(path: Path, target: Path, *, wait: bool) -> int:
    """Make, lock and sign the file of a claim; returns its descriptor."""
    while True:
        descriptor = _open_claim(path, make=True)
        try:
            _lock_claim(descriptor, target, wait=wait)
            if is_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _MAGIC + f"{os.getpid()} {_command(sys.argv)}".encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # Its holder has removed it.


def _lock_claim(descriptor: int, target: Path, *, wait: bool) -> None:
    try:
        if lock(descriptor, wait=False):
            return
        who = _maker(descriptor)
        if not wait:
            raise InputError(
                f"{target}: {who} is writing it; wait for its end, or choose another path"
            )
        _log.warning("%s: waiting for %s, which is writing it", target, who)
        lock(descriptor, wait=True)
    except NoLocksError:
        _warn(target)


def _open_claim(path: Path, *, make: bool) -> int:
    """Open the file of a claim.

    Raises:
        ForcingKvError: what is there is another's.
    """
    strange = f"{path}: is no lock of forcing_kv, and in the way; move it away"
    mode = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, mode | (os.O_CREAT if make else 0), 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise ForcingKvError(strange) from error
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        content = os.pread(descriptor, len(_MAGIC), 0)
        if content in (b"", _MAGIC):
            return descriptor
    os.close(descriptor)
    raise ForcingKvError(strange)


def _maker(descriptor: int) -> str:
    """Who has written the file of a claim, as far as it is told."""
    content = os.pread(descriptor, 1000, 0).removeprefix(_MAGIC).decode(errors="replace")
    process, _, command = content.partition(" ")
    return f"process {process} (`{command}`)" if process.isdecimal() else "another process"


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """The right to change a folder; waits for whoever has it, and says so.

    A thread that has it already goes on. The folder may have been replaced meanwhile by another,
    which is then locked: read again what was read before.

    Raises:
        NotADirectoryError: it is none.
    """
    descriptor = _lock_folder(folder)
    if descriptor is None:
        yield
        return
    status = os.fstat(descriptor)
    token = _held.set(_held.get() | {(status.st_dev, status.st_ino)})
    try:
        yield
    finally:
        _held.reset(token)
        os.close(descriptor)


def _lock_folder(folder: Path) -> int | None:
    """The locked folder, open; None where this thread has locked it before."""
    while True:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) in _held.get():
                os.close(descriptor)
                return None
            if not lock(descriptor, wait=False):
                _log.warning("%s: waiting for %s, which is changing it", folder, _holder(status))
                lock(descriptor, wait=True)
        except NoLocksError:
            _warn(folder)
        except BaseException:
            os.close(descriptor)
            raise
        if is_at(descriptor, without_links(folder)):
            return descriptor
        os.close(descriptor)


def _holder(status: os.stat_result) -> str:
    """The process that has locked a file, where the system tells."""
    try:
        lines = Path("/proc/locks").read_text().splitlines()
        (process, *_) = (
            fields[4]
            for fields in map(str.split, lines)
            if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(status.st_ino)
        )
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (OSError, ValueError, IndexError):
        return "another process"
    return f"process {process} (`{_command(words[:-1])}`)"


def _command(words: list[str]) -> str:
    return shlex.join(words).encode("ascii", "backslashreplace").decode()[:300]


def _warn(path: Path) -> None:
    _log.warning(
        "%s: this file system has no locks, so other processes are not kept from writing there; "
        "let one write at a time",
        path,
    )
