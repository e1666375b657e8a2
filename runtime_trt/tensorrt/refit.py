"""Gives a loaded TensorRT engine other weights, by the names that its builder was given."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.dtypes import DTYPES


@dataclass(frozen=True)
class NamedWeight:
    """One weight in host memory."""

    name: str
    dtype: str
    """Name in `DTYPES`."""
    count: int
    """Elements."""
    content: NDArray[np.uint8]
    """Its bytes."""


def refit(trt: Any, engine: Any, logger: Any, weights: Iterable[NamedWeight]) -> str | None:
    """Replace weights of an engine.

    Args:
        trt: TensorRT's module, or that of its lean runtime or of TensorRT-RTX.
        engine: a refittable engine that nothing is running on; changed.

    Returns:
        None if the engine has taken all of them and lacks none, else what does not fit.
    """
    refitter = trt.Refitter(engine, logger)
    read = []  # TensorRT takes addresses, and reads them when it refits.
    for weight in weights:
        read.append(weight.content)
        dtype = getattr(trt.DataType, DTYPES[weight.dtype].tensorrt)
        given = trt.Weights(dtype, weight.content.ctypes.data, weight.count)
        if not refitter.set_named_weights(weight.name, given):
            return f"weight {weight.name} is refused"
    if missing := refitter.get_missing_weights():
        return f"{len(missing)} weights are missing, such as {missing[:3]}"
    return None if refitter.refit_cuda_engine() else "the refit failed"
