"""ONNX Runtime on the CPU: works everywhere; for tests, debugging and small models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.backends.base import (
    ChunkPositions,
    Float32,
    StepScalars,
    form_of,
)
from forcing_kv.runtime_trt.backends.stepwise import StepwiseBackend, copy_rows
from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo
from forcing_kv.runtime_trt.bundle.manifest import Manifest
from forcing_kv.runtime_trt.dtypes import DTYPES
from forcing_kv.runtime_trt.errors import BackendUnavailableError, BundleError, require
from forcing_kv.runtime_trt.rollout.timeline import ChunkPlan


class OnnxRuntimeBackend(StepwiseBackend):
    """Runs the bundle's graphs over preallocated numpy buffers, bound once.

    Args:
        bundle: directory of the bundle; hashes are checked by the caller.
        num_threads: threads per graph; 0 leaves the choice to ONNX Runtime.

    Raises:
        BackendUnavailableError: the bundle's dtype is one that ONNX Runtime has no kernels for.
        BundleError: a graph does not load, or does not fit the manifest.
    """

    name = "onnxruntime"

    def __init__(self, bundle: Path, manifest: Manifest, num_threads: int = 0) -> None:
        super().__init__(manifest.config)
        if manifest.config.dtype == "bfloat16":
            raise BackendUnavailableError(
                "this bundle is bfloat16, which ONNX Runtime on the CPU does not run; build it for "
                "a GPU, or export it with --dtype float32 (or float16)"
            )
        self.buffers: dict[str, NDArray[Any]] = {}
        self._graphs = {
            name: _BoundGraph(bundle, name, graph, self.buffers, num_threads)
            for name, graph in {**manifest.graphs, **manifest.onnxruntime}.items()
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
        self._graphs[form_of("step", positions.plan, self._graphs)].run()
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


def onnx_session(
    path: Path,
    num_threads: int,
    provider: str = "CPUExecutionProvider",
    remedy: str = "export the bundle again",
) -> Any:
    """A quiet ONNX Runtime session of one graph.

    Raises:
        BundleError: the graph does not load; says `remedy`.
    """
    ort = require("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    # Sessions alternate, and a spinning one would hold the cores that the next one needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:
        raise BundleError(f"{path}: ONNX Runtime cannot load it ({error}); {remedy}") from error


class _BoundGraph:
    """One ONNX Runtime session with all inputs and outputs bound to shared buffers."""

    def __init__(
        self,
        bundle: Path,
        name: str,
        graph: GraphInfo,
        buffers: dict[str, NDArray[Any]],
        num_threads: int,
    ) -> None:
        self._session = onnx_session(bundle / graph.file, num_threads)
        self._check(name, graph)
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

    def _check(self, name: str, graph: GraphInfo) -> None:
        actual: Mapping[str, Sequence[Any]] = {
            "inputs": self._session.get_inputs(),
            "outputs": self._session.get_outputs(),
        }
        for kind, found in actual.items():
            wanted = getattr(graph, kind)
            if [(v.name, tuple(v.shape)) for v in found] != [(v.name, v.shape) for v in wanted]:
                raise BundleError(
                    f"{graph.file}: the {kind} of graph {name} differ from the manifest; export "
                    "the bundle again"
                )

    def run(self) -> None:
        """Run once; outputs land in the bound buffers."""
        self._session.run_with_iobinding(self._binding)
