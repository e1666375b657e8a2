"""The eager PyTorch backend: the reference that every other backend is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forcing_kv.export.denoiser import CausalWanModel
from forcing_kv.export.graphs import EvictGraph, PromptGraph, StepGraph
from forcing_kv.export.rewrite import share_weights, sort_heads_
from forcing_kv.runtime_trt.backends.base import (
    Backend,
    ChunkPositions,
    Float32,
    StepScalars,
    copy_rows,
)
from forcing_kv.runtime_trt.config import RolloutConfig
from forcing_kv.runtime_trt.session import Session
from forcing_kv.runtime_trt.timeline import ChunkPlan


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


class EagerBackend(Backend):
    """Runs the exported graphs as plain PyTorch modules.

    Args:
        model: weights under the official names, heads in checkpoint order; not changed, and
            shared where neither order nor dtype nor device differ.
        config: rollout configuration; its dtype is the compute dtype.
        device: where to run.
        observer: called in every self-attention, once for each group of heads.
        select: replaces the published selection (for ablations).
    """

    name = "eager"

    def __init__(
        self,
        model: CausalWanModel,
        config: RolloutConfig,
        device: torch.device | str = "cpu",
        observer: Observer | None = None,
        select: SelectSegments | None = None,
    ) -> None:
        super().__init__(config)
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        sorted_model = sort_heads_(share_weights(model), config.partition)
        sorted_model = sorted_model.cast_(self.dtype).to(self.device).eval()
        self.model = sorted_model
        """What runs: heads in exported order, weights in the compute dtype."""
        self._prompt = PromptGraph(sorted_model)
        self._step = StepGraph(
            sorted_model, config, None if observer is None else self._observe
        ).to(self.device)
        self._evict = EvictGraph(config)
        self._select = select
        self._observer = observer
        self._running: tuple[ChunkPlan, int] | None = None
        self.hist_k, self.hist_v = (
            [
                torch.zeros(
                    layout.num_rows, config.model.head_dim, dtype=self.dtype, device=self.device
                )
                for layout in config.layouts
            ]
            for _ in range(2)
        )
        self._cross: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._new: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._dynamic: tuple[list[Tensor], list[Tensor]] = ([], [])

    def _tensor(self, array: NDArray[Any] | Tensor) -> Tensor:
        return torch.as_tensor(array, device=self.device)

    @torch.inference_mode()
    def set_prompt(self, prompt_embeds: Float32) -> None:
        """See base class."""
        self._cross = self._prompt(self._tensor(prompt_embeds))

    @torch.inference_mode()
    def run_step(
        self, x: Any, eps: Float32 | None, scalars: StepScalars, positions: ChunkPositions
    ) -> tuple[Tensor, Tensor]:
        """See base class; returns tensors on the device."""
        self._running = (positions.plan, scalars.index)
        self._new = ([], [])  # The last step's rows: freed before this step makes as many.
        x = self._tensor(x)
        noise = torch.zeros_like(x) if eps is None else self._tensor(eps)
        small = (
            scalars.time_sinusoid,
            scalars.sigma,
            scalars.next_sigma,
            positions.rope_cos,
            positions.rope_sin,
            positions.hist_len,
            positions.new_len,
        )
        inputs = [self._tensor(array) for array in small]
        x0, x_next, *self._new = self._step(
            x, noise, *inputs, self.hist_k, self.hist_v, *self._cross
        )
        return x0, x_next

    def to_host(self, x: Tensor) -> Float32:
        """See base class."""
        return x.cpu().numpy().copy()

    @torch.inference_mode()
    def run_evict(self) -> tuple[Float32, NDArray[np.int32]]:
        """See base class."""
        layers = self.config.evicted_layers
        chosen = [[rows[i] for i in layers] for rows in (self.hist_k, self.hist_v, *self._new)]
        dyn_k, dyn_v, scores, kept = self._evict(*chosen)
        if self._select is not None:
            kept = self._tensor(self._select(scores.cpu().numpy()))
            forced = torch.ones_like(scores).flatten()
            forced[kept.long()] = -1.0
            dyn_k, dyn_v, _ = self._evict.compact([forced.view_as(scores)], *chosen)
        self._dynamic = (dyn_k, dyn_v)
        self._scores: Float32 = scores.cpu().numpy()
        return self._scores, kept.cpu().numpy()

    @torch.inference_mode()
    def commit(self, plan: ChunkPlan) -> None:
        """See base class."""
        copy_rows(plan, self.config, self.hist_k, self._new[0], self._dynamic[0])
        copy_rows(plan, self.config, self.hist_v, self._new[1], self._dynamic[1])

    def _observe(self, layer: int, q: Tensor, k: Tensor) -> None:
        assert self._observer is not None
        assert self._running is not None
        plan, step = self._running
        frames = tuple(range(plan.first_frame, plan.first_frame + plan.num_frames))
        tokens, order = self.config.chunk.tokens_per_frame, self.config.partition.head_order(layer)
        for group in self.config.layouts[layer].groups:
            history = plan.groups[group.kind].history
            pool = self.hist_k[layer][group.rows].view(group.num_heads, -1, k.shape[-1])
            own = k[group.heads, : plan.num_frames * tokens]
            keys = torch.cat([pool[:, : len(history) * tokens], own], dim=1)
            heads = order[group.heads]
            queries = q[group.heads, : plan.num_frames * tokens]
            self._observer(
                AttentionCall(plan.index, step, layer, heads, queries, keys, history + frames)
            )

    def close(self) -> None:
        """Drop buffers."""
        self.hist_k, self.hist_v = [], []
        self._cross = self._new = self._dynamic = ([], [])

    def read_tensor(self, name: str) -> NDArray[Any]:
        """See base class; float32."""
        stem, _, index = name.partition(".")
        kind, _, part = stem.rpartition("_")
        if stem == "scores":
            return self._scores
        stacks = {"cross": self._cross, "new": self._new, "dyn": self._dynamic}
        layer = int(index)
        if kind == "dyn":
            layer = self.config.evicted_layers.index(layer)
        return stacks[kind]["kv".index(part)][layer].float().cpu().numpy()

    def read_pool(self, layer: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """See base class; float32."""
        k, v = self.hist_k[layer], self.hist_v[layer]
        return k.float().cpu().numpy(), v.float().cpu().numpy()


def eager_session(model: CausalWanModel, config: RolloutConfig, **options: Any) -> Session:
    """A session on the eager backend; `options` are those of `EagerBackend`."""
    return Session(EagerBackend(model, config, **options))
