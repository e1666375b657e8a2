"""Backends, and the choice among them."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

from forcing_kv.runtime_trt.backends.base import Backend
from forcing_kv.runtime_trt.bundle.manifest import Bundle, load_whole
from forcing_kv.runtime_trt.errors import (
    BackendUnavailableError,
    MissingDependencyError,
    missing_dependency,
    unknown_name,
)
from forcing_kv.runtime_trt.rollout.arguments import check_threads, file_path, yes_or_no
from forcing_kv.runtime_trt.tensorrt.flavours import FLAVOURS

BACKENDS = ("tensorrt", "tensorrt-lean", "tensorrt-rtx", "inductor", "onnxruntime")
"""Every backend that can open a bundle, best first."""

_MODULES = {name: (flavour.module, flavour.extra) for name, flavour in FLAVOURS.items()} | {
    "inductor": ("torch", "inductor"),
    "onnxruntime": ("onnxruntime", "onnxruntime"),
}

_log = logging.getLogger(__name__)


def available_backends() -> dict[str, str | None]:
    """What each backend lacks on this machine, whatever the bundle; None where it is installed."""
    return {
        name: None
        if importlib.util.find_spec(module) is not None
        else str(missing_dependency(module, extra=extra))
        for name, (module, extra) in _MODULES.items()
    }


def choose_backend(wanted: str, bundle: Path | None = None) -> tuple[str, str]:
    """Resolve `auto` to the best backend that can run here.

    Args:
        wanted: a backend's name, or auto.
        bundle: bundle to run, which must hold an engine for the backends that need one; without it
            only what is installed counts.

    Returns:
        The backend, and why it is the one.

    Raises:
        InputError: no such backend.
        BackendUnavailableError: it, or every backend, cannot run here; says why each cannot.
        BundleError: what a backend would run is missing or altered.
    """
    _check_name(wanted)
    if bundle is None:
        return _choose(wanted, None)
    with Bundle(bundle) as opened:
        return _choose(wanted, opened)


def _choose(wanted: str, bundle: Bundle | None) -> tuple[str, str]:
    installed = available_backends()
    passed_over: list[str] = []
    for name in BACKENDS if wanted == "auto" else (wanted,):
        reason = installed[name]
        if reason is None and bundle is not None:
            reason = _unusable(name, bundle)
        if reason is None:
            why = "asked for" if wanted != "auto" else "the best that can run here"
            return name, "; ".join([why, *passed_over])
        passed_over.append(f"{name}: {reason}")
    raise BackendUnavailableError("; ".join(passed_over))


def _check_name(wanted: str) -> None:
    if not isinstance(wanted, str) or wanted not in ("auto", *BACKENDS):
        raise unknown_name("backend", wanted, ("auto", *BACKENDS))


def _unusable(name: str, bundle: Bundle) -> str | None:
    """Why a backend that is installed cannot run this bundle here, or None.

    What is altered is an error, though another backend could do without: whoever has altered one
    file may have altered more.
    """
    manifest = bundle.manifest
    try:
        if name in FLAVOURS:
            from forcing_kv.runtime_trt.tensorrt.open import checked_record

            checked_record(bundle, name)
        elif name == "inductor":
            from forcing_kv.runtime_trt.inductor.open import checked_inductor_record

            checked_inductor_record(bundle)
        elif manifest.config.dtype == "bfloat16":
            return "it does not run bfloat16 on the CPU; export with --dtype float32"
    except (BackendUnavailableError, MissingDependencyError) as error:
        return str(error)
    return None


def open_backend(
    bundle: str | os.PathLike[str],
    backend: str = "auto",
    *,
    digest: str | None = None,
    num_threads: int = 0,
    use_graphs: bool = True,
) -> Backend:
    """Check a bundle and open it on a backend.

    Args:
        bundle: directory written by `fkv export`.
        backend: a backend's name, or auto.
        digest: what `fkv export` or `fkv inspect` printed, such as `sha256:0a1b…`; a bundle with
            another is refused before any of it is loaded. None takes any.
        num_threads: CPU threads for backends that run there, at most eight for each CPU of the
            machine; 0 leaves the choice to them.
        use_graphs: replay one captured CUDA graph a chunk, for backends that can.

    Raises:
        InputError: an argument of another type or out of range, no such backend, or `digest` is
            none.
        BundleError: the bundle is missing, altered, of another version or of another digest.
        BackendUnavailableError: the backend cannot run here.
    """
    folder = file_path("bundle", bundle)
    _check_name(backend)
    num_threads, use_graphs = check_threads(num_threads), yes_or_no("use_graphs", use_graphs)

    def load(opened: Bundle) -> Backend:
        opened.check_graphs()
        name, why = _choose(backend, opened if backend == "auto" else None)
        found = _open(name, opened, num_threads, use_graphs)
        found.chosen_because = why
        _log.info("%s runs on %s: %s", opened, name, why)
        return found

    return load_whole(folder, digest, load)


def _open(name: str, bundle: Bundle, num_threads: int, use_graphs: bool) -> Backend:
    if name in FLAVOURS:
        from forcing_kv.runtime_trt.tensorrt.open import open_tensorrt

        return open_tensorrt(bundle, name, use_graphs=use_graphs)
    if name == "inductor":
        from forcing_kv.runtime_trt.inductor.open import (
            checked_inductor_record,
            open_package,
            package_backend,
        )

        package = open_package(bundle, checked_inductor_record(bundle))
        return package_backend(bundle.manifest.config, package, use_graphs=use_graphs)
    from forcing_kv.runtime_trt.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(bundle, num_threads)
