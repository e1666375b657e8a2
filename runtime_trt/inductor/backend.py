"""Graphs compiled by AOTInductor, run one after another on torch tensors; CPU or CUDA.

On CUDA the production path is the chunk graph (`cuda/chunk_graph.py` over `InductorEngine`);
this one enqueues every graph on its own there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.backends.base import (
    ChunkPositions,
    Float32,
    StepScalars,
    form_of,
    outputs_of,
)
from forcing_kv.runtime_trt.backends.stepwise import StepwiseBackend, copy_rows
from forcing_kv.runtime_trt.errors import require
from forcing_kv.runtime_trt.inductor.package import InductorPackage
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.ports import pool_ports
from forcing_kv.runtime_trt.rollout.text_fold import fold_text
from forcing_kv.runtime_trt.rollout.timeline import ChunkPlan

if TYPE_CHECKING:
    from torch import Tensor


class InductorBackend(StepwiseBackend):
    """Runs a package over pools that it owns.

    Args:
        package: compiled graphs; closed with this backend.
    """

    name = "inductor"

    def __init__(self, config: RolloutConfig, package: InductorPackage) -> None:
        super().__init__(config)
        self._torch = require("torch", extra="inductor")
        self.package = package
        self.tensors: dict[str, Tensor] = {}
        """Inputs and outputs by name: pools, text and the last pass's results."""
        for port in pool_ports(config):
            self.tensors[port.name] = self._torch.zeros(
                port.shape, dtype=getattr(self._torch, port.dtype), device=package.device
            )

    def _put(self, **arrays: Any) -> None:
        for name, array in arrays.items():
            self.tensors[name] = self._torch.as_tensor(array, device=self.package.device)

    def _run(self, graph: str) -> None:
        with self._torch.inference_mode():
            self.tensors |= self.package.run(graph, self.tensors)

    def set_prompt(self, prompt_embeds: Float32) -> None:
        rows = self.num_text_rows
        step_inputs = [port.name for port in self.package.graphs["step"].inputs]
        if rows != len(prompt_embeds) or "text_bias" in step_inputs:
            prompt_embeds, bias = fold_text(prompt_embeds, rows, self.config.dtype)
            self._put(text_bias=bias)
        self._put(prompt_embeds=prompt_embeds)
        self._run("prompt")

    @property
    def num_text_rows(self) -> int:
        (port,) = self.package.graphs["prompt"].inputs
        return port.shape[0]

    def outputs_of(self, graph: str) -> Collection[str]:
        return outputs_of(self.package.graphs, graph)

    def run_step(
        self, x: Any, eps: Float32 | None, scalars: StepScalars, positions: ChunkPositions
    ) -> tuple[Tensor, Tensor]:
        """Returns tensors on the device."""
        self._put(**self.pass_inputs(x, eps, scalars, positions))
        plan, graphs = positions.plan, self.package.graphs
        if scalars.index == self.clean_scalars.index and "clean" in graphs:
            self._run(form_of("clean", plan, graphs))
            return self.tensors["x"], self.tensors["x"]
        self._run(form_of("step", plan, graphs))
        return self.tensors["x0"], self.tensors["x_next"]

    def run_evict(self) -> tuple[Float32, NDArray[np.int32]]:
        self._run("evict")
        return self.tensors["scores"].cpu().numpy(), self.tensors["kept"].cpu().numpy()

    def commit(self, plan: ChunkPlan) -> None:
        with self._torch.inference_mode():
            copy_rows(plan, self.config, self.tensors)

    def read_tensor(self, name: str) -> NDArray[Any]:
        """16-bit floats as float32."""
        tensor = self.tensors[name]
        wide = tensor.float() if tensor.is_floating_point() else tensor
        return wide.cpu().numpy().copy()

    def close(self) -> None:
        self.package.close()
        self.tensors.clear()
