"""A video decoder compiled by Inductor for the CPU, call by call.

On CUDA the package is an engine of `decode_graph`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from forcing_kv.runtime_trt.decode.runner import (
    DECODE,
    FRAMES,
    LATENTS,
    DecodeRunner,
    Float32,
    next_state,
    state_inputs,
)
from forcing_kv.runtime_trt.errors import require
from forcing_kv.runtime_trt.inductor.package import InductorPackage

if TYPE_CHECKING:
    from torch import Tensor


class InductorDecodeRunner(DecodeRunner):
    """See `DecodeRunner`.

    Args:
        package: the decoder's compiled graphs on the CPU; closed with this runner.
    """

    name = "inductor"

    def __init__(self, package: InductorPackage) -> None:
        self._torch = require("torch", extra="inductor")
        self._package = package
        self._state: dict[str, Tensor] = {}

    def reset(self) -> None:
        torch = self._torch
        self._state = {
            info.name: torch.zeros(info.shape, dtype=getattr(torch, info.dtype))
            for info in state_inputs(self._package.graphs[DECODE])
        }

    def run(self, graph: str, latents: Float32) -> Float32:
        with self._torch.inference_mode():
            inputs = {LATENTS: self._torch.from_numpy(latents), **self._state}
            made = self._package.run(graph, inputs)
            frames: Float32 = made.pop(FRAMES).numpy()
        self._state |= {next_state(name): value for name, value in made.items()}
        return frames

    def read_state(self, name: str) -> NDArray[Any]:
        copied: NDArray[Any] = self._state[name].numpy().copy()
        return copied

    def close(self) -> None:
        self._package.close()
        self._state.clear()
