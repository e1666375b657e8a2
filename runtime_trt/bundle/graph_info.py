"""What is recorded of a graph: its file, its hash, its inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass

from forcing_kv.runtime_trt.dtypes import DTYPES
from forcing_kv.runtime_trt.errors import InputError


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a graph.

    Raises:
        InputError: there is no such dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Name in `DTYPES`."""

    def __post_init__(self) -> None:
        if self.dtype == "float":  # Bundles of 2026 have ONNX's word for it.
            object.__setattr__(self, "dtype", "float32")
        if self.dtype not in DTYPES:
            raise InputError(f"{self.name}: dtype is {self.dtype!r}; allowed are {list(DTYPES)}")


@dataclass(frozen=True)
class GraphInfo:
    """One exported graph, or the engine of one."""

    file: str
    """Path within the bundle."""
    sha256: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
