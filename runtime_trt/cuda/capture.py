"""Capture of enqueued work as a CUDA graph, and its replay."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from forcing_kv.runtime_trt.cuda.runtime import Cuda, CudaError
from forcing_kv.runtime_trt.errors import ForcingKvError


@dataclass(frozen=True)
class CapturedGraph:
    """An instantiated CUDA graph; addresses and shapes are baked in."""

    executable: int
    nodes: Counter[str]
    """Number of nodes of each kind."""
    base: int
    """Address of the memory that it was captured over."""

    def upload(self, cuda: Cuda, stream: int) -> None:
        """Send the graph to the device now, so that its first replay is as fast as the others."""
        cuda.upload(self.executable, stream)

    def launch(self, cuda: Cuda, stream: int, base: int) -> None:
        """Replay on `stream`, over the same memory as at capture."""
        assert base == self.base, "the buffers have moved since this graph was captured"
        cuda.launch(self.executable, stream)


class _Collector:
    """Python's garbage collector, off while any thread captures."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_holds = 0
        self._was_enabled = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Collect what is garbage now, and nothing more until the block ends; may be nested."""
        with self._lock:
            if not self._num_holds:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._num_holds += 1
            first = self._num_holds == 1
        try:
            if first:
                gc.collect()
            yield
        finally:
            with self._lock:
                self._num_holds -= 1
                if not self._num_holds and self._was_enabled:
                    gc.enable()


without_collection = _Collector().held
"""Entered around captures: what the collector finds may be an older session, whose release on the
capturing thread would break the capture. Once around several spares collecting before each."""


def capture(
    cuda: Cuda,
    stream: int,
    record: Callable[[], object],
    guard: AbstractContextManager[None],
    base: int,
    what: str,
) -> CapturedGraph:
    """Capture what `record` enqueues on `stream`.

    Args:
        stream: a non-default, idle stream.
        record: enqueues the work; must have run once before, so that lazy set-up is over.
        guard: entered around the capture (an engine's private memory pool).
        base: address of the memory that the work reads and writes.
        what: name of the work, for the error message.

    Raises:
        ForcingKvError: the work cannot be captured, or holds no kernel.
    """
    assert stream != 0, "the default stream cannot be captured"
    with without_collection(), guard:
        cuda.begin_capture(stream)
        try:
            record()
        except BaseException as error:
            _abandon(cuda, stream)
            if isinstance(error, CudaError):
                raise ForcingKvError(f"{error}, during a capture; {_WAY_OUT}") from error
            raise
        try:
            graph = cuda.end_capture(stream)
        except CudaError as error:
            raise ForcingKvError(f"{error}; {_WAY_OUT}") from error
    try:
        nodes = cuda.graph_nodes(graph)
        # Work on another stream is not captured, some of it silently.
        if not nodes["kernel"]:
            raise ForcingKvError(
                f"the capture of {what} holds no kernel (nodes: {dict(nodes) or 'none'}), so the "
                f"engine runs on another stream than it is told to; {_WAY_OUT}"
            )
        return CapturedGraph(cuda.instantiate(graph), nodes, base)
    finally:
        cuda.destroy_graph(graph)


def destroy_all(cuda: Cuda, captured: MutableMapping[Any, CapturedGraph]) -> None:
    """Release captured graphs and forget them."""
    for graph in captured.values():
        cuda.destroy_executable(graph.executable)
    captured.clear()


def _abandon(cuda: Cuda, stream: int) -> None:
    """End a capture that failed, so that the stream can be used again."""
    try:
        graph = cuda.end_capture(stream)
    except CudaError:
        return
    if graph:
        cuda.destroy_graph(graph)


_WAY_OUT = "run with --no-cuda-graph (graphs=False) to go on without, and report it"
