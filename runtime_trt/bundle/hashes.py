"""Hashes of files, and files that are opened once: what is loaded is what was hashed.

A name may lead to another file from one moment to the next: a bundle is exported again while it is
opened. So a bundle's folder is opened once, its files are opened below it once, and whatever is
loaded comes out of these open files.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.bundle.atomic.places import without_links
from forcing_kv.runtime_trt.errors import BundleError


def open_regular(path: str | Path, dir_fd: int | None = None) -> BufferedReader:
    """Open a file to read. Never waits, as a named pipe would make one.

    Args:
        path: relative to `dir_fd`, where one is given.

    Raises:
        OSError: missing or not allowed, or a folder, a pipe or a device.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK, dir_fd=dir_fd)

    file: BufferedReader = open(path, "rb", opener=opener)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes, hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(path: Path, sha256: str) -> bool:
    """Whether a file is there and has that hash."""
    return path.is_file() and sha256_of(path) == sha256


def mapped(file: BufferedReader) -> NDArray[np.uint8]:
    """The bytes of an open file where they lie; they stay when the file is closed."""
    if not os.fstat(file.fileno()).st_size:
        return np.empty(0, np.uint8)  # Nothing cannot be mapped.
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def read_piece(file: BufferedReader, offset: int, nbytes: int) -> NDArray[np.uint8]:
    """A copy of a part of an open file, [nbytes], or what there is of it."""
    file.seek(offset)
    content = np.empty(min(nbytes, max(0, os.fstat(file.fileno()).st_size - offset)), np.uint8)
    return content[: file.readinto(content.data)]


@dataclass(frozen=True)
class RecordedFile:
    """What is known of a file before it is opened."""

    sha256: str
    since: str
    """When that was recorded, such as `export`."""
    remedy: str
    """What to do where it differs."""


_Times = tuple[int, int, int]


class HashedFiles:
    """Files below one folder, each opened once and compared with its recorded hash.

    Args:
        folder: opened with this object, so that it stays the same whatever its name leads to later.

    Raises:
        OSError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recorded: Mapping[str, RecordedFile] = {}
        """By path within the folder; no other file is opened."""
        self._files: dict[str, tuple[BufferedReader, _Times]] = {}
        self._root = -1  # None is open, for `close`.
        self._root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def __str__(self) -> str:
        return str(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self, names: Iterable[str]) -> None:
        """Open files and compare their hashes.

        Raises:
            BundleError: one is not recorded, missing, altered, no file, or outside of the folder.
        """
        names = [name for name in dict.fromkeys(names) if name not in self._files]
        opened = {name: self._opened(name) for name in names}
        try:
            for name, file in opened.items():
                # Taken before the bytes are read: what changes them later changes a time too.
                before = _times(file)
                self._compare(name, hashlib.file_digest(file, "sha256").hexdigest())
                self._files[name] = file, before
        finally:
            for name, file in opened.items():
                if name not in self._files:
                    file.close()

    def read(self, name: str) -> bytes:
        """The content of a file, whose hash is that of these very bytes.

        Raises:
            BundleError: see `check`.
        """
        self.check([name])
        file, _ = self._files[name]
        file.seek(0)
        content = file.read()
        self._compare(name, hashlib.sha256(content).hexdigest())
        return content

    def piece(self, name: str, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """A copy of a part of a file; ask `require_unchanged` when all have been read.

        Returns:
            [nbytes].

        Raises:
            BundleError: see `check`; or the file is too short.
        """
        self.check([name])
        content = read_piece(self._files[name][0], offset, nbytes)
        if len(content) != nbytes:
            raise BundleError(
                f"{self.folder / name}: too short, for {nbytes} bytes at {offset} are needed; "
                f"{self.recorded[name].remedy}"
            )
        return content

    def map(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a file where they lie; ask `require_unchanged` when they have been read.

        A file that is cut in place while it is mapped ends the process: for what is too large to
        be copied alone.

        Raises:
            BundleError: see `check`.
        """
        self.check([name])
        return mapped(self._files[name][0])

    def nbytes(self, name: str) -> int:
        """Size of a file.

        Raises:
            BundleError: see `check`.
        """
        self.check([name])
        return os.fstat(self._files[name][0].fileno()).st_size

    def read_unrecorded(self, name: str, limit: int) -> bytes:
        """The content of a file that has no hash, such as the one that holds the hashes.

        Args:
            limit: most bytes that are read; a longer file gives one more.

        Raises:
            OSError: missing, not allowed, or no file.
            BundleError: it is outside of the folder.
        """
        self._require_within(name)
        with open_regular(name, self._root) as file:
            return file.read(limit + 1)

    def is_still_named(self) -> bool:
        """Whether the folder's name leads to the folder that was opened."""
        try:
            named = self.folder.stat()
        except OSError:
            return False
        return os.path.samestat(named, os.fstat(self._root))

    def require_unchanged(self) -> None:
        """Refuse files that were written to since they were compared.

        Raises:
            BundleError: one was.
        """
        for name, (file, before) in self._files.items():
            size, modified, changed = _times(file)
            deleted = os.fstat(file.fileno()).st_nlink == 0  # Which is a change of its own.
            if (size, modified) != before[:2] or (changed != before[2] and not deleted):
                raise BundleError(
                    f"{self.folder / name}: written to while it was loaded; open the bundle again "
                    "when it is finished"
                )

    def close(self) -> None:
        """Close every file; what is mapped stays."""
        for file, _ in self._files.values():
            file.close()
        self._files.clear()
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def _opened(self, name: str) -> BufferedReader:
        path, known = self.folder / name, self.recorded.get(name)
        if known is None:
            raise BundleError(f"{path}: is needed, but no hash of it is recorded; export again")
        try:
            self._require_within(name)
            return open_regular(name, self._root)
        except FileNotFoundError as error:
            raise BundleError(f"{path}: missing; {known.remedy}") from error
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise BundleError(f"{path}: cannot be read ({reason}); {known.remedy}") from error

    def _require_within(self, name: str) -> None:
        """Refuse links that lead out of the folder, but to the blobs of a hub's cache."""
        parts = PurePosixPath(name).parts
        paths = [str(PurePosixPath(*parts[: end + 1])) for end in range(len(parts))]
        if not any(stat.S_ISLNK(os.lstat(path, dir_fd=self._root).st_mode) for path in paths):
            return
        here = Path(f"/proc/self/fd/{self._root}")
        root, target = without_links(here), without_links(here / name)
        if not (target.is_relative_to(root) or target.parent == _hub_blobs(root)):
            raise BundleError(
                f"{self.folder / name}: a link that leads out of the bundle, to {target}; put the "
                "file itself there"
            )

    def _compare(self, name: str, found: str) -> None:
        known = self.recorded[name]
        if found != known.sha256:
            raise BundleError(
                f"{self.folder / name}: altered since {known.since} (sha256 {found[:12]}... found, "
                f"{known.sha256[:12]}... recorded); {known.remedy}"
            )


def _times(file: BufferedReader) -> _Times:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _hub_blobs(root: Path) -> Path | None:
    """Where Hugging Face's cache keeps the files of `…/snapshots/REVISION/…`, if this is one."""
    snapshots = next((path for path in root.parents if path.name == "snapshots"), None)
    return None if snapshots is None else snapshots.parent / "blobs"
