"""Compiled kernels of TensorRT-RTX, kept between processes.

TensorRT-RTX finishes compiling when a context is made, on the GPU that runs it. Its result is kept
in the user's cache folder, keyed by the engine, so that only the first opening waits for it. The
package itself refuses a cache of another GPU, driver or version.

Kept kernels are native code, so they are read only from a folder and a file that belong to this
user and that nobody else may write, and only if they are whole: an entry begins with a hash of its
key and its content.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forcing_kv.runtime_trt.bundle.atomic.files import write_file
from forcing_kv.runtime_trt.bundle.hashes import open_regular
from forcing_kv.runtime_trt.errors import ForcingKvError, require

CACHE_VARIABLE = "FKV_CACHE_DIR"
"""Environment variable that moves the cache folder; by default that of the platform, on Linux
~/.cache/forcing_kv."""

_DIGEST_NBYTES = hashlib.sha256().digest_size
_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).expanduser().absolute()
    found: Path = require("platformdirs").user_cache_path("forcing_kv", appauthor=False)
    return found


class JitCache:
    """The cache of one engine record.

    Args:
        trt: module of the runtime; only TensorRT-RTX has such a cache.
        files: the engine's files and their hashes, from its record.
    """

    def __init__(self, trt: Any, files: Mapping[str, str]) -> None:
        self.available = hasattr(trt, "IRuntimeCache")
        self._key = hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()
        self._cache: Any = None
        self._kept = b""

    @property
    def path(self) -> Path:
        """Where the entry is kept."""
        return cache_folder() / f"jit-{self._key[:24]}.bin"

    def attach(self, config: Any) -> None:
        """Use one cache for every context; what an earlier process kept is loaded into it."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if content := self._read():
                if self._cache.deserialize(content):
                    self._kept = content
                else:
                    _log.info("%s is of another GPU, driver or version; it is renewed", self.path)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Keep what has been compiled, if it is other than what was loaded."""
        if self._cache is None:
            return
        serialized = self._cache.serialize()
        if serialized is None:
            _log.warning("compiled kernels are not kept: TensorRT-RTX gives none")
            return
        content = bytes(serialized)
        if content == self._kept:
            return
        self._kept = content
        try:
            folder = self.path.parent
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_private(folder.lstat(), folder)
            write_file(self.path, self._hash(content) + content)
            self.path.chmod(0o600)  # Whatever the user's mask leaves to a group.
        except (ForcingKvError, OSError) as error:
            _log.warning("compiled kernels are not kept: %s", error)

    def _read(self) -> bytes:
        """What an earlier process kept; nothing if it is missing or not to be trusted."""
        try:
            _require_private(self.path.parent.lstat(), self.path.parent)
            with open_regular(self.path) as file:
                _require_private(os.fstat(file.fileno()), self.path)
                entry = file.read()
        except FileNotFoundError:
            return b""
        except (ForcingKvError, OSError) as error:
            _log.warning("kept kernels are not used: %s", error)
            return b""
        content = entry[_DIGEST_NBYTES:]
        if entry[:_DIGEST_NBYTES] != self._hash(content):
            _log.warning("kept kernels are not used: %s is damaged; it is renewed", self.path)
            return b""
        return content

    def _hash(self, content: bytes) -> bytes:
        return hashlib.sha256(f"{self._key}\n".encode() + content).digest()


def _require_private(status: os.stat_result, path: Path) -> None:
    """Refuse what another user could have written.

    Raises:
        ForcingKvError: it is another's, open to others, or a link.
    """
    others = stat.S_IWGRP | stat.S_IWOTH
    if stat.S_ISLNK(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & others:
        raise ForcingKvError(
            f"{path}: must belong to this user, be writable by nobody else, and be no link "
            f"(owner {status.st_uid}, mode {stat.filemode(status.st_mode)}); `chmod go-w` it, or "
            f"name another folder in {CACHE_VARIABLE}"
        )
