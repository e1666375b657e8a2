"""Output folders are checked before the work whose result they are to hold."""

from __future__ import annotations

import os
from pathlib import Path

from forcing_kv.runtime_trt.errors import InputError


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
