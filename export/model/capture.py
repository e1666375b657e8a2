"""Capture of the graphs with torch.export, with fixed shapes and named inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.model.fusion import PLAIN, FusionOptions, fuse_gelu_, fuse_qkv_
from forcing_kv.export.model.graphs import CleanGraph, EvictGraph, PromptGraph, StepGraph
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.ports import steady_name


@dataclass(frozen=True)
class GraphSource:
    """A graph ready to be captured."""

    name: str
    module: nn.Module
    arguments: tuple[Any, ...]
    """Example inputs; lists where the graph takes one tensor a layer."""
    input_names: tuple[str, ...]
    """Names of the flattened inputs."""
    output_names: tuple[str, ...]

    def capture(self) -> torch.export.ExportedProgram:
        """Trace the module with fixed shapes."""
        with torch.no_grad():
            return torch.export.export(self.module, self.arguments, strict=False)


def graph_sources(
    model: CausalWanModel, config: RolloutConfig, fusion: FusionOptions = PLAIN
) -> Iterator[GraphSource]:
    """The graphs of one deployment: prompt, step, and as asked for clean and evict.

    Args:
        model: heads already in exported order, weights in the compute dtype; fused in
            place as `fusion` says.
        fusion: which fusions to capture with; ONNX bundles hold the plain graphs.

    Raises:
        InputError: the fusions do not fit the model.
    """
    fusion.check(config.model.text_len)
    if fusion.qkv:
        fuse_qkv_(model)
    if fusion.gelu:
        fuse_gelu_(model)
    modules: Mapping[str, Callable[[], nn.Module]] = {
        "prompt": lambda: PromptGraph(model),
        "step": lambda: StepGraph(model, config, fusion=fusion),
        steady_name("step"): lambda: StepGraph(model, config, fusion=fusion, steady=True),
        "clean": lambda: CleanGraph(model, config, fusion=fusion),
        steady_name("clean"): lambda: CleanGraph(model, config, fusion=fusion, steady=True),
        "evict": lambda: EvictGraph(config),
    }
    device = model.patch_embedding.weight.device
    for name, graph in fusion.ports(config).items():
        zeros = {
            port.name: torch.zeros(port.shape, dtype=getattr(torch, port.dtype), device=device)
            for port in graph.inputs
        }
        yield GraphSource(
            name,
            modules[name]().to(device),
            graph.bind(zeros),
            tuple(port.name for port in graph.inputs),
            tuple(port.name for port in graph.outputs),
        )
