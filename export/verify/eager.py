"""The eager PyTorch backend: the reference that every other backend is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.model.graphs import EvictGraph, PromptGraph, StepGraph
from forcing_kv.export.model.rewrite import share_weights, sort_heads_
from forcing_kv.runtime_trt.backends.base import (
    ChunkPositions,
    Float32,
    StepScalars,
    form_of,
)
from forcing_kv.runtime_trt.backends.stepwise import StepwiseBackend, copy_rows
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.ports import kv_name, kv_names, pool_ports, ports, steady_name
from forcing_kv.runtime_trt.rollout.timeline import ChunkPlan
from forcing_kv.runtime_trt.session import Session


@dataclass(frozen=True)
class AttentionCall:
    """One self-attention of heads that share a history, as an observer sees it."""

    chunk: int
    step: int
    """Denoise step; n for the clean pass."""
    layer: int
    heads: tuple[int, ...]
    """The checkpoint's head indices, in the order of q and k."""
    q: Tensor
    """[heads, N, D], post-norm and post-RoPE."""
    k: Tensor
    """[heads, M, D], history rows first, then the chunk's own."""
    key_frames: tuple[int, ...]
    """Frame of each run of T keys; -1 for selected segments."""


Observer = Callable[[AttentionCall], None]
SelectSegments = Callable[[Float32], NDArray[np.int32]]
"""scores [F, P] -> kept segments [B * P], ascending; replaces the published selection."""


class EagerBackend(StepwiseBackend):
    """Runs the exported graphs as plain PyTorch modules.

    Args:
        model: weights under the official names, heads in checkpoint order; not changed, and
            shared where neither order nor dtype nor device differ.
        config: rollout configuration; its dtype is the compute dtype.
        observer: called in every self-attention, once for each group of heads.
        select: replaces the published selection (for ablations).
        use_steady: steady chunks take the steady form; else the general one serves them all.
    """

    name = "eager"

    def __init__(
        self,
        model: CausalWanModel,
        config: RolloutConfig,
        device: torch.device | str = "cpu",
        observer: Observer | None = None,
        select: SelectSegments | None = None,
        *,
        use_steady: bool = False,
    ) -> None:
        super().__init__(config)
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        sorted_model = sort_heads_(share_weights(model), config.partition)
        sorted_model = sorted_model.cast_(self.dtype).to(self.device).eval()
        self.model = sorted_model
        """What runs: heads in exported order, weights in the compute dtype."""
        watch = None if observer is None else self._observe
        self._evict = EvictGraph(config)
        self._modules: dict[str, Callable[..., Any]] = {
            "prompt": PromptGraph(sorted_model),
            "step": StepGraph(sorted_model, config, watch).to(self.device),
            "evict": self._evict,
        }
        if use_steady:
            step = StepGraph(sorted_model, config, watch, steady=True)
            self._modules[steady_name("step")] = step.to(self.device)
        self._select = select
        self._observer = observer
        self._running: tuple[ChunkPlan, int] | None = None
        self._ports = ports(config)
        self.tensors: dict[str, Tensor] = {
            port.name: torch.zeros(port.shape, dtype=getattr(torch, port.dtype), device=self.device)
            for port in pool_ports(config)
        }
        """Inputs and outputs of the graphs by name: pools, text and the last pass's results."""

    def _tensor(self, array: NDArray[Any] | Tensor) -> Tensor:
        return torch.as_tensor(array, device=self.device)

    def _put(self, tensors: Mapping[str, NDArray[Any] | Tensor]) -> None:
        self.tensors |= {name: self._tensor(value) for name, value in tensors.items()}

    def _run(self, graph: str) -> None:
        self._keep(graph, self._modules[graph](*self._ports[graph].bind(self.tensors)))

    def _keep(self, graph: str, outputs: Any) -> None:
        names = (port.name for port in self._ports[graph].outputs)
        self.tensors |= zip(names, tree_leaves(outputs), strict=True)

    @torch.inference_mode()
    def set_prompt(self, prompt_embeds: Float32) -> None:
        self._put({"prompt_embeds": prompt_embeds})
        self._run("prompt")

    @torch.inference_mode()
    def run_step(
        self, x: Any, eps: Float32 | None, scalars: StepScalars, positions: ChunkPositions
    ) -> tuple[Tensor, Tensor]:
        """Returns tensors on the device."""
        self._running = (positions.plan, scalars.index)
        # The last step's rows: freed before this step makes as many.
        for name in kv_names("new", range(self.config.model.num_layers)):
            self.tensors.pop(name, None)
        self._put(self.pass_inputs(x, eps, scalars, positions))
        self._run(form_of("step", positions.plan, self._modules))
        return self.tensors["x0"], self.tensors["x_next"]

    def to_host(self, x: Tensor) -> Float32:
        return x.cpu().numpy().copy()

    @torch.inference_mode()
    def run_evict(self) -> tuple[Float32, NDArray[np.int32]]:
        self._run("evict")
        scores, kept = self.tensors["scores"], self.tensors["kept"]
        if self._select is not None:
            kept = self._tensor(self._select(scores.cpu().numpy()))
            forced = torch.ones_like(scores).flatten()
            forced[kept.long()] = -1.0
            rows: Any = self._ports["evict"].bind(self.tensors)
            dyn_k, dyn_v, _ = self._evict.compact([forced.view_as(scores)], *rows)
            self._keep("evict", (dyn_k, dyn_v, scores, kept))
        return scores.cpu().numpy(), kept.cpu().numpy()

    @torch.inference_mode()
    def commit(self, plan: ChunkPlan) -> None:
        copy_rows(plan, self.config, self.tensors)

    def _observe(self, layer: int, q: Tensor, k: Tensor) -> None:
        assert self._observer is not None
        assert self._running is not None
        plan, step = self._running
        frames = tuple(range(plan.first_frame, plan.first_frame + plan.num_frames))
        tokens, order = self.config.chunk.tokens_per_frame, self.config.partition.head_order(layer)
        history_name = kv_name("hist", "k", layer)
        for group in self.config.layouts[layer].groups:
            history = plan.groups[group.kind].history
            pool = self.tensors[history_name][group.rows].view(group.num_heads, -1, k.shape[-1])
            own = k[group.heads, : plan.num_frames * tokens]
            keys = torch.cat([pool[:, : len(history) * tokens], own], dim=1)
            heads = order[group.heads]
            queries = q[group.heads, : plan.num_frames * tokens]
            self._observer(
                AttentionCall(plan.index, step, layer, heads, queries, keys, history + frames)
            )

    def close(self) -> None:
        self.tensors.clear()

    def read_tensor(self, name: str) -> NDArray[Any]:
        """As float32."""
        return self.tensors[name].float().cpu().numpy()


def eager_session(model: CausalWanModel, config: RolloutConfig, **options: Any) -> Session:
    """A session on the eager backend; `options` are those of `EagerBackend`."""
    return Session(EagerBackend(model, config, **options))
