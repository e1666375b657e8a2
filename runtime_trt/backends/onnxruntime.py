"""ONNX Runtime on the CPU: works everywhere; for tests, debugging and small models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.backends.base import ChunkPositions, Float32, StepScalars
from forcing_kv.runtime_trt.backends.stepwise import StepwiseBackend, copy_rows
from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo
from forcing_kv.runtime_trt.bundle.manifest import Bundle
from forcing_kv.runtime_trt.bundle.onnx_file import OnnxFile
from forcing_kv.runtime_trt.dtypes import DTYPES
from forcing_kv.runtime_trt.errors import BackendUnavailableError, BundleError, require
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.ports import steady_name
from forcing_kv.runtime_trt.rollout.timeline import ChunkPlan

_LARGE_NBYTES = 16_000_000
"""Of the feed-forward's hidden layer, from which on scratch memory is given back."""
_SHRINK = "memory.enable_memory_arena_shrinkage"


class OnnxRuntimeBackend(StepwiseBackend):
    """Runs the bundle's graphs over preallocated numpy buffers, bound once.

    Args:
        num_threads: threads per graph; 0 leaves the choice to ONNX Runtime.

    Raises:
        BackendUnavailableError: the bundle's dtype is one that ONNX Runtime has no kernels for.
        BundleError: a file is missing or altered, or a graph does not fit the manifest or does not
            load.
    """

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, num_threads: int = 0) -> None:
        manifest = bundle.manifest
        super().__init__(manifest.config)
        if manifest.config.dtype == "bfloat16":
            raise BackendUnavailableError(
                "this bundle is bfloat16, which ONNX Runtime on the CPU does not run; build it for "
                "a GPU, or export it with --dtype float32 (or float16)"
            )
        self.buffers: dict[str, NDArray[Any]] = {}
        graphs = {**manifest.graphs, **manifest.onnxruntime}
        # Its own attention works at exact lengths, so that the steady form has nothing to spare (2
        # layers of Wan 1.3B at 480p: 17.4 s a step, 17.5 s in the general form) and would hold the
        # weights once more.
        graphs.pop(steady_name("step"), None)
        sessions = onnx_sessions(bundle, graphs, bundle.check_graphs(graphs), num_threads)
        options = run_options(manifest.config)
        self._graphs = {
            name: _BoundGraph(session, graphs[name], self.buffers, options)
            for name, session in sessions.items()
        }

    def set_prompt(self, prompt_embeds: Float32) -> None:
        self.buffers["prompt_embeds"][...] = prompt_embeds
        self._graphs["prompt"].run()

    def run_step(
        self, x: Any, eps: Float32 | None, scalars: StepScalars, positions: ChunkPositions
    ) -> tuple[Float32, Float32]:
        """Returns the output buffers themselves."""
        for name, value in self.pass_inputs(x, eps, scalars, positions).items():
            if name in self.buffers:  # A fused graph's own inputs are not there.
                self.buffers[name][...] = value
        self._graphs["step"].run()
        return self.buffers["x0"], self.buffers["x_next"]

    def run_evict(self) -> tuple[Float32, NDArray[np.int32]]:
        self._graphs["evict"].run()
        return self.buffers["scores"].copy(), self.buffers["kept"].copy()

    def commit(self, plan: ChunkPlan) -> None:
        copy_rows(plan, self.config, self.buffers)

    def read_tensor(self, name: str) -> NDArray[Any]:
        return self.buffers[name].copy()

    def close(self) -> None:
        self._graphs.clear()
        self.buffers.clear()


def run_options(config: RolloutConfig) -> Any:
    """How graphs are run: whether ONNX Runtime gives scratch memory back after each.

    What it keeps grows by the next power of two where shapes are known when it runs alone. Of two
    layers of Wan 1.3B at 480p the peak is 1.9 GB instead of 2.7, in the same time; chunks of the
    digits model would take a fifth longer.
    """
    options = require("onnxruntime").RunOptions()
    model = config.model
    hidden = config.chunk.num_tokens * model.ffn_dim * DTYPES[config.dtype].nbytes
    if hidden > _LARGE_NBYTES:
        options.add_run_config_entry(_SHRINK, "cpu:0")
    return options


def onnx_sessions(
    bundle: Bundle,
    graphs: Mapping[str, GraphInfo],
    files: Mapping[str, OnnxFile],
    num_threads: int,
    provider: str = "CPUExecutionProvider",
    remedy: str = "export the bundle again",
) -> dict[str, Any]:
    """A quiet ONNX Runtime session of each graph, made of bytes in memory: it opens no file.

    Args:
        files: what the graphs say of themselves, compared with the manifest.

    Raises:
        BundleError: a graph does not load; says `remedy`.
    """
    ort = require("onnxruntime")
    found = {}
    for name, graph in graphs.items():
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        # Sessions alternate, and a spinning one would hold the cores that the next one needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        values = _outside_values(ort, bundle, files[name])
        options.add_external_initializers(list(values), list(values.values()))
        try:
            found[name] = ort.InferenceSession(
                bundle.read(graph.file), options, providers=[provider]
            )
        except Exception as error:
            raise BundleError(
                f"{bundle}/{graph.file}: ONNX Runtime cannot load it ({error}); {remedy}"
            ) from error
    return found


def _outside_values(ort: Any, bundle: Bundle, file: OnnxFile) -> dict[str, Any]:
    """A graph's larger tensors; a session copies them when it is made."""
    values = {}
    for tensor in file.outside:
        content = bundle.piece(file.weights_file, tensor.offset, tensor.nbytes)
        array = content.view(tensor.element.numpy).reshape(tensor.shape)
        values[tensor.name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            array, tensor.element.onnx_code
        )
    return values


class _BoundGraph:
    """One ONNX Runtime session with all inputs and outputs bound to shared buffers."""

    def __init__(
        self, session: Any, graph: GraphInfo, buffers: dict[str, NDArray[Any]], options: Any
    ) -> None:
        self._session, self._options = session, options
        values = require("onnxruntime").OrtValue
        self._binding = self._session.io_binding()
        for info in (*graph.inputs, *graph.outputs):
            if info.name not in buffers:
                buffers[info.name] = np.zeros(info.shape, DTYPES[info.dtype].numpy)
        for info in graph.inputs:
            value = values.ortvalue_from_numpy(buffers[info.name])
            self._binding.bind_ortvalue_input(info.name, value)
        for info in graph.outputs:
            value = values.ortvalue_from_numpy(buffers[info.name])
            self._binding.bind_ortvalue_output(info.name, value)

    def run(self) -> None:
        """Run once; outputs land in the bound buffers."""
        self._session.run_with_iobinding(self._binding, self._options)
