"""How a PyTorch subject runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.model.fusion import PLAIN, FusionOptions, fuse_qkv_
from forcing_kv.export.model.graphs import StepGraph
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.tools.bench.pytorch.attention import (
    DenseHistory,
    GroupedHistory,
    History,
    ReferenceHistory,
)
from forcing_kv.tools.bench.pytorch.passes import BaselinePass, OperatorPass, Pass, compiled

Pools = dict[str, list[torch.Tensor]]
Style = Literal["dense", "grouped", "reference", "operators"]

HISTORIES: dict[str, Callable[[RolloutConfig, torch.device], History]] = {
    "dense": DenseHistory,
    "grouped": GroupedHistory,
    "reference": ReferenceHistory,
}


@dataclass(frozen=True)
class TorchOptions:
    """How a PyTorch subject runs."""

    style: Style
    """How it attends to the past; `operators` is our operators in the exported graph."""
    compile_mode: str | None = None
    """Mode of `torch.compile`; None runs eagerly."""
    cuda_graph: bool = False
    """Capture and replay the parts of a chunk."""
    fusion: FusionOptions = PLAIN
    """Fusions of the exported graph; `operators` alone, q, k and v alone."""
    steady_form: bool = False
    """Steady chunks by the graph's steady form; `operators` alone."""

    def passes(
        self, model: CausalWanModel, config: RolloutConfig, past: History | Pools
    ) -> tuple[Pass, Pass]:
        """The eager pass and the one to use in steady chunks.

        Args:
            model: in the compute dtype, on its device; fused in place where asked.
            config: rollout configuration.
            past: what baselines attend by; the pools that our operators read.
        """
        module: torch.nn.Module
        if isinstance(past, dict):
            if self.fusion.qkv:
                fuse_qkv_(model)
            module = self._operator_pass(model, config, past)
            if self.steady_form:
                return module, self._operator_pass(model, config, past, steady=True)
        else:
            module = BaselinePass(model, config, past)
        eager: Any = module
        if self.compile_mode is None:
            return eager, eager
        return eager, compiled(module, self.compile_mode)

    def _operator_pass(
        self, model: CausalWanModel, config: RolloutConfig, pools: Pools, *, steady: bool = False
    ) -> OperatorPass:
        step = StepGraph(model, config, fusion=self.fusion, steady=steady)
        return OperatorPass(step.to(model.patch_embedding.weight.device), pools)
