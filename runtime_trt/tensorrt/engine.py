"""TensorRT plans as an engine of the chunk-graph runtime: TensorRT, its lean runtime, TensorRT-RTX.

The three packages have one interface; only the module differs. Plans are loaded once and shared by
sibling sessions, each with execution contexts of its own.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from forcing_kv.runtime_trt.bundle.constants import map_constants, parse_table
from forcing_kv.runtime_trt.bundle.engines import EngineRecord, weight_table
from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo
from forcing_kv.runtime_trt.bundle.hashes import HashedFiles
from forcing_kv.runtime_trt.cuda.engine import SCRATCH
from forcing_kv.runtime_trt.dtypes import BY_TENSORRT
from forcing_kv.runtime_trt.errors import BackendUnavailableError, BundleError, ForcingKvError
from forcing_kv.runtime_trt.tensorrt.flavours import Flavour
from forcing_kv.runtime_trt.tensorrt.jit_cache import JitCache
from forcing_kv.runtime_trt.tensorrt.refit import NamedWeight, refit


def listener(trt: Any, hear: Callable[[str, bool], None]) -> Any:
    """A logger for TensorRT; `hear` gets every message, and whether it is an error or a warning."""
    severity = trt.ILogger.Severity
    bad = (severity.INTERNAL_ERROR, severity.ERROR, severity.WARNING)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            hear(message, level in bad)

    return Logger()


class EngineLog:
    """What TensorRT says while plans are loaded and run."""

    def __init__(self, trt: Any) -> None:
        self._said: deque[str] = deque(maxlen=3)
        self.logger = listener(trt, self._hear)

    def _hear(self, message: str, problem: bool) -> None:
        if problem:
            self._said.append(message)

    def last(self) -> str:
        """The last messages, or a note that there are none."""
        return "; ".join(self._said) or "TensorRT gives no reason"


class LoadedPlans:
    """The plans of one engine record in device memory, with the sessions that use them.

    Args:
        flavour: which package runs them.
        bundle: holds the plans; not used later.
        record: the engine; version and GPU are checked by the caller.

    Raises:
        BackendUnavailableError: a plan does not load here.
        BundleError: a file is missing or altered, or a plan does not fit its record.
    """

    def __init__(
        self, flavour: Flavour, trt: Any, bundle: HashedFiles, record: EngineRecord
    ) -> None:
        self.flavour, self.trt, self.record = flavour, trt, record
        self.rebuild_command = record.rebuild_command(bundle.folder)
        self.log = EngineLog(trt)
        self.num_users = 0
        self.lock = threading.Lock()
        """Of the number: sibling sessions may come and go in threads of their own."""
        self._runtime = trt.Runtime(self.log.logger)
        if record.options.get("version_compatible"):
            # Such a plan holds its own lean runtime, which is host code.
            self._runtime.engine_host_code_allowed = True
        self.engines: dict[str, Any] = {}
        self.names: dict[str, dict[str, str]] = {}
        """By graph: manifest name of a tensor → the engine's."""
        try:
            for name, graph in record.graphs.items():
                self.engines[name] = self._load(bundle, graph.file)
                self.names[name] = self._match(name, graph)
        except BaseException:
            self.release()
            raise

    def _load(self, bundle: HashedFiles, plan: str) -> Any:
        engine = self._runtime.deserialize_cuda_engine(bundle.map(plan).data)
        if engine is None:
            raise BackendUnavailableError(
                f"{bundle}/{plan}: {self.flavour.name} cannot load it ({self.log.last()}); "
                f"{self.rebuild_command}"
            )
        if self.record.options.get("strip_weights"):
            self._refit(engine, bundle, plan)
        return engine

    def _refit(self, engine: Any, bundle: HashedFiles, plan: str) -> None:
        """Give a stripped engine its weights, by the names that were recorded when it was built."""
        file = weight_table(plan)
        table = parse_table(bundle.read(file), bundle.folder / file)
        if not table:  # This graph has none, so there is nothing to refit.
            return
        weights = (
            NamedWeight(name, entry.dtype, math.prod(entry.shape), content)
            for name, entry, content in map_constants(bundle, table)
        )
        if (wrong := refit(self.trt, engine, self.log.logger, weights)) is not None:
            raise BundleError(
                f"{bundle}/{plan}: the bundle's weights do not fit the engine: {wrong} "
                f"({self.log.last()}); {self.rebuild_command}"
            )

    def _match(self, name: str, graph: GraphInfo) -> dict[str, str]:
        """Check an engine's tensors against the record.

        Torch-TensorRT gives tensors its own names, in the order of the exported program; where one
        is missing, nobody can tell which.
        """
        by_position = self.record.options.get("frontend") == "torch-tensorrt"
        engine, trt = self.engines[name], self.trt
        tensors = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        modes = {tensor: engine.get_tensor_mode(tensor) for tensor in tensors}
        names: dict[str, str] = {}
        for mode, wanted in (
            (trt.TensorIOMode.INPUT, graph.inputs),
            (trt.TensorIOMode.OUTPUT, graph.outputs),
        ):
            found = [tensor for tensor in tensors if modes[tensor] == mode]
            matched = {info.name: info.name for info in wanted if info.name in found}
            if by_position and len(matched) < len(wanted) == len(found):
                matched = dict(zip((info.name for info in wanted), found, strict=True))
            known = {info.name: info for info in wanted}
            wrong = set(found) - set(matched.values())
            wrong |= {
                tensor
                for key, tensor in matched.items()
                if (known[key].shape, known[key].dtype) != self._description(engine, tensor)
            }
            if mode == trt.TensorIOMode.OUTPUT:
                wrong |= set(known) - set(matched)
            if wrong:
                raise BundleError(
                    f"{graph.file}: tensors {sorted(wrong)[:3]} of graph {name} differ from the "
                    f"record; {self.rebuild_command}"
                )
            names |= matched
        if getattr(engine, "num_aux_streams", 0):
            raise BundleError(
                f"{graph.file}: it uses auxiliary streams, which a capture would lose; "
                f"{self.rebuild_command}"
            )
        return names

    def _description(self, engine: Any, tensor: str) -> tuple[tuple[int, ...], str]:
        dtype = engine.get_tensor_dtype(tensor).name
        known = BY_TENSORRT[dtype].name if dtype in BY_TENSORRT else dtype
        return tuple(engine.get_tensor_shape(tensor)), known

    def release(self) -> None:
        """Free device memory: engines before their runtime."""
        self.engines.clear()
        self._runtime = None


