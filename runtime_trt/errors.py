"""Errors that a user of the project can cause and can mend.

A message says where the mistake is, what was found, what is allowed and what to do, in that order
and in plain words, for instance::

    bundle/manifest.json: schema version 7 found, this runtime reads 1 to 3;
    upgrade forcing-kv, or export the bundle again with `fkv export`.

The command line prints such a message without a traceback and exits with code 2. Broken invariants
of our own are asserts, and they do show their traceback.
"""

from __future__ import annotations

import errno
import importlib
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

EXTRA_OF_MODULE: Mapping[str, str] = MappingProxyType(
    {
        "av": "video",
        "cuda": "trt",
        "diffusers": "vae",
        "ftfy": "text",
        "gguf": "gguf",
        "matplotlib": "calibration",
        "onnx": "export",
        "onnx_ir": "export",
        "onnxruntime": "onnxruntime",
        "onnxscript": "export",
        "PIL": "video",
        "platformdirs": "rtx",
        "polygraphy": "trt",
        "pynvml": "bench",
        "safetensors": "export",
        "sentencepiece": "text",
        "sklearn": "train",
        "tensorrt": "trt",
        "tensorrt_rtx": "rtx",
        "torch": "export",
        "transformers": "text",
        "triton": "plugins",
    }
)
"""Import name of every optional dependency → the extra of `forcing-kv` that installs it."""


_SHOWN = 60
"""Characters of a wrong value in a message."""
REMEDIES: Mapping[int, str] = MappingProxyType(
    {
        errno.EACCES: "check its permissions, or choose another place",
        errno.EAGAIN: "the system is short of processes or memory; try again",
        errno.EBUSY: "the system uses it, perhaps as a mount point; choose another place",
        errno.EDQUOT: "free some, or choose another disk",
        errno.EFBIG: "choose another file system, or raise `ulimit -f`",
        errno.EIO: "the disk does not answer as it should; check it, or choose another",
        errno.EISDIR: "name a file",
        errno.ELOOP: "its links lead in a circle; name the file itself",
        errno.EMFILE: "raise `ulimit -n`",
        errno.ENAMETOOLONG: "choose a shorter one",
        errno.ENFILE: "close other programs",
        errno.ENODEV: "choose another place",
        errno.ENOMEM: "close other programs, or use a machine with more memory",
        errno.ENOSPC: "free some, or choose another disk",
        errno.ENOTCONN: "mount the file system again",
        errno.ENOTDIR: "a part of the path is a file; choose another path",
        errno.ENOTEMPTY: "choose another path",
        errno.ENXIO: "choose a file",
        errno.EPERM: "check its permissions, or choose another place",
        errno.EROFS: "choose a place that can be written",
        errno.ESTALE: "the file system has lost it; try again",
        errno.ETXTBSY: "a program that runs uses it; end that first",
    }
)
"""What to do about errors of the system that are no defect of ours."""


def explained(error: OSError) -> str:
    """What the system says, and what to do about it, where that is known."""
    said = error.strerror or str(error) or type(error).__name__
    remedy = REMEDIES.get(error.errno or 0)
    return said if remedy is None else f"{said}; {remedy}"


class ForcingKvError(Exception):
    """Base of all errors that a user can cause; the message is meant for that user."""


class InputError(ForcingKvError, ValueError):
    """A given value is wrong: an option, a configuration key, or an array's shape or content."""


class BundleError(ForcingKvError):
    """A bundle is missing, incomplete, altered, or made for another version or environment."""


class BackendUnavailableError(ForcingKvError):
    """The chosen backend cannot run here: no driver, no device, no engine, wrong version."""


class NonFiniteError(ForcingKvError):
    """What was computed holds NaN or infinities: nothing that could be shown."""


class MissingDependencyError(ForcingKvError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


def unknown_name(what: str, given: object, known: Collection[str]) -> InputError:
    """The error for a name that is none of the known ones: the near ones first, then all.

    Args:
        what: what is named, such as `device`.
        given: the name that was given; anything, for it may be no text at all.
        known: every name that there is.
    """
    plain = {name.lower(): name for name in known}
    text = given[:_SHOWN].lower() if isinstance(given, str) else ""
    near = get_close_matches(text, plain, 2)
    hint = f"did you mean {' or '.join(plain[name] for name in near)}? " if near else ""
    return InputError(f"{what} {shown(given)} is unknown; {hint}choose one of {list(known)}")


def shown(value: object) -> str:
    """A wrong value as messages show it: on one line, control characters escaped, cut if long."""
    try:
        text = repr(value)
    except Exception:  # A class's own; what is told must not fail.
        text = f"an object of {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class StateGuard:
    """Remembers that a call failed half-way and left a state that nobody may use.

    Args:
        message: what to tell whoever uses it all the same, and how to begin again.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        self._valid = True

    @contextmanager
    def changing(self, *harmless: type[BaseException]) -> Iterator[None]:
        """Holds while the state is changed; what is raised leaves it invalid, unless `harmless`."""
        try:
            yield
        except BaseException as error:
            self._valid = self._valid and isinstance(error, harmless)
            raise

    def renew(self) -> None:
        """The state has been made anew."""
        self._valid = True

    def require_valid(self) -> None:
        """Raises `ForcingKvError` where a call failed since the state was made."""
        if not self._valid:
            raise ForcingKvError(self._message)


class Turn:
    """Lets one call at a time in, and tells the others which one that is. Never waits.

    Args:
        what: what serves one call at a time, such as `session`.
        remedy: what to do instead, for the message.
    """

    def __init__(self, what: str, remedy: str) -> None:
        self._what, self._remedy = what, remedy
        self._lock = threading.Lock()
        self._call, self._thread = "", 0

    @contextmanager
    def of(self, call: str) -> Iterator[None]:
        """Holds while `call` runs.

        Raises:
            ForcingKvError: another call has not returned yet; it is not disturbed.
        """
        if not self._lock.acquire(blocking=False):
            mine = self._thread == threading.get_ident()
            raise ForcingKvError(
                f"{'this' if mine else 'another'} thread is in {self._call}, and a {self._what} "
                f"serves one call at a time; nothing was changed: {self._remedy}"
            )
        self._call, self._thread = call, threading.get_ident()
        try:
            yield
        finally:
            self._lock.release()


def missing_dependency(module: str, *, extra: str | None = None) -> MissingDependencyError:
    """Returns the error that tells how to install an optional dependency.

    Args:
        module: Import name, dotted or not, such as `onnxruntime` or `cuda.bindings`.
        extra: Extra of `forcing-kv` that installs it; by default the one in `EXTRA_OF_MODULE`.
    """
    distribution = module.partition(".")[0]
    extra = extra or EXTRA_OF_MODULE[distribution]
    return MissingDependencyError(
        f"this needs the Python module `{module}`, which is not installed; "
        f"install it with: pip install 'forcing-kv[{extra}]'",
        name=module,
    )


def require(module: str, *, extra: str | None = None) -> Any:
    """Imports an optional dependency and returns its module.

    Args:
        module: Import name, dotted or not, of a module listed in `EXTRA_OF_MODULE`.
        extra: Extra to name in the error where the usual one would mislead, such as `rtx` for
            `cuda.bindings` in the TensorRT-RTX backend.

    Raises:
        MissingDependencyError: It is not installed, or it is installed and cannot be loaded.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise missing_dependency(module, extra=extra) from error
    except ImportError as error:
        raise MissingDependencyError(
            f"the Python module `{module}` is installed but does not load ({error}); "
            f"repair or reinstall it",
            name=module,
        ) from error
