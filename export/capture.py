"""Capture of the graphs with torch.export, with fixed shapes and named inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forcing_kv.export.denoiser import CausalWanModel
from forcing_kv.export.fusion import PLAIN, FusionOptions, fuse_gelu_, fuse_qkv_
from forcing_kv.export.graphs import CleanGraph, EvictGraph, PromptGraph, StepGraph
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


def graph_sources(
    model: CausalWanModel, config: RolloutConfig, fusion: FusionOptions = PLAIN
) -> Iterator[GraphSource]:
    """The graphs of one deployment: prompt, step, and as asked for clean and evict.

    Args:
        model: heads already in exported order, weights in the compute dtype; fused in
            place as `fusion` says.
        config: rollout configuration.
        fusion: which fusions to capture with; ONNX bundles hold the plain graphs.

    Raises:
        InputError: the fusions do not fit the model.
    """
    fusion.check(config.model.text_len)
    if fusion.qkv:
        fuse_qkv_(model)
    if fusion.gelu:
        fuse_gelu_(model)
    layers = range(config.model.num_layers)
    shape, chunk, dtype = config.model, config.chunk, model.dtype
    text_rows = fusion.text_rows or shape.text_len
    cross = (shape.num_heads, text_rows, shape.head_dim)

    def pools(chosen: Sequence[int]) -> list[Tensor]:
        rows = [config.layouts[layer].num_rows for layer in chosen]
        return [small(count, shape.head_dim, dtype=dtype) for count in rows]

    def stacks(size: tuple[int, ...], chosen: Sequence[int]) -> list[Tensor]:
        return [small(*size, dtype=dtype) for _ in chosen]

    def small(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=model.patch_embedding.weight.device)

    yield GraphSource(
        "prompt",
        PromptGraph(model),
        (small(text_rows, shape.text_dim),),
        ("prompt_embeds",),
        per_layer("cross_k", layers) + per_layer("cross_v", layers),
    )
    latents, temporal = config.latent_shape, (chunk.num_frames, shape.rope_pairs[0])
    time = {"time_sinusoid": small(1, shape.freq_dim)}
    if fusion.time_tables:
        time = {"step_index": small(1, dtype=torch.int32)}
    noise = {"sigma": small(1), "next_sigma": small(1)}
    positions = {
        "rope_cos": small(*temporal),
        "rope_sin": small(*temporal),
        "hist_len": small(shape.num_layers, shape.num_heads, dtype=torch.int32),
        "new_len": small(1, dtype=torch.int32),
    }
    text = {} if fusion.text_rows is None else {"text_bias": small(text_rows)}
    new_names = (*per_layer("new_k", layers), *per_layer("new_v", layers))

    def pass_source(name: str, module: nn.Module, single: dict[str, Tensor], read: Sequence[int],
                    outputs: tuple[str, ...]) -> GraphSource:  # fmt: skip
        """A pass that reads the pools and the text of the layers in `read`."""
        listed = {
            "hist_k": pools(read),
            "hist_v": pools(read),
            "cross_k": stacks(cross, read),
            "cross_v": stacks(cross, read),
        }
        names = [label for key in listed for label in per_layer(key, read)]
        arguments = (*single.values(), *listed.values(), *text.values())
        return GraphSource(name, module, arguments, (*single, *names, *text), outputs)

    x, eps = {"x": small(*latents)}, {"eps": small(*latents)}
    step = StepGraph(model, config, fusion=fusion).to(model.patch_embedding.weight.device)
    outputs = ("x0", "x_next", *(() if fusion.clean_graph else new_names))
    yield pass_source("step", step, {**x, **eps, **time, **noise, **positions}, layers, outputs)
    if fusion.clean_graph:
        clean = CleanGraph(model, config, fusion=fusion).to(step.get_buffer("spatial_cos").device)
        yield pass_source("clean", clean, {**x, **time, **positions}, layers[:-1], new_names)
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
