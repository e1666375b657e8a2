"""A video decoder compiled by Inductor for the CPU, call by call.

On CUDA the package is an engine of `decode/graph.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forcing_kv.runtime_trt.bundle.graph_info import TensorInfo
from forcing_kv.runtime_trt.decode.runner import (
    LATENTS,
    Float32,
    StateDecodeRunner,
)
from forcing_kv.runtime_trt.errors import require
from forcing_kv.runtime_trt.inductor.package import InductorPackage

if TYPE_CHECKING:
    from torch import Tensor


class InductorDecodeRunner(StateDecodeRunner):
    """See `DecodeRunner`.

    Args:
        package: the decoder's compiled graphs on the CPU; closed with this runner.
    """

    name = "inductor"

    def __init__(self, package: InductorPackage) -> None:
        super().__init__(package.graphs)
        self._torch = require("torch", extra="inductor")
        self._package = package

    def _zeros(self, info: TensorInfo) -> Tensor:
        return self._torch.zeros(info.shape, dtype=getattr(self._torch, info.dtype))

    def _outputs(self, graph: str, latents: Float32) -> dict[str, Any]:
        with self._torch.inference_mode():
            inputs = {LATENTS: self._torch.from_numpy(latents), **self._state}
            return self._package.run(graph, inputs)

    def close(self) -> None:
        self._package.close()
        super().close()
