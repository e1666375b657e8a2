"""A video decoder on a compiled engine: one CUDA graph a latent frame, no torch.

The state ping-pongs between two sets of buffers, so an engine never reads and writes at one
address. That makes at most three sequences: the first latent frame, from set 0 to 1, and back.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from numpy.typing import NDArray

from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo, TensorInfo
from forcing_kv.runtime_trt.cuda.buffers import BufferSpec, DeviceMemory, MemoryPlan, PinnedMirror
from forcing_kv.runtime_trt.cuda.capture import (
    CapturedGraph,
    capture,
    destroy_all,
    without_collection,
)
from forcing_kv.runtime_trt.cuda.engine import SCRATCH, GraphEngine
from forcing_kv.runtime_trt.cuda.runtime import Cuda
from forcing_kv.runtime_trt.decode.runner import (
    DECODE,
    DECODE_FIRST,
    FRAMES,
    LATENTS,
    DecodeRunner,
    Float32,
    next_state,
    state_inputs,
)
from forcing_kv.runtime_trt.errors import ForcingKvError


def plan_decoder_memory(graphs: Mapping[str, GraphInfo], scratch_nbytes: int) -> MemoryPlan:
    """Lay out every buffer of a decoder.

    Args:
        scratch_nbytes: largest scratch of any graph.
    """

    def spec(name: str, like: TensorInfo) -> BufferSpec:
        return BufferSpec(name, tuple(like.shape), like.dtype)

    inputs = {info.name: info for info in graphs[DECODE].inputs}
    specs = [spec(LATENTS, inputs.pop(LATENTS))]
    for graph, content in graphs.items():
        (frames,) = (info for info in content.outputs if info.name == FRAMES)
        specs.append(spec(_frames_name(graph), frames))
    for state_set in (0, 1):
        specs += [spec(_state_name(name, state_set), info) for name, info in inputs.items()]
    if scratch_nbytes:
        specs.append(BufferSpec(SCRATCH, (scratch_nbytes,), "uint8"))
    return MemoryPlan.of(specs)


def _frames_name(graph: str) -> str:
    return f"{FRAMES}/{graph}"


def _state_name(state: str, state_set: int) -> str:
    return f"{state}/{state_set}"


class GraphDecodeRunner(DecodeRunner):
    """See `DecodeRunner`.

    Args:
        engine: compiled graphs; closed with this runner, or at once if it cannot be opened.
        use_graphs: replay captured graphs; off, every launch is enqueued on its own.

    Raises:
        BackendUnavailableError: not enough device memory.
        ForcingKvError: a launch or a capture failed.
    """

    def __init__(
        self,
        cuda: Cuda,
        engine: GraphEngine,
        graphs: Mapping[str, GraphInfo],
        *,
        use_graphs: bool = True,
    ) -> None:
        self.name = engine.name
        self._cuda, self._engine, self._graphs = cuda, engine, graphs
        self._current = 0
        captured: dict[tuple[str, int], CapturedGraph] = {}
        self.captured_graphs: Mapping[tuple[str, int], CapturedGraph] = captured
        """By graph, and by the set that holds the state before it runs."""
        with ExitStack() as stack:
            stack.callback(engine.close)
            cuda.bind_thread()
            self._stream = cuda.create_stream()
            stack.callback(cuda.destroy_stream, self._stream)
            scratch = max(engine.scratch_nbytes.values(), default=0)
            plan = plan_decoder_memory(graphs, scratch)
            self.memory = DeviceMemory(cuda, plan)
            """Every device buffer, by name."""
            stack.callback(cuda.free, self.memory.base)
            self._upload = PinnedMirror(cuda, plan, [LATENTS])
            stack.callback(cuda.free_host, self._upload.address)
            self._download = PinnedMirror(cuda, plan, [_frames_name(graph) for graph in graphs])
            stack.callback(cuda.free_host, self._download.address)
            stack.callback(destroy_all, cuda, captured)
            # Runs first when the stack unwinds: nothing is freed under work that is on its way.
            stack.callback(cuda.synchronize, self._stream)
            self.memory.clear(cuda, self._stream)
            self._first_run()
            if use_graphs:
                self._capture(captured)
            # Releases when closed, when collected as garbage and at exit, once.
            self._release = weakref.finalize(self, stack.pop_all().close)

    def _variants(self) -> list[tuple[str, int]]:
        first = [(DECODE_FIRST, 0)] if DECODE_FIRST in self._graphs else []
        return [*first, (DECODE, 0), (DECODE, 1)]

    def _first_run(self) -> None:
        """Run every graph once, on zeros, so that no lazy set-up falls into a capture."""
        for graph in self._graphs:
            self._enqueue(graph, 0)
        self._cuda.synchronize(self._stream)

    def _capture(self, captured: dict[tuple[str, int], CapturedGraph]) -> None:
        cuda, stream = self._cuda, self._stream
        with without_collection():
            for graph, current in self._variants():
                work = partial(self._enqueue, graph, current)
                guard = self._engine.capturing(stream)
                base, what = self.memory.base, f"graph {graph}"
                made = capture(cuda, stream, work, guard, base, what)
                captured[graph, current] = made
                made.upload(cuda, stream)
                cuda.synchronize(stream)  # A capture begins on an idle stream.

    def _enqueue(self, graph: str, current: int) -> None:
        """Launch a graph that reads the state in set `current`.

        The first latent frame reads none and begins that set; others write to the other set.
        """
        info, address = self._graphs[graph], self.memory.address
        target = current if graph == DECODE_FIRST else 1 - current
        bindings = {LATENTS: address(LATENTS), FRAMES: address(_frames_name(graph))}
        for state in info.inputs:
            if state.name != LATENTS:
                bindings[state.name] = address(_state_name(state.name, current))
        for output in info.outputs:
            if output.name != FRAMES:
                bindings[output.name] = address(_state_name(next_state(output.name), target))
        if SCRATCH in self.memory.plan.specs:
            bindings[SCRATCH] = address(SCRATCH)
        self._engine.enqueue(graph, bindings, self._stream)

    def _enter(self) -> None:
        """Refuse a closed runner; make the device current in this thread."""
        if not self._release.alive:
            raise ForcingKvError("this decoder is closed; open it again")
        self._cuda.bind_thread()

    def reset(self) -> None:
        self._enter()
        self._current = 0
        names = [_state_name(info.name, 0) for info in state_inputs(self._graphs[DECODE])]
        begin, nbytes = self.memory.plan.span(names)
        self._cuda.fill(self.memory.base + begin, 0, nbytes, self._stream)

    def run(self, graph: str, latents: Float32) -> Float32:
        """Waits for the frames."""
        self._enter()
        cuda, stream, frames = self._cuda, self._stream, _frames_name(graph)
        self._upload.arrays[LATENTS][...] = latents
        target = self.memory.address(LATENTS)
        cuda.copy(target, self._upload.address, self._upload.nbytes, stream)
        if self.captured_graphs:
            self.captured_graphs[graph, self._current].launch(cuda, stream, self.memory.base)
        else:
            self._enqueue(graph, self._current)
        result = self._download.arrays[frames]
        cuda.copy(result.ctypes.data, self.memory.address(frames), result.nbytes, stream)
        cuda.synchronize(stream)
        if graph == DECODE:
            self._current = 1 - self._current
        return result.copy()

    def read_state(self, name: str) -> NDArray[Any]:
        self._enter()
        return self.memory.read(self._cuda, _state_name(name, self._current), self._stream)

    def close(self) -> None:
        self._release()
