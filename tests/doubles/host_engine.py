"""Engines over the memory of the CPU double: ONNX Runtime behind the interface of a GPU's."""

from collections import Counter
from contextlib import nullcontext

import numpy as np

from forcing_kv.runtime_trt.backends.base import ChunkPositions
from forcing_kv.runtime_trt.rollout.ports import LENGTHS, steady_name
from forcing_kv.runtime_trt.rollout.timeline import steady_plan


def steady_lengths(config):
    """What the steady form of a step has baked in, as the general form takes it."""
    plan = steady_plan(config.policy, config.chunk.num_frames)
    arrays = ChunkPositions.of(plan, config).arrays
    return {name: arrays[name] for name in LENGTHS}


class HostEngine:
    """A `GraphEngine` that runs ONNX graphs with ONNX Runtime over the double's memory."""

    def __init__(self, cuda, bundle, manifest, name="host", shared=None):
        import onnxruntime as ort

        self.name, self._cuda, self._manifest, self._bundle = name, cuda, manifest, bundle
        self.closed = 0
        self.enqueued = Counter()
        self.fail_at = None
        self.shared = shared or {"users": 0, "sessions": {}}
        self.shared["users"] += 1
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # As the runtime takes them, so that results can be compared bit by bit.
        fused = getattr(manifest, "onnxruntime", {})
        self._lengths = steady_lengths(manifest.config) if fused else {}
        for graph, info in {**manifest.graphs, **fused}.items():
            if graph not in self.shared["sessions"]:
                self.shared["sessions"][graph] = ort.InferenceSession(
                    str(bundle / info.file), options, providers=["CPUExecutionProvider"]
                )

    @property
    def scratch_nbytes(self):
        return {"step": 1000, "evict": 300}

    def enqueue(self, graph, bindings, stream):
        self.enqueued[graph] += 1
        if self.fail_at == graph:
            self.fail_at = None
            raise RuntimeError(f"{graph} was made to fail")
        info, lengths = self._manifest.graphs[graph], {}
        if graph == steady_name("step") and self._lengths:
            graph, lengths = "step", self._lengths
        session = self.shared["sessions"][graph]
        dtypes = {"float32": np.float32, "float16": np.float16, "int32": np.int32}
        scratch, size = bindings["scratch"], self.scratch_nbytes.get(graph, 0)
        assert scratch % 256 == 0
        if size:
            self._cuda.fill(scratch, 0xFF, size, stream)  # An engine leaves anything there.

        def array(tensor):
            address = bindings[tensor.name] if tensor.name in bindings else self.place(tensor)
            assert address % 256 == 0, f"{tensor.name} is not aligned"
            dtype = np.dtype(dtypes[tensor.dtype])
            nbytes = int(np.prod(tensor.shape)) * dtype.itemsize
            return self._cuda.view(address, nbytes).view(dtype).reshape(tensor.shape)

        inputs = {tensor.name: array(tensor) for tensor in info.inputs} | lengths
        outputs = [array(tensor) for tensor in info.outputs]
        names = [tensor.name for tensor in info.outputs]

        def work():
            for target, value in zip(outputs, session.run(names, inputs), strict=True):
                target[...] = value

        self._cuda.enqueue_kernel(stream, work, of=(id(self.shared), graph))

    placed = None

    def capturing(self, stream):
        return nullcontext()

    def place(self, tensor):
        """Where an output goes that has no binding."""
        raise AssertionError(f"{tensor.name} is not bound")

    def sibling(self):
        return HostEngine(self._cuda, self._bundle, self._manifest, self.name, self.shared)

    def close(self):
        self.closed += 1
        if self.closed == 1:
            self.shared["users"] -= 1
            if not self.shared["users"]:
                self.shared["sessions"].clear()


class PlacingEngine(HostEngine):
    """Has memory of its own for outputs that have no binding, as an engine of PyTorch does."""

    ARENA_NBYTES = 1 << 16

    def __init__(self, cuda, *arguments, **options):
        super().__init__(cuda, *arguments, **options)
        self.placed = {}
        self._arena = cuda.malloc(self.ARENA_NBYTES)
        self._end = self._arena

    def enqueue(self, graph, bindings, stream):
        self.placed.clear()
        self._end = self._arena
        self._cuda.fill(self._arena, 0xFF, self.ARENA_NBYTES, stream)
        super().enqueue(graph, {"scratch": 0, **bindings}, stream)

    @property
    def scratch_nbytes(self):
        return {}

    def place(self, tensor):
        self.placed[tensor.name] = address = self._end
        nbytes = 4 * int(np.prod(tensor.shape))
        self._end += -(-nbytes // 256) * 256
        assert self._end <= self._arena + self.ARENA_NBYTES, "the arena is too small"
        return address

    def close(self):
        super().close()
        if self.closed == 1:
            self._cuda.free(self._arena)
