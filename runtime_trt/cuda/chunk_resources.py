"""Streams, events, device memory and pinned blocks of one session, released together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from forcing_kv.runtime_trt.cuda.buffers import DeviceMemory, MemoryPlan, PinnedMirror
from forcing_kv.runtime_trt.cuda.capture import CapturedGraph, destroy_all
from forcing_kv.runtime_trt.cuda.chunk_program import SLOTS, result_names, upload_names
from forcing_kv.runtime_trt.cuda.runtime import Cuda
from forcing_kv.runtime_trt.rollout.config import RolloutConfig

SLOT_EVENTS = ("start", "steps", "clean", "evict", "commit", "chunk", "held", "copied")
"""Marks of a slot's current chunk, in the order in which they pass."""


@dataclass(frozen=True)
class Slot:
    """What one chunk needs from its upload until its result is read."""

    upload: PinnedMirror
    """Inputs on their way to the device."""
    result: PinnedMirror
    """Results on the host."""
    held: str
    """Device buffer that keeps the result while the next chunk overwrites its source."""
    events: Mapping[str, int]
    """`SLOT_EVENTS`."""


class ChunkResources:
    """Everything on the device that a session owns beside the engine.

    Args:
        plan: every device buffer.
        on_close: runs after everything else is released.

    Raises:
        BackendUnavailableError: not enough device memory.
    """

    def __init__(
        self,
        cuda: Cuda,
        config: RolloutConfig,
        plan: MemoryPlan,
        on_close: Callable[[], None],
    ) -> None:
        self._cuda = cuda
        self.captured: dict[object, CapturedGraph] = {}
        """By variant of the chunk."""
        with ExitStack() as stack:
            stack.callback(on_close)
            cuda.bind_thread()
            self.stream = self._owned(stack, cuda.create_stream, cuda.destroy_stream)
            self.copy_stream = self._owned(stack, cuda.create_stream, cuda.destroy_stream)
            self.memory = DeviceMemory(cuda, plan)
            stack.callback(cuda.free, self.memory.base)
            self.slots = tuple(self._slot(stack, config, held) for held in SLOTS)
            stack.callback(destroy_all, cuda, self.captured)
            # Runs first when the stack unwinds: nothing is freed under work that is on its way.
            # So nothing is enqueued before this line.
            for stream in (self.copy_stream, self.stream):
                stack.callback(cuda.synchronize, stream)
            self.memory.clear(cuda, self.stream)
            self._stack = stack.pop_all()

    @staticmethod
    def _owned(stack: ExitStack, create: Callable[[], int], destroy: Callable[[int], None]) -> int:
        handle = create()
        stack.callback(destroy, handle)
        return handle

    def _slot(self, stack: ExitStack, config: RolloutConfig, held: str) -> Slot:
        cuda = self._cuda

        def pinned(names: Sequence[str]) -> PinnedMirror:
            mirror = PinnedMirror(cuda, self.memory.plan, names)
            stack.callback(cuda.free_host, mirror.address)
            return mirror

        upload, result = pinned(upload_names(config)), pinned(result_names(config))
        events = {
            name: self._owned(stack, cuda.create_event, cuda.destroy_event) for name in SLOT_EVENTS
        }
        return Slot(upload, result, held, events)

    def close(self) -> None:
        """Wait for the device and release everything, in reverse order; may be called twice.

        One failing release (a device in error) does not stop the others; the first is raised.
        """
        self._stack.close()