class TensorRtEngine:
    """See `GraphEngine`: execution contexts of one session.

    Args:
        plans: loaded plans; released when the last engine over them is closed.

    Raises:
        BackendUnavailableError: a context cannot be made.
    """

    def __init__(self, plans: LoadedPlans) -> None:
        self.name = plans.flavour.name
        self._plans = plans
        self._contexts: dict[str, Any] = {}
        self._bound: dict[str, dict[str, int]] = {}
        with plans.lock:
            plans.num_users += 1
        self._jit_cache = JitCache(plans.trt, plans.record.files)
        try:
            for name, engine in plans.engines.items():
                context = self._create_context(engine)
                if context is None:
                    raise BackendUnavailableError(
                        f"no execution context for graph {name} ({plans.log.last()}); free memory "
                        "on this GPU (`nvidia-smi`)"
                    )
                self._contexts[name], self._bound[name] = context, {}
        except BaseException:
            self.close()
            raise

    def _create_context(self, engine: Any) -> Any:
        """A context whose scratch is ours, so that contexts share it and nothing is hidden."""
        trt = self._plans.trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._jit_cache.available:
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # The whole chunk is one graph; a second, inner capture would be in the way.
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        self._jit_cache.attach(config)
        return engine.create_execution_context(config)

    placed = None

    @property
    def scratch_nbytes(self) -> Mapping[str, int]:
        return {
            name: int(engine.device_memory_size_v2) for name, engine in self._plans.engines.items()
        }

    def enqueue(self, graph: str, bindings: Mapping[str, int], stream: int) -> None:
        context, bound = self._contexts[graph], self._bound[graph]
        for name, tensor in self._plans.names[graph].items():
            address = bindings[name]
            if bound.get(tensor) != address:
                if not context.set_tensor_address(tensor, address):
                    raise self._refused(f"the address of {tensor}", graph)
                bound[tensor] = address
        if SCRATCH in bindings and bound.get(SCRATCH) != bindings[SCRATCH]:
            size = int(self._plans.engines[graph].device_memory_size_v2)
            context.set_device_memory(bindings[SCRATCH], size)
            bound[SCRATCH] = bindings[SCRATCH]
        if not context.execute_async_v3(stream):
            raise self._refused("the launch", graph)

    def _refused(self, what: str, graph: str) -> ForcingKvError:
        return ForcingKvError(
            f"{self.name} refused {what} of graph {graph} ({self._plans.log.last()}); "
            f"{self._plans.rebuild_command}"
        )

    @contextmanager
    def capturing(self, stream: int) -> Iterator[None]:
        """See `GraphEngine`: refuses a capture that TensorRT says it cannot follow."""
        for name, context in self._contexts.items():
            asked = getattr(context, "is_stream_capturable", None)
            if asked is not None and not asked(stream):
                raise ForcingKvError(
                    f"{self.name} cannot capture graph {name} ({self._plans.log.last()}); run with "
                    f"--no-cuda-graph, or {self._plans.rebuild_command}"
                )
        self._jit_cache.save()
        yield

    def sibling(self) -> TensorRtEngine:
        return TensorRtEngine(self._plans)

    def close(self) -> None:
        if self._plans.num_users and self._contexts is not _CLOSED:
            try:
                self._jit_cache.save()
            finally:
                self._contexts.clear()
                self._contexts = _CLOSED
                with self._plans.lock:
                    self._plans.num_users -= 1
                    is_last = not self._plans.num_users
                if is_last:
                    self._plans.release()


_CLOSED: dict[str, Any] = {}
