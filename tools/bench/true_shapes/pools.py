"""The steady state without a rollout that leads to it: pools full of random rows.

Time depends on lengths alone. Values are of a trained model's scale, so that the gate compares
attention that is neither uniform nor a single key.

Legend: H heads, G heads of a group, D head dim, M rows of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.ports import PARTS, Part, kv_name
from forcing_kv.runtime_trt.rollout.timeline import ChunkPlan
from forcing_kv.tools.bench.workloads import SHARPNESS

SCALES = {"k": SHARPNESS, "v": 0.6}
"""Keys are normalised to their norm's gain; values are what a fresh linear layer makes of a
normalised input."""


def fill_history(backend: Any, plan: ChunkPlan) -> None:
    """Overwrite the history of a backend on the CPU, every head and layer with rows of its own.

    The same configuration gives every backend the same rows, which bfloat16 holds exactly.

    Args:
        plan: the chunk that will see them; a dense ring keeps its slot free.
    """
    config = backend.config
    layers = range(config.model.num_layers)
    for part in PARTS:
        for layer, pool in zip(layers, _pools(backend, part), strict=True):
            generator = torch.Generator().manual_seed(2 * layer + (part == "v"))
            for head in _heads(pool, config, layer, plan):
                rows = torch.empty(head.shape).normal_(0, SCALES[part], generator=generator)
                head.copy_(rows.bfloat16())


def _pools(backend: Any, part: Part) -> list[Tensor]:
    """Keys or values of every layer, as tensors over the backend's own memory."""
    if hasattr(backend, "pools"):
        found: list[Tensor] = backend.pools[part]
        return found
    held = backend.tensors if hasattr(backend, "tensors") else backend.buffers
    layers = range(backend.config.model.num_layers)
    return [torch.as_tensor(held[kv_name("hist", part, layer)]) for layer in layers]


def _heads(pool: Tensor, config: RolloutConfig, layer: int, plan: ChunkPlan) -> Iterator[Tensor]:
    """Each head's history rows [.., D], as a view; one of a ring in slots [slots, rows, D]."""
    if pool.dim() == 3:
        tokens = config.chunk.num_tokens
        for head in pool:
            slots = head.unflatten(0, (-1, tokens))
            own = plan.index % len(slots)
            yield from (slot for index, slot in enumerate(slots) if index != own)
        return
    for group in config.layouts[layer].groups:
        yield from pool[group.rows].unflatten(0, (group.num_heads, group.rows_per_head))
