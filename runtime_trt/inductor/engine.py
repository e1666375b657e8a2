"""An Inductor package as an engine of the chunk-graph runtime, on CUDA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from forcing_kv.runtime_trt.bundle.graph_info import TensorInfo
from forcing_kv.runtime_trt.dtypes import DTYPES
from forcing_kv.runtime_trt.errors import require
from forcing_kv.runtime_trt.inductor.package import InductorPackage

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _DeviceArray:
    """Device memory of the runtime, shown to torch without a copy.

    The CUDA array interface has numpy's dtypes: bfloat16 goes as its bits.
    """

    address: int
    info: TensorInfo

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.info.shape,
            "typestr": np.dtype(DTYPES[self.info.dtype].numpy).str,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }


class InductorEngine:
    """See `GraphEngine`. Results are copied to where the runtime wants them, or stay.

    Args:
        package: compiled graphs on a CUDA device; closed with this engine.
    """

    name = "inductor"

    def __init__(self, package: InductorPackage) -> None:
        self._torch = require("torch", extra="inductor")
        self._package = package
        # Captured allocations stay reserved for the replays as long as this engine lives. A pool is
        # one of the current device, whichever it is used on.
        with self._torch.cuda.device(package.device):
            self._pool = self._torch.cuda.MemPool()
        self._views: dict[tuple[int, str], Tensor] = {}
        self._held: list[Tensor] = []
        self.placed: dict[str, int] = {}
        """See `GraphEngine`."""

    @property
    def scratch_nbytes(self) -> Mapping[str, int]:
        """None: the package allocates for itself."""
        return MappingProxyType({})

    def enqueue(self, graph: str, bindings: Mapping[str, int], stream: int) -> None:
        torch, info = self._torch, self._package.graphs[graph]
        self._held.clear()
        self.placed.clear()
        external = torch.cuda.ExternalStream(stream, device=self._package.device)
        with torch.inference_mode(), torch.cuda.stream(external):
            inputs = {port.name: self._view(port, bindings[port.name]) for port in info.inputs}
            outputs = self._package.run(graph, inputs)
            for port in info.outputs:
                if port.name in bindings:
                    self._view(port, bindings[port.name]).copy_(outputs[port.name])
                else:
                    self._held.append(outputs[port.name].contiguous())
                    self.placed[port.name] = self._held[-1].data_ptr()

    def _view(self, info: TensorInfo, address: int) -> Tensor:
        key = (address, info.name)
        if key not in self._views:
            torch = self._torch
            view: Tensor = torch.as_tensor(_DeviceArray(address, info), device=self._package.device)
            self._views[key] = view.view(getattr(torch, info.dtype))
        return self._views[key]

    @contextmanager
    def capturing(self, stream: int) -> Iterator[None]:
        """See `GraphEngine`: allocations come from a pool of this engine."""
        torch = self._torch
        device = self._package.device
        with torch.cuda.device(device), torch.cuda.use_mem_pool(self._pool, device):
            yield

    def sibling(self) -> InductorEngine:
        return InductorEngine(self._package.sibling())

    def close(self) -> None:
        self._views.clear()
        self._held.clear()
        self._package.close()
