"""What runs the graphs of a video decoder and holds its state.

A causal video decoder keeps the last activations of its convolutions. They are inputs and outputs
of the graph, so decoding a stream equals decoding the whole clip.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo, TensorInfo
from forcing_kv.runtime_trt.rollout.ports import split_name

Float32 = NDArray[np.float32]

LATENTS, FRAMES = "latents", "frames"
STATE, NEW_STATE = "state", "new_state"
"""`state.i` goes into a decode graph, `new_state.i` comes out."""
DECODE, DECODE_FIRST = "decode", "decode_first"
"""The graph of every latent frame, and that of the first one where it is special."""


class DecodeRunner(ABC):
    """Runs a decoder's graphs and keeps its state."""

    name: str
    """Backend name, as users type it."""

    @abstractmethod
    def reset(self) -> None:
        """Make every state zero."""

    @abstractmethod
    def run(self, graph: str, latents: Float32) -> Float32:
        """Decode one latent frame and keep the new state.

        Args:
            graph: `decode`, or `decode_first`, which leaves the states that it does not return.
            latents: [1, C, h, w] float32.

        Returns:
            [k, 3, height, width] float32, of which 0..1 is to be shown, an array of the caller's.
        """

    @abstractmethod
    def read_state(self, name: str) -> NDArray[Any]:
        """A copy of `state.i` as it is now (for checks)."""

    @abstractmethod
    def close(self) -> None:
        """Release everything; may be called twice."""


class StateDecodeRunner(DecodeRunner):
    """Keeps the state between calls, as arrays of its backend's own."""

    def __init__(self, graphs: Mapping[str, GraphInfo]) -> None:
        self._graphs = graphs
        self._state: dict[str, Any] = {}

    @abstractmethod
    def _zeros(self, info: TensorInfo) -> Any:
        """A state before any frame."""

    @abstractmethod
    def _outputs(self, graph: str, latents: Float32) -> dict[str, Any]:
        """Run a graph over `_state`; its outputs by name."""

    def _to_host(self, array: Any) -> NDArray[Any]:
        return array.numpy()

    def reset(self) -> None:
        states = state_inputs(self._graphs[DECODE])
        self._state = {info.name: self._zeros(info) for info in states}

    def run(self, graph: str, latents: Float32) -> Float32:
        made = self._outputs(graph, latents)
        frames = self._to_host(made.pop(FRAMES))
        self._state |= {next_state(name): value for name, value in made.items()}
        return frames

    def read_state(self, name: str) -> NDArray[Any]:
        return self._to_host(self._state[name]).copy()

    def close(self) -> None:
        self._state.clear()


def state_inputs(graph: GraphInfo) -> tuple[TensorInfo, ...]:
    """The states that a decode graph takes."""
    return tuple(info for info in graph.inputs if split_name(info.name)[0] == STATE)


def next_state(name: str) -> str:
    """The input that an output `new_state.i` becomes."""
    return name.replace(NEW_STATE, STATE)
