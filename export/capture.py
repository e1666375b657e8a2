"""Capture of the three graphs with torch.export, with fixed shapes and named inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forcing_kv.export.denoiser import CausalWanModel
from forcing_kv.export.graphs import EvictGraph, PromptGraph, StepGraph
from forcing_kv.runtime_trt.config import RolloutConfig

INDEX_SEPARATOR = "."
"""Per-layer tensors are named `hist_k.0`, `hist_k.1`, ..."""


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


def per_layer(name: str, layers: Sequence[int]) -> tuple[str, ...]:
    """Names of one tensor a layer."""
    return tuple(f"{name}{INDEX_SEPARATOR}{layer}" for layer in layers)


def graph_sources(model: CausalWanModel, config: RolloutConfig) -> Iterator[GraphSource]:
    """The graphs of one deployment: prompt, step and, if the policy selects segments, evict.

    Args:
        model: heads already in exported order, weights in the compute dtype.
        config: rollout configuration.
    """
    layers = range(config.model.num_layers)
    shape, chunk, dtype = config.model, config.chunk, model.dtype
    cross = (shape.num_heads, shape.text_len, shape.head_dim)
    yield GraphSource(
        "prompt",
        PromptGraph(model),
        (torch.zeros(shape.text_len, shape.text_dim),),
        ("prompt_embeds",),
        per_layer("cross_k", layers) + per_layer("cross_v", layers),
    )

    def pools(chosen: Sequence[int]) -> list[Tensor]:
        rows = [config.layouts[layer].num_rows for layer in chosen]
        return [torch.zeros(count, shape.head_dim, dtype=dtype) for count in rows]

    def stacks(size: tuple[int, ...], chosen: Sequence[int]) -> list[Tensor]:
        return [torch.zeros(size, dtype=dtype) for _ in chosen]

    def small(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(size, dtype=dtype)

    latents, temporal = config.latent_shape, (chunk.num_frames, shape.rope_pairs[0])
    step_inputs = {
        "x": small(*latents),
        "eps": small(*latents),
        "time_sinusoid": small(1, shape.freq_dim),
        "sigma": small(1),
        "next_sigma": small(1),
        "rope_cos": small(*temporal),
        "rope_sin": small(*temporal),
        "hist_len": small(shape.num_layers, shape.num_heads, dtype=torch.int32),
        "new_len": small(1, dtype=torch.int32),
    }
    per_layer_inputs = {
        "hist_k": pools(layers),
        "hist_v": pools(layers),
        "cross_k": stacks(cross, layers),
        "cross_v": stacks(cross, layers),
    }
    names = [name for key in per_layer_inputs for name in per_layer(key, layers)]
    yield GraphSource(
        "step",
        StepGraph(model, config),
        (*step_inputs.values(), *per_layer_inputs.values()),
        (*step_inputs, *names),
        ("x0", "x_next", *per_layer("new_k", layers), *per_layer("new_v", layers)),
    )
    chosen = config.evicted_layers
    if not chosen:
        return
    new = (shape.num_heads, chunk.num_tokens, shape.head_dim)
    evict_inputs = {
        "hist_k": pools(chosen),
        "hist_v": pools(chosen),
        "new_k": stacks(new, chosen),
        "new_v": stacks(new, chosen),
    }
    yield GraphSource(
        "evict",
        EvictGraph(config),
        tuple(evict_inputs.values()),
        tuple(name for key in evict_inputs for name in per_layer(key, chosen)),
        (*per_layer("dyn_k", chosen), *per_layer("dyn_v", chosen), "scores", "kept"),
    )
