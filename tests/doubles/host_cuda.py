"""A CPU double of `runtime_trt.cuda.runtime.Cuda`, strict where the real one is silent.

Work is queued and runs as late as the rules of streams and events allow, so that a missing wait
shows as a wrong result. Memory is filled with 0xFF (NaN) when allocated. Use after free, copies
across an allocation's end, work on another stream during a capture, allocation during a capture and
releases of what is in use are errors. A thread that captures may neither release anything nor wait:
that fails and spoils the capture, as on CUDA.
"""

import ctypes
import itertools
import threading
from collections import Counter
from dataclasses import astuple

import numpy as np

from forcing_kv.runtime_trt.cuda.runtime import CudaError, DeviceInfo


class _Stream:
    def __init__(self):
        self.queue = []
        self.capture = None
        self.captured_by = None
        self.spoiled = False


class _Event:
    def __init__(self):
        self.records = self.passed = 0


class HostCuda:
    """Device memory is host memory; one process-wide device."""

    def __init__(self, free_nbytes=1 << 30, sm=89, name="CPU double"):
        self.device = DeviceInfo(name, sm, 128, free_nbytes, "13.0")
        self._free_nbytes = free_nbytes
        self._handles = itertools.count(0x1000)
        self.memory = {}  # address -> array
        self.pinned = {}
        self.streams, self.events, self.graphs, self.executables = {}, {}, {}, {}
        self.uploaded = set()
        self._moves_loaded = False
        self.calls = Counter()
        self.fail_at = None  # (call name, how many calls from now on)
        self._thread = threading.local()  # .warm: what this thread has run outside captures

    # --- what tests ask -------------------------------------------------------------------------

    @property
    def live(self):
        """Everything allocated and not released."""
        kinds = ("memory", "pinned", "streams", "events", "graphs", "executables")
        return {kind: len(getattr(self, kind)) for kind in kinds if getattr(self, kind)}

    def view(self, address, nbytes):
        """Bytes of device or pinned memory as an array."""
        self._check(address, nbytes)
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def enqueue_kernel(self, stream, work, of=None):
        """What an engine does: queue a function, captured as one kernel.

        Args:
            of: what the function belongs to. A thread runs it once before it may capture it:
                libraries make their handles for each thread, and allocate for them.
        """
        warm = vars(self._thread).setdefault("warm", set())
        if self.streams[stream].capture is None:
            warm.add(of)
        elif of not in warm:
            self._forbid("malloc")
        self._enqueue("kernel", stream, work)

    # --- the interface of Cuda ------------------------------------------------------------------

    def bind_thread(self):
        self._count("bind_thread")

    def free_nbytes(self):
        return self._free_nbytes - sum(array.nbytes for array in self.memory.values())

    def malloc(self, nbytes):
        return self._allocate(self.memory, nbytes, "malloc")

    def malloc_host(self, nbytes):
        return self._allocate(self.pinned, nbytes, "malloc_host")

    def free(self, address):
        self._forbid("free")
        self._idle("free")
        del self.memory[address]

    def free_host(self, address):
        self._forbid("free_host")
        self._idle("free_host")
        del self.pinned[address]

    def copy(self, target, source, nbytes, stream):
        self._check(target, nbytes, strict=False)
        self._check(source, nbytes, strict=False)
        self._enqueue("memcpy", stream, lambda: ctypes.memmove(target, source, nbytes))

    def move_rows(self, moves, stream):
        if self.streams[stream].capture is None:
            self._moves_loaded = True
        elif not self._moves_loaded:
            self._forbid("load_kernel")
        written, read = [], []
        for move in moves:
            assert 0 < move.width <= min(move.source_pitch, move.target_pitch) or move.height == 1
            assert not any(value % 4 for value in astuple(move)[:5])
            for begin, pitch, runs in (
                (move.source, move.source_pitch, read), (move.target, move.target_pitch, written)
            ):  # fmt: skip
                self._check(begin, pitch * (move.height - 1) + move.width)
                starts = range(begin, begin + pitch * move.height, pitch)
                runs += [(start, start + move.width) for start in starts]
        written.sort()
        pairs = itertools.pairwise(written)
        assert all(a[1] <= b[0] for a, b in pairs), "moves of one launch write one place"
        for begin, end in read:
            clash = any(begin < b and a < end for a, b in written)
            assert not clash, "a move of one launch reads what another one writes"

        def work():
            for move in moves:
                for row in range(move.height):
                    source = move.source + row * move.source_pitch
                    ctypes.memmove(move.target + row * move.target_pitch, source, move.width)

        self._enqueue("kernel", stream, work)

    def fill(self, address, value, nbytes, stream):
        self._check(address, nbytes)
        self._enqueue("memset", stream, lambda: ctypes.memset(address, value, nbytes))

    def create_stream(self):
        return self._create(self.streams, _Stream(), "create_stream")

    def destroy_stream(self, stream):
        self._forbid("destroy_stream")
        assert not self.streams[stream].queue, "destroyed a busy stream"
        del self.streams[stream]

    def synchronize(self, stream):
        self._count("synchronize")
        self._forbid("synchronize")
        self._drain(stream, None)

    def create_event(self):
        return self._create(self.events, _Event(), "create_event")

    def destroy_event(self, event):
        self._forbid("destroy_event")
        del self.events[event]

    def record(self, event, stream):
        found = self.events[event]
        number = found.records + 1

        def work():
            found.passed = number

        self._enqueue("eventrecord", stream, work)
        found.records = number

    def wait(self, stream, event):
        found, number = self.events[event], self.events[event].records
        self._enqueue("waitevent", stream, lambda: self._run_until(found, number))

    def synchronize_event(self, event):
        self._count("synchronize_event")
        self._forbid("synchronize_event")
        self._run_until(self.events[event], self.events[event].records)

    def elapsed_ms(self, start, end):
        for event in (start, end):
            found = self.events[event]
            assert found.records, "asked for the time of an event that was never recorded"
            assert found.passed == found.records, "asked for the time of an event on its way"
        return 1.0

    def begin_capture(self, stream):
        self._count("begin_capture")
        found = self.streams[stream]
        assert not found.queue, "began a capture on a busy stream"
        found.capture, found.captured_by, found.spoiled = [], threading.get_ident(), False

    def end_capture(self, stream):
        found = self.streams[stream]
        assert found.captured_by == threading.get_ident(), "ended a capture of another thread"
        nodes, found.capture = found.capture, None
        if found.spoiled:
            text = "operation failed due to a previous error during capture"
            raise CudaError("end_capture", "cudaErrorStreamCaptureInvalidated", text)
        return self._create(self.graphs, nodes, "end_capture")

    def graph_nodes(self, graph):
        return Counter(kind for kind, _ in self.graphs[graph])

    def instantiate(self, graph):
        return self._create(self.executables, list(self.graphs[graph]), "instantiate")

    def upload(self, executable, stream):
        assert executable in self.executables
        self._enqueue("upload", stream, lambda: self.uploaded.add(executable))

    def destroy_graph(self, graph):
        self._forbid("destroy_graph")
        del self.graphs[graph]

    def launch(self, executable, stream):
        nodes = self.executables[executable]

        def work():
            assert executable in self.uploaded, "the first launch of a graph had to upload it"
            for _, node in nodes:
                node()

        self._enqueue("graph", stream, work)

    def destroy_executable(self, executable):
        self._forbid("destroy_executable")
        self._idle("destroy_executable")
        del self.executables[executable]

    # --- inner workings -------------------------------------------------------------------------

    def _count(self, name):
        self.calls[name] += 1
        if self.fail_at and self.fail_at[0] == name:
            self.fail_at = (name, self.fail_at[1] - 1)
            if self.fail_at[1] <= 0:
                self.fail_at = None
                raise CudaError(name, "cudaErrorUnknown", "made to fail")

    def _captured_here(self):
        """Streams that this thread captures."""
        here = threading.get_ident()
        return [s for s in self.streams.values() if s.capture is not None and s.captured_by == here]

    def _forbid(self, name):
        """Refuse what the capturing thread must not do, and spoil its capture."""
        for found in self._captured_here():
            found.spoiled = True
            text = "operation not permitted when stream is capturing"
            raise CudaError(name, "cudaErrorStreamCaptureUnsupported", text)

    def _create(self, table, value, name):
        self._count(name)
        handle = next(self._handles)
        table[handle] = value
        return handle

    def _allocate(self, table, nbytes, name):
        self._count(name)
        self._forbid(name)
        array = self.new_array(nbytes + 256)
        address = -(-array.ctypes.data // 256) * 256
        table[address] = array
        return address

    def new_array(self, nbytes):
        """Memory as it comes: full of NaN."""
        return np.full(nbytes, 0xFF, np.uint8)

    def _check(self, address, nbytes, strict=True):
        for begin, array in (*self.memory.items(), *self.pinned.items()):
            end = array.ctypes.data + array.nbytes
            if begin <= address < end:
                assert address + nbytes <= end, f"{nbytes} bytes cross the end of an allocation"
                return
        assert not strict, f"{address:#x} is not device memory (freed?)"

    def _enqueue(self, kind, stream, work):
        self._count(kind)
        found = self.streams[stream]
        if found.capture is not None:
            found.capture.append((kind, work))
            return
        assert not self._captured_here(), "escaped a capture"
        found.queue.append((kind, work))

    def _drain(self, stream, until):
        """Run a stream's queue until `until()` holds, or to its end."""
        queue = self.streams[stream].queue
        while queue and not (until and until()):
            queue.pop(0)[1]()

    def _run_until(self, event, number):
        """Run whatever streams are needed for an event to pass."""
        for stream in list(self.streams):
            if event.passed >= number:
                return
            if any(kind == "eventrecord" for kind, _ in self.streams[stream].queue):
                self._drain(stream, lambda: event.passed >= number)
        assert event.passed >= number, "waited for an event that nothing records"

    def _idle(self, what):
        busy = [s for s, found in self.streams.items() if found.queue]
        assert not busy, f"{what} while streams {busy} are busy"
