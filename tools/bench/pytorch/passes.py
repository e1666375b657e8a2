"""The denoiser's passes over a chunk with any way to attend: eager baselines and our operators.

Legend: N tokens, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from forcing_kv.export.model.denoiser import (
    Attention,
    CausalWanModel,
    rms_norm,
    rotate_pairs,
    unpatchify,
)
from forcing_kv.export.model.graphs import ChunkInputs, StepGraph
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.tools.bench.pytorch.attention import History

Rows = list[Tensor]


class Pass(Protocol):
    """A forward over one chunk: x0, x_next, and the new keys and values per layer."""

    def __call__(
        self, x: Tensor, eps: Tensor, time: Tensor, sigma: Tensor, next_sigma: Tensor,
        rope_cos: Tensor, rope_sin: Tensor, hist_len: Tensor, new_len: Tensor,
        cross_k: Sequence[Tensor], cross_v: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Rows, Rows]: ...  # fmt: skip


class BaselinePass(nn.Module):
    """A plain port: PyTorch operators alone, attention over the past by a `History`."""

    def __init__(self, model: CausalWanModel, config: RolloutConfig, history: History) -> None:
        super().__init__()
        # Its angles, and nothing else of it, are used.
        self._tables = StepGraph(model, config).to(model.patch_embedding.weight.device)
        self.model = model
        self._config = config
        self._history = history

    def forward(
        self, x: Tensor, eps: Tensor, time: Tensor, sigma: Tensor, next_sigma: Tensor,
        rope_cos: Tensor, rope_sin: Tensor, hist_len: Tensor, new_len: Tensor,
        cross_k: Sequence[Tensor], cross_v: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Rows, Rows]:  # fmt: skip
        """See `Pass`; the lengths are the history's affair."""
        model, chunk = self.model, self._config.chunk
        inputs = ChunkInputs(rope_cos, rope_sin, (hist_len, new_len), [], [], cross_k, cross_v)
        cos, sin = self._tables.angles(inputs)
        embedding, projected = model.embed_time(time)
        tokens = model.embed_latents(x)
        new_k: Rows = []
        new_v: Rows = []
        for layer, block in enumerate(model.layers):

            def attend(
                q: Tensor, k: Tensor, v: Tensor, layer: int = layer,
                attn: Attention = block.self_attn,
            ) -> Tensor:  # fmt: skip
                q = rotate_pairs(_heads(q, attn, "norm_q"), cos, sin)
                k = rotate_pairs(_heads(k, attn, "norm_k"), cos, sin)
                v = attn.split_heads(v)
                out = self._history.attend(layer, q, k, v)
                order = self._config.partition.head_order(layer)
                identity = self._history.exported_order or list(order) == sorted(order)
                new_k.append(k if identity else k[list(order)])
                new_v.append(v if identity else v[list(order)])
                return out.flatten(1)

            tokens = block(tokens, projected, attend, cross_k[layer], cross_v[layer])
        patches = model.head(tokens, embedding).float()
        flow = unpatchify(patches, chunk.num_frames, chunk.grid, chunk.patch_size)
        x0 = x - sigma * flow
        return x0, (1 - next_sigma) * x0 + next_sigma * eps, new_k, new_v


def _heads(x: Tensor, attn: Attention, norm: str) -> Tensor:
    """Normalise x [N, H * D] over the model width and split it into heads [H, N, D]."""
    module = getattr(attn, norm)
    return attn.split_heads(rms_norm(x, module.weight, module.eps))


class OperatorPass(nn.Module):
    """The exported step: our operators, fused as it says."""

    def __init__(self, step: StepGraph, pools: dict[str, list[Tensor]]) -> None:
        super().__init__()
        self._step = step
        self._pools = pools

    def forward(
        self, x: Tensor, eps: Tensor, time: Tensor, sigma: Tensor, next_sigma: Tensor,
        rope_cos: Tensor, rope_sin: Tensor, hist_len: Tensor, new_len: Tensor,
        cross_k: Sequence[Tensor], cross_v: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Rows, Rows]:  # fmt: skip
        """See `Pass`."""
        lengths = () if self._step.steady else (hist_len, new_len)
        outputs = self._step(
            x, eps, time, sigma, next_sigma, rope_cos, rope_sin, *lengths,
            self._pools["k"], self._pools["v"], cross_k, cross_v,
        )  # fmt: skip
        x0, x_next, new_k, new_v = outputs
        return x0, x_next, new_k, new_v


def compiled(module: nn.Module, mode: str) -> Pass:
    """The pass under `torch.compile`, with fixed shapes and no graph break."""
    torch._dynamo.config.cache_size_limit = max(32, torch._dynamo.config.cache_size_limit)
    made: Pass = torch.compile(module, mode=mode, dynamic=False, fullgraph=True)
    return made
