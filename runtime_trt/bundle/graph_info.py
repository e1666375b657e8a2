"""What is recorded of a graph: its file, its hash, its inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass

from forcing_kv.runtime_trt.bundle.fields import BundlePath, Extent, Sha256, Text
from forcing_kv.runtime_trt.dtypes import DTYPES
from forcing_kv.runtime_trt.errors import InputError


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a graph.

    Raises:
        InputError: there is no such dtype.
    """

    name: Text
    shape: tuple[Extent, ...]
    dtype: str
    """Name in `DTYPES`."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"{self.name}: dtype is {self.dtype!r}; allowed are {list(DTYPES)}")


@dataclass(frozen=True)
class GraphInfo:
    """One exported graph, or the engine of one."""

    file: BundlePath
    sha256: Sha256
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
