"""A stand-in for the `tensorrt` modules: plans are JSON that names an ONNX file, run on the double.

It checks what the real one would crash on: addresses set, alignment, scratch, release order.
"""

import ctypes
import enum
import hashlib
import json
import weakref
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

from host_engine import HostEngine


class ILogger:
    Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])

    def __init__(self):
        pass


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


class DataType(enum.Enum):
    FLOAT = 4
    HALF = 2
    BF16 = 3


class Weights:
    """Remembers an address, as the real one does: nothing is copied."""

    def __init__(self, dtype, address, count):
        self.dtype, self.address, self.count = dtype, address, count

    def sha256(self):
        nbytes = self.count * {DataType.FLOAT: 4}.get(self.dtype, 2)
        return hashlib.sha256(ctypes.string_at(self.address, nbytes)).hexdigest()


class FakeTensorRt:
    """Use as `sys.modules["tensorrt"]`.

    Args:
        cuda: the double whose memory engines use.
        manifest: gives inputs and outputs.
        bundle: where the ONNX files are.
    """

    ILogger = ILogger
    TensorIOMode = TensorIOMode
    DataType = DataType
    Weights = Weights
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy

    def __init__(self, cuda, bundle, manifest, version="11.4.0.106"):
        self.__version__ = version
        self.host = HostEngine(cuda, bundle, manifest)
        self.manifest = manifest
        self.__spec__ = ModuleSpec("tensorrt", None)
        self._engines = weakref.WeakSet()
        self.capturable = True
        self.refuse = None  # deserialize, context, address or launch
        module = self

        class Runtime:
            def __init__(self, logger):
                self.logger = logger
                self.engine_host_code_allowed = False
                module.runtime = self

            def deserialize_cuda_engine(self, plan):
                content = json.loads(bytes(plan))
                if module.refuse == "deserialize":
                    self.logger.log(ILogger.Severity.ERROR, "magic tag does not match")
                    return None
                return _Engine(module, self.logger, content)

        class Refitter:
            """Takes weights by name; reads them when it refits, and not before."""

            def __init__(self, engine, logger):
                self.engine, self.logger, self.given = engine, logger, {}

            def set_named_weights(self, name, weights):
                if name not in self.engine.stripped or module.refuse == "weights":
                    self.logger.log(ILogger.Severity.ERROR, f"no weights named {name}")
                    return False
                self.given[name] = weights
                return True

            def get_missing_weights(self):
                return sorted(set(self.engine.stripped) - set(self.given))

            def refit_cuda_engine(self):
                found = {name: weights.sha256() for name, weights in self.given.items()}
                self.engine.refitted = found == self.engine.stripped
                return self.engine.refitted

        self.Runtime, self.Refitter = Runtime, Refitter

    @property
    def live(self):
        """Engines that are loaded and not released."""
        return list(self._engines)

    def write_plans(self, folder, stripped=None, **changes):
        """Write one plan a graph; returns their paths.

        Args:
            folder: where.
            stripped: by graph, the sha256 of every weight that the plan leaves out.
            changes: replace what the plans say.
        """
        folder.mkdir(parents=True)
        paths = {}
        for name, info in self.manifest.graphs.items():
            content = {
                "graph": name,
                "inputs": [[t.name, t.shape, t.dtype] for t in info.inputs],
                "outputs": [[t.name, t.shape, t.dtype] for t in info.outputs],
                "num_aux_streams": 0,
                "stripped": (stripped or {}).get(name, {}),
            }
            paths[name] = folder / f"{name}.plan"
            paths[name].write_text(json.dumps({**content, **changes}))
        return paths


class _Engine:
    device_memory_size_v2 = 5000

    def __init__(self, module, logger, content):
        self.module, self.logger, self.content = module, logger, content
        self.tensors = {
            name: (shape, dtype, mode)
            for key, mode in (("inputs", TensorIOMode.INPUT), ("outputs", TensorIOMode.OUTPUT))
            for name, shape, dtype in content[key]
        }
        self.num_io_tensors = len(self.tensors)
        self.num_aux_streams = content["num_aux_streams"]
        self.stripped = content["stripped"]
        self.refitted = not self.stripped
        module._engines.add(self)

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_mode(self, name):
        return self.tensors[name][2]

    def get_tensor_shape(self, name):
        return self.tensors[name][0]

    def get_tensor_dtype(self, name):
        names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int32": "INT32"}
        return SimpleNamespace(name=names[self.tensors[name][1]])

    def create_execution_context(self, strategy):
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return None if self.module.refuse == "context" else _Context(self)


class _Context:
    def __init__(self, engine):
        self.engine, self.addresses, self.scratch = engine, {}, None

    def set_tensor_address(self, name, address):
        assert name in self.engine.tensors
        assert address % 256 == 0
        self.addresses[name] = address
        return self.engine.module.refuse != "address"

    def set_device_memory(self, address, size):
        assert address % 256 == 0
        assert size == self.engine.device_memory_size_v2
        self.scratch = address

    def is_stream_capturable(self, stream):
        return self.engine.module.capturable

    def execute_async_v3(self, stream):
        assert set(self.addresses) == set(self.engine.tensors), "a tensor has no address"
        assert self.scratch is not None, "no scratch was given"
        assert stream
        assert self.engine.refitted, "a stripped engine runs without its weights"
        if self.engine.module.refuse == "launch":
            self.engine.logger.log(ILogger.Severity.ERROR, "cask failure")
            return False
        graph = self.engine.content["graph"]
        info = self.engine.module.manifest.graphs[graph]
        # A plan may name its tensors otherwise than the graph, in the graph's order.
        names = zip((*info.inputs, *info.outputs), self.engine.tensors, strict=True)
        bindings = {tensor.name: self.addresses[own] for tensor, own in names}
        self.engine.module.host.enqueue(graph, {**bindings, "scratch": self.scratch}, stream)
        return True
