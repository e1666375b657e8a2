"""Files and folders that appear whole or not at all.

What is being made stands beside its target under a hidden name that nobody can foresee
(`atomic/places.py`), so that two writers never share it and no link can lie in wait there. It takes
the target's place by one rename, and is removed on any error, an interruption included. It is
locked (`atomic/locks.py`) for as long as its maker lives: what a killed process has left is not,
and goes when the next one writes to the same folder.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from forcing_kv.runtime_trt.bundle.atomic.locks import (
    NoLocksError,
    is_at,
    lock,
    locked_folder,
    remove_dead_claim,
)
from forcing_kv.runtime_trt.bundle.atomic.places import (
    CLAIM,
    LITTER,
    MARK,
    OLD,
    exchange,
    hidden,
    made_parents,
    naming,
    place,
    surely,
    target_of,
    without_links,
)
from forcing_kv.runtime_trt.errors import InputError

_log = logging.getLogger(__name__)


def check_folder(folder: Path, option: str = "--out") -> None:
    """Refuse a folder that can neither be written nor made.

    Args:
        folder: where something is to be written.
        option: the option that names it.

    Raises:
        InputError: it, or the nearest folder above it that exists, is none or is not writable.
    """
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise InputError(f"{folder}: {above} is not a writable folder; choose another {option}")


def check_file(
    path: Path,
    suffixes: Sequence[str] = (),
    option: str = "",
    *,
    force: bool = False,
    make_folder: bool = False,
) -> None:
    """Refuse an output file that cannot be written, or that is in the way.

    Args:
        path: the file.
        suffixes: those that are allowed; none: any.
        option: the flag that names it, if that is to be told.
        force: whether it may exist.
        make_folder: whether its folder is made where it is missing.

    Raises:
        InputError: unknown suffix, missing folder, no permission, or an earlier file.
    """
    where = f"{option} {path}".strip()
    if path.is_dir():
        raise InputError(f"{where}: is a folder; name a file")
    if suffixes and path.suffix not in suffixes:
        raise InputError(f"{where}: suffix {path.suffix!r}; give {' or '.join(suffixes)}")
    if make_folder:
        check_folder(path.absolute().parent, option or "path")
    elif not path.parent.is_dir():
        raise InputError(f"{where}: {path.parent} is no folder; make it first")
    if os.path.lexists(path) and not force:
        raise InputError(f"{where}: exists already; choose another path or give --force")
    if path.exists() and not path.is_file():
        raise InputError(f"{where}: is no plain file; choose another path")
    if path.parent.is_dir() and not os.access(path.parent, os.W_OK):
        raise InputError(f"{where}: cannot be written; choose another path")


def check_names(folder: Path, names: Sequence[str], *, force: bool) -> None:
    """Refuse a folder that cannot be filled with files of these names.

    Args:
        force: whether they may be there.

    Raises:
        InputError: one exists, or the folder cannot be written.
    """
    existing = [str(folder / name) for name in names if os.path.lexists(folder / name)]
    if existing and not force:
        raise InputError(f"{existing} exist; choose another --out, or overwrite with --force")
    check_folder(folder)


@contextmanager
def replaced_file(path: Path, *, force: bool = True) -> Iterator[BinaryIO]:
    """An open file that takes the place of `path` if the block ends well.

    Its `name` is the path at which it stands until then. A link at `path` is replaced itself.

    Args:
        force: replace what is there then; otherwise that is an error.

    Raises:
        ForcingKvError: it cannot be made, written or moved; names `path`.
    """
    with naming(path), _private(path) as (temporary, descriptor):
        # Closing it may fail, and must before the rename; `descriptor` keeps the lock.
        with open(temporary, "wb", opener=lambda *_: os.dup(descriptor)) as file:
            yield file
        _put_file(temporary, path, force=force)


@contextmanager
def partial_file(path: Path) -> Iterator[BinaryIO]:
    """An open file beside `path` that is gone after the block: what `path` is to be made of."""
    with (
        naming(path),
        _private(path) as (temporary, descriptor),
        open(temporary, "wb", opener=lambda *_: os.dup(descriptor)) as file,
    ):
        yield file


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


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, whole or not at all, however many processes do so.

    Args:
        line: without its end.

    Raises:
        ForcingKvError: it cannot be written; names `path`.
    """
    content = f"{line}\n".encode()
    with naming(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            with suppress(NoLocksError):
                lock(descriptor, wait=True)
            nbytes = os.fstat(descriptor).st_size
            try:
                if os.write(descriptor, content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            except BaseException:
                os.ftruncate(descriptor, nbytes)
                raise
        finally:
            os.close(descriptor)


@contextmanager
def replaced_folder(target: Path, *, force: bool = True) -> Iterator[Path]:
    """A new folder that takes the place of `target` if the block ends well.

    A link at `target` stays, and what it points to is replaced. Folders above it are made.

    Args:
        force: replace what is there then; otherwise that is an error.

    Raises:
        ForcingKvError: it cannot be made, written or moved; names `target`.
    """
    target = without_links(target)
    with naming(target), made_parents(target), _private(target, folder=True) as (temporary, _):
        yield temporary
        _put_folder(temporary, target, force=force)


@contextmanager
def filled_folder(folder: Path, *, force: bool) -> Iterator[Path]:
    """A new folder whose entries appear in `folder` if the block ends well.

    Where there is no such folder they do so together, otherwise one after another.

    Args:
        force: replace entries that are there then; otherwise that is an error.

    Raises:
        ForcingKvError: it cannot be made, written or moved; names `folder`.
    """
    folder = without_links(folder)
    beside = folder / "content" if folder.exists() else folder
    with naming(folder), made_parents(folder), _private(beside, folder=True) as (temporary, _):
        yield temporary
        if beside == folder:
            with suppress(FileExistsError):
                place(temporary, folder)
                return
        entries = sorted(temporary.iterdir())
        check_names(folder, [entry.name for entry in entries], force=force)
        for entry in entries:
            put = _put_folder if entry.is_dir() else _put_file
            put(entry, folder / entry.name, force=force)


@contextmanager
def scratch_folder(beside: Path | None = None) -> Iterator[Path]:
    """A private folder for the block.

    Unlike one of `tempfile`, what a killed process leaves of it is removed by the next.

    Args:
        beside: path beside which it stands; None: where the system keeps what is temporary.
    """
    beside = Path(tempfile.gettempdir()) / "forcing_kv" if beside is None else beside
    with _private(beside, folder=True, mode=0o700) as (temporary, _):
        yield temporary


def remove_litter(folder: Path) -> None:
    """Remove what killed processes have left in a folder while they were writing to it.

    What such a process had put aside and not yet replaced is put back. Nothing is touched that has
    not a hidden name of ours, belongs to another user, or is locked by a process that lives.
    """
    try:
        names = [entry.name for entry in os.scandir(folder) if LITTER.fullmatch(entry.name)]
    except OSError:
        return  # Whoever writes there will be told.
    for name in names:
        with suppress(OSError, NoLocksError):
            _remove_dead(folder / name)


def _remove_dead(path: Path) -> None:
    if path.name.endswith(MARK + CLAIM):
        remove_dead_claim(path)
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        known = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
        if not known or status.st_uid != os.geteuid() or not lock(descriptor, wait=False):
            return
        if not is_at(descriptor, path):
            return
        if path.name.endswith(OLD):
            with suppress(FileExistsError):
                place(path, target_of(path))
                _log.warning("%s: put back; it was being replaced when that ended", target_of(path))
                return
        _remove(path)
    finally:
        os.close(descriptor)


@contextmanager
def _private(
    target: Path, *, folder: bool = False, mode: int = 0o777
) -> Iterator[tuple[Path, int]]:
    """A new file or folder beside `target`, and its descriptor, which holds its lock.

    After the block it is removed, or what was put in its place.
    """
    remove_litter(target.parent)
    temporary, made = hidden(target), True
    descriptor = -1
    try:
        try:
            descriptor = _make(temporary, folder=folder, mode=mode)
        except FileExistsError:
            made = False  # Another's.
            raise
        yield temporary, descriptor
    finally:
        if made:
            surely(lambda: _remove(temporary))
        if descriptor >= 0:
            os.close(descriptor)


def _make(path: Path, *, folder: bool, mode: int) -> int:
    """Make a file or folder that is not there yet, with the rights that the user's mask leaves."""
    kind = os.O_DIRECTORY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL
    while True:
        if folder:
            path.mkdir(mode)
        try:
            descriptor = os.open(path, kind | os.O_NOFOLLOW | os.O_CLOEXEC, mode & 0o666)
        except FileNotFoundError:
            if folder:
                continue  # Taken for litter before it was locked.
            raise
        with suppress(NoLocksError):
            lock(descriptor, wait=True)
        if is_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # As above.


def _put_file(temporary: Path, path: Path, *, force: bool) -> None:
    """Rename a file to where it belongs."""
    if force:
        temporary.replace(path)
        return
    try:
        place(temporary, path)
    except FileExistsError as error:
        raise _appeared(path) from error


def _put_folder(temporary: Path, target: Path, *, force: bool) -> None:
    """Rename a folder to where it belongs; the one that was there has its name then."""
    while True:
        try:
            place(temporary, target)
        except FileExistsError as error:
            if not force:
                raise _appeared(target) from error
        else:
            return
        with suppress(FileNotFoundError), locked_folder(target):
            exchange(temporary, target)
            return


def _appeared(path: Path) -> InputError:
    return InputError(
        f"{path}: has appeared meanwhile, and is left as it is; choose another path or give --force"
    )


def _remove(path: Path) -> None:
    """Remove a file or folder that may be gone."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.warning("%s: cannot be removed: %s; remove it", path, error.strerror)
