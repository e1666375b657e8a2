"""Errors that a user of the project can cause and can mend.

A message says where the mistake is, what was found, what is allowed and what to do, in that order
and in plain words, for instance::

    bundle/manifest.json: schema version 7 found, this runtime reads 1 to 3;
    upgrade forcing-kv, or export the bundle again with `fkv export`.

The command line prints such a message without a traceback and exits with code 2. Broken invariants
of our own are asserts, and they do show their traceback.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

EXTRA_OF_MODULE: Mapping[str, str] = MappingProxyType(
    {
        "av": "video",
        "cuda": "trt",
        "diffusers": "vae",
        "ftfy": "text",
        "matplotlib": "calibration",
        "onnx": "export",
        "onnx_ir": "export",
        "onnxruntime": "onnxruntime",
        "onnxscript": "export",
        "PIL": "video",
        "platformdirs": "rtx",
        "polygraphy": "trt",
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
