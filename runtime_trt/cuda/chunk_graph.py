"""One CUDA graph per chunk, over any compiled engine."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import islice, pairwise
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.backends.base import (
    Backend,
    ChunkPositions,
    ChunkRequest,
    ChunkResult,
    Float32,
    PendingChunk,
    StepScalars,
    outputs_of,
)
from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo
from forcing_kv.runtime_trt.cuda.buffers import BufferSpec, DeviceMemory, read_from
from forcing_kv.runtime_trt.cuda.capture import CapturedGraph, capture, without_collection
from forcing_kv.runtime_trt.cuda.chunk_program import (
    ChunkProgram,
    ChunkVariant,
    Mark,
    expected_variants,
    plan_memory,
    result_names,
    scalar_names,
    step_name,
    upload_names,
    x0_name,
)
from forcing_kv.runtime_trt.cuda.chunk_resources import ChunkResources, Slot
from forcing_kv.runtime_trt.cuda.engine import GraphEngine
from forcing_kv.runtime_trt.cuda.runtime import Cuda
from forcing_kv.runtime_trt.errors import ForcingKvError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.ports import pool_ports, ports_by_name, steady_name
from forcing_kv.runtime_trt.rollout.text_fold import fold_text
from forcing_kv.runtime_trt.rollout.timeline import ChunkPlan, steady_plan

MAX_PREPARED = 16
"""Graphs captured on opening; a longer dense ring captures the rest when it first meets them."""


class ChunkGraphBackend(Backend):
    """Runs a compiled engine over preallocated device memory, a chunk at a time.

    Two streams: one computes, one copies results out while the next chunk runs. Two slots of pinned
    memory, so that the host prepares a chunk while the one before it runs.

    Args:
        engine: compiled graphs; closed with this backend, or at once if it cannot be opened.
        use_graphs: replay captured graphs; off, every launch is enqueued on its own.

    Raises:
        BackendUnavailableError: not enough device memory.
        ForcingKvError: a launch or a capture failed.
    """

    def __init__(
        self,
        cuda: Cuda,
        engine: GraphEngine,
        config: RolloutConfig,
        graphs: Mapping[str, GraphInfo],
        *,
        use_graphs: bool = True,
    ) -> None:
        super().__init__(config)
        self.name = engine.name
        self.engine = engine
        self.load_ms: dict[str, float] = {}
        """Time by part of opening: allocate, first run, capture."""
        self._cuda, self._graph_infos = cuda, graphs
        self.use_graphs = use_graphs
        """See `use_graphs` above; may be changed between two chunks."""
        self._waiting: list[_Pending] = []
        self._num_submitted = 0
        self._thread = threading.local()
        start = perf_counter()
        placed = engine.placed is not None
        plan = plan_memory(config, graphs, engine.scratch_nbytes, placed=placed)
        resources = ChunkResources(cuda, config, plan, engine.close)
        # Releases when closed, when collected as garbage and at exit, once.
        self._release = weakref.finalize(self, resources.close)
        self._resources, self._stream = resources, resources.stream
        try:
            self._program = ChunkProgram(cuda, engine, config, graphs, resources.memory)
            self._write_constants()
            self.load_ms["allocate"] = 1e3 * (perf_counter() - start)
            self._timed("first run", self._first_run)
            if use_graphs:
                self._timed("capture", self._capture_expected)
        except BaseException:
            self._release()
            raise

    @property
    def memory(self) -> DeviceMemory:
        """Every device buffer, by name."""
        return self._resources.memory

    @property
    def captured_graphs(self) -> Mapping[Any, CapturedGraph]:
        """Graphs captured so far, by `ChunkVariant`."""
        return self._resources.captured

    def _timed(self, part: str, work: Callable[[], None]) -> None:
        start = perf_counter()
        work()
        self.load_ms[part] = 1e3 * (perf_counter() - start)

    def _write_constants(self) -> None:
        for scalars in (*self.step_scalars, self.clean_scalars):
            for name in scalar_names(self._graph_infos):
                self._write(step_name(name, scalars.index), scalars.arrays[name])

    def _first_run(self) -> None:
        """Run every graph once, on zeros, so that no lazy set-up falls into a capture."""
        self._program.prompt(self._stream)
        self._cuda.move_rows((), self._stream)
        self._warm_thread()

    def _warm_thread(self) -> None:
        """Run what chunks are made of in this thread, if it has not; before a chunk, or on opening.

        Libraries keep handles for each thread (cuBLAS) and allocate with the first, which no
        capture allows. The next chunk writes again whatever this writes.
        """
        if getattr(self._thread, "warm", False):
            return
        for run in self._chunk_graphs().values():
            run()
        self._cuda.synchronize(self._stream)
        self._thread.warm = True

    def _chunk_graphs(self) -> Mapping[str, Callable[[], object]]:
        """A launch of each graph that chunks are made of, by its name."""
        program, stream = self._program, self._stream
        runs: dict[str, Callable[[], object]] = {"evict": partial(program.evict, stream)}
        for steady, named in ((False, str), (True, steady_name)):
            step = partial(program.step, stream, 0, "noise", "eps/0", "x/0", steady=steady)
            runs[named("step")] = step
            runs[named("clean")] = partial(program.clean, stream, "noise", steady=steady)
        return {name: run for name, run in runs.items() if name in self._graph_infos}

    def _capture_expected(self) -> None:
        variants = expected_variants(self.config, self._graph_infos)
        with without_collection():
            # Each graph alone first: one that escapes a capture would be hidden by the others.
            for name, run in self._chunk_graphs().items():
                captured = self._capture(run, f"graph {name}")
                self._cuda.destroy_executable(captured.executable)
            for variant in islice(variants, MAX_PREPARED):
                self._captured_chunk(variant)
            self._cuda.synchronize(self._stream)  # The first chunk waits for no upload.

    def _captured_chunk(self, variant: ChunkVariant) -> CapturedGraph:
        """The captured graph of a variant, captured now if it is new."""
        captured = self._resources.captured
        if variant not in captured:
            self._warm_thread()
            chunk = partial(self._program.chunk, self._stream, variant, lambda _: None)
            graph = self._capture(chunk, f"a chunk ({variant.name})")
            captured[variant] = graph
            graph.upload(self._cuda, self._stream)
        return captured[variant]

    def _capture(self, work: Callable[[], object], what: str) -> CapturedGraph:
        self._cuda.synchronize(self._stream)
        guard = self.engine.capturing(self._stream)
        return capture(self._cuda, self._stream, work, guard, self.memory.base, what)

    def _enter(self) -> None:
        """Refuse a closed backend; make the device current in this thread."""
        if not self._release.alive:
            raise ForcingKvError("this backend is closed; open the bundle again")
        self._cuda.bind_thread()

    def _write(self, name: str, array: NDArray[Any]) -> None:
        self.memory.write(self._cuda, name, array, self._stream)

    def read_tensor(self, name: str) -> NDArray[Any]:
        self._enter()
        if name in self.memory.plan.offsets:
            return self.memory.read(self._cuda, name, self._stream)
        port = ports_by_name(self._graph_infos)[name]
        spec = BufferSpec(name, tuple(port.shape), port.dtype)
        return read_from(self._cuda, self._program.address(name), spec, self._stream)

    def outputs_of(self, graph: str) -> Collection[str]:
        return outputs_of(self._graph_infos, graph)

    @property
    def num_text_rows(self) -> int:
        return self.memory.plan.specs["prompt_embeds"].shape[0]

    def set_prompt(self, prompt_embeds: Float32) -> None:
        self._enter()
        specs = self.memory.plan.specs
        if "text_bias" in specs:
            prompt_embeds, bias = fold_text(prompt_embeds, self.num_text_rows, self.config.dtype)
            self._write("text_bias", bias)
        self._write("prompt_embeds", prompt_embeds)
        self._program.prompt(self._stream)
        self._cuda.synchronize(self._stream)

    def _next_slot(self) -> Slot:
        """A slot whose last result has been read, so that its last upload and copy are over.

        A re-encoding uploads too, and waits for itself; `reset` waits for what nobody reads.
        """
        slots = self._resources.slots
        slot = slots[self._num_submitted % len(slots)]
        self._num_submitted += 1
        for pending in [each for each in self._waiting if each.slot is slot]:
            pending.result()
        return slot

    def _upload(self, slot: Slot, request: ChunkRequest) -> None:
        """Send everything that changes from chunk to chunk in one pinned copy."""
        arrays, positions = slot.upload.arrays, ChunkPositions.of(request.plan, self.config)
        arrays["noise"][...] = request.noise
        for i, eps in enumerate(request.eps):
            arrays[f"eps/{i}"][...] = eps
        for name, value in positions.arrays.items():
            arrays[name][...] = value
        target = self.memory.address(upload_names(self.config)[0])
        self._cuda.copy(target, slot.upload.address, slot.upload.nbytes, self._stream)

    def _variant(self, plan: ChunkPlan, *, recache: bool = False) -> ChunkVariant:
        return ChunkVariant.of(plan, self.config, self._graph_infos, recache=recache)

    def _run(self, variant: ChunkVariant, mark: Mark) -> None:
        """Replay or enqueue one chunk; `mark` hears of the parts that can be timed."""
        if self.use_graphs:
            self._captured_chunk(variant).launch(self._cuda, self._stream, self.memory.base)
            mark("chunk")
        else:
            self._program.chunk(self._stream, variant, mark)

    def submit(self, request: ChunkRequest) -> PendingChunk:
        """At most two chunks are on their way."""
        self._enter()
        cuda, stream, slot = self._cuda, self._stream, self._next_slot()
        parts = ["start"]

        def mark(part: str) -> None:
            parts.append(part)
            cuda.record(slot.events[part], stream)

        self._upload(slot, request)
        cuda.record(slot.events["start"], stream)
        self._run(self._variant(request.plan), mark)
        held, nbytes = self.memory.address(slot.held), slot.result.nbytes
        cuda.copy(held, self.memory.address(result_names(self.config)[0]), nbytes, stream)
        cuda.record(slot.events["held"], stream)
        cuda.wait(self._resources.copy_stream, slot.events["held"])
        cuda.copy(slot.result.address, held, nbytes, self._resources.copy_stream)
        cuda.record(slot.events["copied"], self._resources.copy_stream)
        pending = _Pending(self, slot, request, parts)
        self._waiting.append(pending)
        return pending

    def collect(self, pending: _Pending) -> ChunkResult:
        """Wait for a chunk's results and copy them out of pinned memory."""
        self._enter()
        cuda, slot = self._cuda, pending.slot
        cuda.synchronize_event(slot.events["copied"])
        self._waiting.remove(pending)
        names = result_names(self.config)
        arrays = {name: slot.result.arrays[name].copy() for name in names}
        result = ChunkResult(arrays[names[0]], timings_ms=self._timings(slot, pending.parts))
        if pending.request.plan.evict:
            result.scores, result.kept = arrays["scores"], arrays["kept"]
        if pending.request.keep_x0:
            steps = range(self.config.schedule.num_steps)
            result.x0_steps = [self.read_tensor(x0_name(i)) for i in steps]
        return result

    def _timings(self, slot: Slot, parts: list[str]) -> dict[str, float]:
        """Device time by part; of a captured chunk only the whole is known."""
        events, elapsed = slot.events, self._cuda.elapsed_ms
        return {end: elapsed(events[begin], events[end]) for begin, end in pairwise(parts)}

    def reset(self) -> None:
        """Zero the pools, and drop the chunks that nobody has fetched.

        A graph may multiply rows beyond the valid prefix by zero, which keeps what is not finite.
        """
        self._enter()
        self._waiting.clear()
        for busy in (self._stream, self._resources.copy_stream):  # The second waits for the first.
            self._cuda.synchronize(busy)
        for port in pool_ports(self.config):
            nbytes = self.memory.plan.specs[port.name].nbytes
            self._cuda.fill(self.memory.address(port.name), 0, nbytes, self._stream)

    def recache(self, request: ChunkRequest) -> None:
        self._enter()
        self._upload(self._next_slot(), request)
        self._run(self._variant(request.plan, recache=True), lambda _: None)
        self._cuda.synchronize(self._stream)

    def run_step(
        self, x: Any, eps: Float32 | None, scalars: StepScalars, positions: ChunkPositions
    ) -> tuple[Float32, Float32]:
        """One forward, enqueued on its own (for checks)."""
        self._enter()
        self._write("noise", x)
        self._write("eps/0", np.zeros(self.config.latent_shape) if eps is None else eps)
        for name, value in positions.arrays.items():
            self._write(name, value)
        steady = self._variant(positions.plan).steady
        if scalars.index == self.clean_scalars.index:
            self._program.clean(self._stream, "noise", steady=steady)
        else:
            index, names = scalars.index, ("noise", "eps/0", "x/0")
            self._program.step(self._stream, index, *names, steady=steady)
        return self.read_tensor(x0_name(scalars.index)), self.read_tensor("x/0")

    def time_step(self, repeats: int = 10, *, steady: bool) -> float:
        """Median time of one denoise step of a steady chunk over zeros, ms, enqueued on its own."""
        self._enter()
        plan = steady_plan(self.config.policy, self.config.chunk.num_frames)
        for name, value in ChunkPositions.of(plan, self.config).arrays.items():
            self._write(name, value)
        events, times = self._resources.slots[0].events, []
        for _ in range(repeats + 1):
            self._cuda.record(events["start"], self._stream)
            self._program.step(self._stream, 0, "noise", "eps/0", "x/0", steady=steady)
            self._cuda.record(events["steps"], self._stream)
            self._cuda.synchronize_event(events["steps"])
            times.append(self._cuda.elapsed_ms(events["start"], events["steps"]))
        return median(times[1:])

    def run_evict(self) -> tuple[Float32, NDArray[np.int32]]:
        """Enqueued on its own (for checks)."""
        self._enter()
        self._program.evict(self._stream)
        return self.read_tensor("scores"), self.read_tensor("kept")

    def commit(self, plan: ChunkPlan) -> None:
        """Enqueued on its own (for checks)."""
        self._enter()
        self._program.commit(self._stream, self._variant(plan))
        self._cuda.synchronize(self._stream)

    def sibling(self) -> ChunkGraphBackend:
        self._enter()
        return ChunkGraphBackend(
            self._cuda,
            self.engine.sibling(),
            self.config,
            self._graph_infos,
            use_graphs=self.use_graphs,
        )

    def close(self) -> None:
        self._waiting.clear()
        self._release()


class _Pending(PendingChunk):
    """A chunk on its way through a slot."""

    def __init__(
        self, backend: ChunkGraphBackend, slot: Slot, request: ChunkRequest, parts: list[str]
    ) -> None:
        self._backend = backend
        self.slot, self.request, self.parts = slot, request, parts
        self._result: ChunkResult | None = None

    def result(self) -> ChunkResult:
        if self._result is None:
            self._result = self._backend.collect(self)
        return self._result
