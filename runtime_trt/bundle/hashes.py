"""Hashes of files, and the one check of them."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path

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

    file = open(path, "rb", opener=opener)  # noqa: SIM115 - the caller closes it
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


def check_hashes(folder: Path, wanted: Mapping[str, str], since: str, remedy: str) -> None:
    """Compare files with their recorded hashes.

    Args:
        folder: what the names are relative to.
        since: when they were recorded, such as `export`.
        remedy: what to do about a file that differs.

    Raises:
        BundleError: one is missing or altered.
    """
    for file, sha256 in wanted.items():
        path = folder / file
        if not path.is_file():
            raise BundleError(f"{path}: missing; {remedy}")
        if (found := sha256_of(path)) != sha256:
            raise BundleError(
                f"{path}: altered since {since} (sha256 {found[:12]}... found, {sha256[:12]}... "
                f"recorded); {remedy}"
            )
