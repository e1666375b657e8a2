"""Backends, and the choice among them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from forcing_kv.runtime_trt.backends.base import Backend
from forcing_kv.runtime_trt.errors import BackendUnavailableError, InputError
from forcing_kv.runtime_trt.manifest import check_files, read_manifest

BACKENDS = ("onnxruntime",)
"""Every backend that can open a bundle, best first."""


def available_backends() -> dict[str, str | None]:
    """Why each backend cannot run here, or None where it can."""
    missing = importlib.util.find_spec("onnxruntime") is None
    return {
        "onnxruntime": "the Python package onnxruntime is not installed; "
        "pip install 'forcing-kv[onnxruntime]'"
        if missing
        else None
    }


def choose_backend(wanted: str) -> str:
    """Resolve `auto` to the best backend that is present.

    Raises:
        InputError: no such backend.
        BackendUnavailableError: it, or every backend, cannot run here.
    """
    if wanted != "auto" and wanted not in BACKENDS:
        raise InputError(f"backend {wanted!r} is unknown; choose auto or one of {list(BACKENDS)}")
    reasons = available_backends()
    candidates = BACKENDS if wanted == "auto" else (wanted,)
    for name in candidates:
        if reasons[name] is None:
            return name
    raise BackendUnavailableError("; ".join(f"{name}: {reasons[name]}" for name in candidates))


def open_backend(
    bundle: str | os.PathLike[str], backend: str = "auto", *, num_threads: int = 0
) -> Backend:
    """Check a bundle and open it on a backend.

    Raises:
        BundleError: the bundle is missing, altered, or of another version.
        BackendUnavailableError: the backend cannot run here.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    choose_backend(backend)
    from forcing_kv.runtime_trt.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(folder, manifest, num_threads)
