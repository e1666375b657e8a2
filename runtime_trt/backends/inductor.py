"""Graphs compiled by AOTInductor, run one after another on torch tensors; CPU or CUDA.

On CUDA the production path is the chunk graph (`backends/chunk_graph.py` over `InductorEngine`);
this one enqueues every graph on its own there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.backends.base import (
    Backend,
    ChunkPositions,
    Float32,
    StepScalars,
    copy_rows,
    outputs_of,
)
from forcing_kv.runtime_trt.config import RolloutConfig
from forcing_kv.runtime_trt.errors import require
from forcing_kv.runtime_trt.inductor_package import InductorPackage
from forcing_kv.runtime_trt.text_fold import fold_text
from forcing_kv.runtime_trt.timeline import ChunkPlan

if TYPE_CHECKING:
    from torch import Tensor


class InductorBackend(Backend):
    """Runs a package over pools that it owns.

    Args:
        config: rollout configuration.
        package: compiled graphs; closed with this backend.
    """

    name = "inductor"

    def __init__(self, config: RolloutConfig, package: InductorPackage) -> None:
        super().__init__(config)
        self._torch = require("torch", extra="inductor")
        self.package = package
        self.tensors: dict[str, Tensor] = {}
        """Inputs and outputs by name: pools, text and the last pass's results."""
        dtype = getattr(self._torch, config.dtype)
        for part in "kv":
            for layer, layout in enumerate(config.layouts):
                self.tensors[f"hist_{part}.{layer}"] = self._torch.zeros(
                    layout.num_rows, config.model.head_dim, dtype=dtype, device=package.device
                )

    def _put(self, **arrays: Any) -> None:
        for name, array in arrays.items():
            self.tensors[name] = self._torch.as_tensor(array, device=self.package.device)

    def _run(self, graph: str) -> None:
        with self._torch.inference_mode():
            self.tensors |= self.package.run(graph, self.tensors)

    def set_prompt(self, prompt_embeds: Float32) -> None:
        """See base class."""
        rows = self.num_text_rows
        if rows != len(prompt_embeds) or self._folds_text:
            prompt_embeds, bias = fold_text(prompt_embeds, rows, self.config.dtype)
            self._put(text_bias=bias)
        self._put(prompt_embeds=prompt_embeds)
        self._run("prompt")

    @property
    def num_text_rows(self) -> int:
        """See base class."""
        (port,) = self.package.graphs["prompt"].inputs
        return port.shape[0]

    def outputs_of(self, graph: str) -> Collection[str]:
        """See base class."""
        return outputs_of(self.package.graphs, graph)

    @property
    def _folds_text(self) -> bool:
        return any(port.name == "text_bias" for port in self.package.graphs["step"].inputs)

    def run_step(
        self, x: Any, eps: Float32 | None, scalars: StepScalars, positions: ChunkPositions
    ) -> tuple[Tensor, Tensor]:
        """See base class; returns tensors on the device."""
        self._put(
            x=x,
            eps=np.zeros(self.config.latent_shape, np.float32) if eps is None else eps,
            time_sinusoid=scalars.time_sinusoid,
            step_index=np.asarray([scalars.index], np.int32),
            sigma=scalars.sigma,
            next_sigma=scalars.next_sigma,
            rope_cos=positions.rope_cos,
            rope_sin=positions.rope_sin,
            hist_len=positions.hist_len,
            new_len=positions.new_len,
        )
        if scalars.index == self.clean_scalars.index and "clean" in self.package.graphs:
            self._run("clean")
            return self.tensors["x"], self.tensors["x"]
        self._run("step")
        return self.tensors["x0"], self.tensors["x_next"]

    def run_evict(self) -> tuple[Float32, NDArray[np.int32]]:
        """See base class."""
        self._run("evict")
        return self.tensors["scores"].cpu().numpy(), self.tensors["kept"].cpu().numpy()

    def commit(self, plan: ChunkPlan) -> None:
        """See base class."""
        layers, evicted = range(self.config.model.num_layers), self.config.evicted_layers
        for part in "kv":
            pools = [self.tensors[f"hist_{part}.{layer}"] for layer in layers]
            new = [self.tensors[f"new_{part}.{layer}"] for layer in layers]
            chosen = evicted if plan.evict else ()
            dynamic = [self.tensors[f"dyn_{part}.{layer}"] for layer in chosen]
            with self._torch.inference_mode():
                copy_rows(plan, self.config, pools, new, dynamic)

    def read_pool(self, layer: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """See base class; float32."""
        return self.read_tensor(f"hist_k.{layer}"), self.read_tensor(f"hist_v.{layer}")

    def read_tensor(self, name: str) -> NDArray[Any]:
        """See base class; 16-bit floats as float32."""
        tensor = self.tensors[name]
        wide = tensor.float() if tensor.is_floating_point() else tensor
        array: NDArray[Any] = wide.cpu().numpy().copy()
        return array

    def close(self) -> None:
        """Drop the package and every tensor."""
        self.package.close()
        self.tensors.clear()
