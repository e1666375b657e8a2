"""Compiled kernels of TensorRT-RTX, kept between processes.

TensorRT-RTX finishes compiling when a context is made, on the GPU that runs it. Its result is kept
in the user's cache folder, keyed by the engine, so that only the first opening waits for it. The
package itself refuses a cache of another GPU, driver or version.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forcing_kv.runtime_trt.bundle.files import write_file
from forcing_kv.runtime_trt.errors import ForcingKvError

CACHE_VARIABLE = "FKV_CACHE_DIR"
"""Environment variable that moves the cache folder; by default ~/.cache/forcing_kv."""

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get(CACHE_VARIABLE, f"{home}/forcing_kv")).expanduser()


class JitCache:
    """The cache of one engine record.

    Args:
        trt: module of the runtime; only TensorRT-RTX has such a cache.
        files: the engine's files and their hashes, from its record.
    """

    def __init__(self, trt: Any, files: Mapping[str, str]) -> None:
        self.available = hasattr(trt, "IRuntimeCache")
        key = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
        self.path = cache_folder() / f"jit-{key[:24]}.bin"
        self._cache: Any = None
        self._loaded_nbytes = 0

    def attach(self, config: Any) -> None:
        """Use one cache for every context; what an earlier process kept is loaded into it."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self.path.is_file():
                content = self.path.read_bytes()
                if self._cache.deserialize(content):
                    self._loaded_nbytes = len(content)
                else:
                    _log.info("%s is of another GPU, driver or version; it is renewed", self.path)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Keep what has been compiled, if it is more than was loaded."""
        if self._cache is None:
            return
        content = bytes(self._cache.serialize())
        if len(content) == self._loaded_nbytes:
            return
        self._loaded_nbytes = len(content)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, content)
        except (ForcingKvError, OSError) as error:
            _log.warning("compiled kernels are not kept: %s", error)
