"""Exact fusions of the exported graphs, each an option: same numbers up to rounding, less work.

The plain graphs are what `fkv export` writes as ONNX; a compiler that gains by a fusion asks for it
here and records which one it used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.model.fp8 import Fp8Linear
from forcing_kv.export.model.rewrite import linear_of
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.ports import GraphPorts, ports
from forcing_kv.runtime_trt.rollout.schedule import Schedule, time_sinusoid
from forcing_kv.runtime_trt.rollout.text_fold import MAX_PAD_ROWS

SteadyAttention = Literal["torch", "cudnn", "flash", "triton"]


@dataclass(frozen=True)
class FusionOptions:
    """Which fusions a graph is captured with; the default is the plain graph."""

    qkv: bool = False
    """One matrix product for self-attention's q, k and v."""
    time_tables: bool = False
    """Time embeddings of every step from a table, told by the step's index."""
    clean_graph: bool = False
    """A fourth graph `clean` for the clean pass, cut after the last layer's K and V; `step` then
    returns x0 and x_next alone."""
    attention: SteadyAttention = "torch"
    """What steady chunks attend with: a dense call for each block of heads, by the named kernel or
    by the one that PyTorch chooses; or `triton`, the kernel that serves every chunk, and no steady
    form at all."""
    gelu: bool = False
    """GELU as part of the feed-forward's first product, on CUDA: one pass less over the hidden
    layer, the largest tensor of a step."""
    text_rows: int | None = None
    """Cross-attention over this many text rows: all padding rows folded into a few keys with a
    log-count bias. `prompt` then takes the folded rows, and `step` a further input `text_bias`."""

    def check(self, text_len: int) -> None:
        """Refuse a number of text rows that cannot hold a prompt.

        Raises:
            InputError: too few or too many rows.
        """
        if self.text_rows is not None and not MAX_PAD_ROWS < self.text_rows <= text_len:
            raise InputError(
                f"text_rows is {self.text_rows}; give {MAX_PAD_ROWS + 1} to {text_len} (text_len), "
                "or none to keep every row"
            )

    def ports(self, config: RolloutConfig) -> dict[str, GraphPorts]:
        return ports(
            config,
            time_tables=self.time_tables,
            clean_graph=self.clean_graph,
            text_rows=self.text_rows,
            steady=self.attention != "triton",
        )


PLAIN = FusionOptions()
"""The graphs as they are exported to ONNX."""

FUSED = FusionOptions(qkv=True, time_tables=True, clean_graph=True, gelu=True)
"""What needs nothing of the prompt."""


def fuse_qkv_(model: CausalWanModel) -> CausalWanModel:
    """Stack every self-attention's q, k and v matrices into one; changes and returns `model`."""
    for block in model.layers:
        attn = block.self_attn
        if attn.qkv is not None:
            continue
        parts = (attn.q, attn.k, attn.v)
        weight = torch.cat([part.weight.detach() for part in parts])
        bias = torch.cat([part.bias.detach() for part in parts])
        attn.qkv = _stacked(parts, weight, bias)
        del attn.q, attn.k, attn.v
    return model


def _stacked(parts: Sequence[nn.Module], weight: Tensor, bias: Tensor) -> nn.Linear | Fp8Linear:
    """A layer with the given weight and bias, of the kind that its parts are."""
    if isinstance(parts[0], Fp8Linear):
        assert all(part.scales == parts[0].scales for part in parts), "q, k and v share scales"
        return Fp8Linear(weight, bias, parts[0].scales)
    return linear_of(weight, bias)


class GeluLinear(nn.Linear):
    """A linear layer and the tanh form of GELU on its result.

    On CUDA one product: cuBLASLt applies GELU to the float32 sums before they are rounded.
    Elsewhere PyTorch's fused product means another GELU, so both are done one after the other.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dim() == 2:
            return torch.ops.aten._addmm_activation(self.bias, x, self.weight.t(), use_gelu=True)
        return F.gelu(super().forward(x), approximate="tanh")


def fuse_gelu_(model: CausalWanModel) -> CausalWanModel:
    """Join every feed-forward's first product with its GELU; changes and returns `model`.

    Not a product in FP8, which has no such epilogue: there GELU joins the next rounding.
    """
    for block in model.layers:
        first = cast(nn.Linear, block.ffn[0])
        if isinstance(first, GeluLinear | Fp8Linear):
            continue
        fused = GeluLinear(1, 1, device="meta")
        fused.in_features, fused.out_features = first.in_features, first.out_features
        fused.weight, fused.bias = first.weight, first.bias
        block.ffn[0], block.ffn[1] = fused, nn.Identity()
    return model


@torch.no_grad()
def time_tables(model: CausalWanModel, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Time embeddings of every step of a schedule, the clean pass (t = 0) last.

    Returns:
        Embeddings [n + 1, dim] and projections [n + 1, 6, dim], float32, on the model's device.
    """
    device = model.patch_embedding.weight.device
    timesteps = [*schedule.timesteps.tolist(), 0.0]
    rows = [time_sinusoid(timestep, model.shape.freq_dim) for timestep in timesteps]
    # One row at a time, as the plain graph has it: a product of several rows may round otherwise.
    pairs = [model.embed_time(torch.from_numpy(np.asarray(row)).to(device)) for row in rows]
    embeddings, projections = zip(*pairs, strict=True)
    return torch.cat(embeddings), torch.cat(projections)
