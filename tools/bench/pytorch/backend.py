"""Every PyTorch subject of the benchmark as one backend: eager, compiled, captured or not.

Inputs lie in tensors at fixed addresses, so that parts of a chunk (denoise steps; clean pass;
eviction and commit) can be captured as CUDA graphs and replayed, with events between them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forcing_kv.export.cost.work import first_steady_chunk
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.model.graphs import EvictGraph, PromptGraph, own_rows
from forcing_kv.export.model.rewrite import sort_heads_
from forcing_kv.runtime_trt.backends.base import (
    ChunkPositions,
    ChunkRequest,
    ChunkResult,
    Float32,
    StepScalars,
)
from forcing_kv.runtime_trt.backends.stepwise import StepwiseBackend, copy_rows
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.ports import POSITIONS, kv_names, ports, ports_by_name
from forcing_kv.runtime_trt.rollout.timeline import ChunkPlan
from forcing_kv.tools.bench.pytorch.attention import empty_pools
from forcing_kv.tools.bench.pytorch.evict import PlainEvict
from forcing_kv.tools.bench.pytorch.options import HISTORIES, TorchOptions
from forcing_kv.tools.bench.pytorch.part_clock import PartClock
from forcing_kv.tools.bench.pytorch.parts import Parts, kind_of


@dataclass
class _Inputs:
    """Tensors at fixed addresses that change from chunk to chunk."""

    noise: Tensor
    eps: Tensor
    rope_cos: Tensor
    rope_sin: Tensor
    hist_len: Tensor
    new_len: Tensor
    latents: Tensor
    """x0 of the last denoise step."""


class TorchBackend(StepwiseBackend):
    """Runs a model with plain tensors on one device.

    Args:
        model: float32 weights, heads in checkpoint order; not changed.
        config: rollout configuration.
        device: where to run.
        options: how to run.
        forced: kept segments by chunk, in place of the selection (to follow another rollout).
    """

    def __init__(
        self,
        model: CausalWanModel,
        config: RolloutConfig,
        device: str,
        options: TorchOptions,
        forced: dict[int, NDArray[np.int32]] | None = None,
    ) -> None:
        super().__init__(config)
        self.name = f"torch-{options.style}"
        self.device = torch.device(device)
        self.forced = forced or {}
        self._options = options
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._first_steady = first_steady_chunk(config)
        self._parts = Parts(capture=options.cuda_graph)
        own = copy.deepcopy(model)
        history = None
        if options.style == "operators":
            self.pools = empty_pools(config, self.device)
        else:
            history = HISTORIES[options.style](config, self.device)
            self.pools = history.pools
        self._history = history
        if history is None or history.exported_order:
            own = sort_heads_(own, config.partition)
        own = own.cast_(self._dtype).to(self.device).eval()
        self._prompt = PromptGraph(own)
        self._evict, self._plain_evict = EvictGraph(config), PlainEvict(config)
        self._eager, self._pass = options.passes(
            own, config, self.pools if history is None else history
        )
        self._cross: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._inputs = self._new_inputs()
        self._scalars = [
            {
                name: torch.as_tensor(array, device=self.device)
                for name, array in scalars.arrays.items()
            }
            for scalars in (*self.step_scalars, self.clean_scalars)
        ]

    @property
    def nbytes_kv(self) -> int:
        """Bytes of the tensors that hold the past."""
        return sum(pool.nbytes for pools in self.pools.values() for pool in pools)

    @property
    def nbytes_own(self) -> int:
        """Bytes of the running chunk's and the selected rows, where they have own tensors."""
        if self._options.style == "dense":
            return 0
        stacks = (*self._parts.made.new, *self._parts.made.dynamic)
        return sum(rows.nbytes for stack in stacks for rows in stack)

    def _new_inputs(self) -> _Inputs:
        config = self.config
        known, draws = ports_by_name(ports(config)), config.schedule.num_steps - 1

        def zeros(name: str, *draws: int) -> Tensor:
            port = known[name]
            dtype: torch.dtype = getattr(torch, port.dtype)
            return torch.zeros((*draws, *port.shape), dtype=dtype, device=self.device)

        return _Inputs(
            noise=zeros("x"),
            eps=zeros("eps", max(1, draws)),
            latents=zeros("x0"),
            **{name: zeros(name) for name in POSITIONS},
        )

    @torch.inference_mode()
    def set_prompt(self, prompt_embeds: Float32) -> None:
        """See base class."""
        cross = self._prompt(torch.as_tensor(prompt_embeds, device=self.device))
        if not self._cross[0]:
            self._cross = cross
        for kept, made in zip(self._cross, cross, strict=True):
            for target, source in zip(kept, made, strict=True):
                target.copy_(source)

    @torch.inference_mode()
    def run_chunk(self, request: ChunkRequest) -> ChunkResult:
        """See base class; times are the device's, from the upload to the commit."""
        plan = request.plan
        self._upload(request)
        if self._history is not None:
            self._history.begin_chunk(plan)
        keep, forced = request.keep_x0, self.forced.get(plan.index)
        parts: dict[str, Callable[[], None]] = {
            "steps": lambda: self._denoise(plan, keep),
            "clean": lambda: self._clean(plan),
            "evict": lambda: self._select(plan, forced),
            "commit": lambda: self._store(plan),
        }
        # A captured part reads what the captured part before it made, so all share one key.
        kind = (kind_of(plan), keep, forced is None)
        clock = PartClock(self.device)
        for name, work in parts.items():
            self._parts.run((name, kind), work)
            clock.mark()
        result = ChunkResult(self._inputs.latents.cpu().numpy().copy())
        times = clock.elapsed_ms()
        result.timings_ms = dict(zip(parts, times, strict=True))
        result.timings_ms["chunk"] = sum(times)
        if keep:
            result.x0_steps = [x0.cpu().numpy().copy() for x0 in self._parts.made.x0_steps]
        if plan.evict and self._parts.made.selection is not None:
            scores, kept = self._parts.made.selection
            result.scores, result.kept = scores.cpu().numpy().copy(), kept.cpu().numpy().copy()
        return result

    def _upload(self, request: ChunkRequest) -> None:
        positions, inputs = ChunkPositions.of(request.plan, self.config), self._inputs
        inputs.noise.copy_(torch.from_numpy(request.noise))
        if len(request.eps):
            inputs.eps.copy_(torch.from_numpy(request.eps))
        for name, array in positions.arrays.items():
            getattr(inputs, name).copy_(torch.from_numpy(array))

    def _forward(self, x: Tensor, eps: Tensor, step: int, plan: ChunkPlan) -> tuple[Tensor, Tensor]:
        inputs, scalars = self._inputs, self._scalars[step]
        run = self._pass if self._is_steady(plan) else self._eager
        x0, x_next, *new = run(
            x, eps, scalars["time_sinusoid"], scalars["sigma"], scalars["next_sigma"],
            inputs.rope_cos, inputs.rope_sin, inputs.hist_len, inputs.new_len, *self._cross,
        )  # fmt: skip
        self._parts.made = replace(self._parts.made, new=(new[0], new[1]))
        return x0, x_next

    def _is_steady(self, plan: ChunkPlan) -> bool:
        """Whether every later chunk sees as many rows; only those are worth compiling for."""
        if self._options.steady_form:
            return plan.steady
        if self._history is None:
            return True
        return plan.index >= self._first_steady

    def _denoise(self, plan: ChunkPlan, keep: bool) -> None:
        inputs = self._inputs
        x, last = inputs.noise, self.config.schedule.num_steps - 1
        x0_steps = []
        for step in range(last + 1):
            x0, x = self._forward(x, inputs.eps[min(step, max(0, last - 1))], step, plan)
            if keep:
                x0_steps.append(x0)
        inputs.latents.copy_(x0)
        # Of new rows only the clean pass's are read: a captured part would hold these for good.
        self._parts.made = replace(self._parts.made, new=([], []), x0_steps=tuple(x0_steps))

    def _clean(self, plan: ChunkPlan) -> None:
        inputs = self._inputs
        self._forward(inputs.latents, inputs.eps[0], self.config.schedule.num_steps, plan)
        if self._history is not None and self._options.style != "dense":
            layouts = self.config.layouts
            new_k, new_v = (
                [own_rows(*pair) for pair in zip(rows, layouts, strict=True)]
                for rows in self._parts.made.new
            )
            self._parts.made = replace(self._parts.made, new=(new_k, new_v))

    def _select(self, plan: ChunkPlan, forced: NDArray[np.int32] | None) -> None:
        if not plan.evict:
            return
        layers = self.config.evicted_layers
        chosen = [
            [rows[layer] for layer in layers]
            for rows in (self.pools["k"], self.pools["v"], *self._parts.made.new)
        ]
        evict = self._evict if self._history is None else self._plain_evict
        dyn_k, dyn_v, scores, kept = evict(*chosen)
        if forced is not None:
            kept = torch.from_numpy(forced).to(self.device)
            dyn_k, dyn_v = self._plain_evict.take(kept, scores, *chosen)
        self._parts.made = replace(
            self._parts.made, dynamic=(dyn_k, dyn_v), selection=(scores, kept)
        )

    def _store(self, plan: ChunkPlan) -> None:
        if self._options.style == "dense":
            return
        config, made = self.config, self._parts.made
        layers = range(config.model.num_layers)
        tensors: dict[str, Tensor] = {}
        tensors |= zip(kv_names("hist", layers), chain(*self.pools.values()), strict=True)
        tensors |= zip(kv_names("new", layers), chain(*made.new), strict=True)
        if plan.evict:
            tensors |= zip(
                kv_names("dyn", config.evicted_layers), chain(*made.dynamic), strict=True
            )
        copy_rows(plan, config, tensors)

    def run_step(
        self, x: Any, eps: Float32 | None, scalars: StepScalars, positions: ChunkPositions
    ) -> tuple[Tensor, Tensor]:
        """See base class; not captured."""
        plan = positions.plan
        noise = np.zeros(self.config.latent_shape, np.float32) if eps is None else eps
        draws = np.repeat(noise[None], len(self._inputs.eps), axis=0)
        self._upload(ChunkRequest(plan, np.asarray(x), draws))
        if self._history is not None:
            self._history.begin_chunk(plan)
        with torch.inference_mode():
            return self._forward(self._inputs.noise, self._inputs.eps[0], scalars.index, plan)

    def run_evict(self) -> tuple[Float32, NDArray[np.int32]]:
        """Not used: `run_chunk` does it all."""
        raise NotImplementedError

    def commit(self, plan: ChunkPlan) -> None:
        """Not used: `run_chunk` does it all."""
        raise NotImplementedError

    def read_pool(self, layer: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """See base class; float32."""
        k, v = (self.pools[part][layer].float().cpu().numpy() for part in "kv")
        return k, v

    def close(self) -> None:
        """Drop graphs and tensors."""
        self._parts.close()
        self._cross = ([], [])
        for pools in self.pools.values():
            pools.clear()
