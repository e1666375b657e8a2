"""Exact rewrites of a checkpoint before export: heads sorted static first."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.runtime_trt.rollout.layout import HeadPartition


def share_weights(model: CausalWanModel) -> CausalWanModel:
    """A second model over the same tensors: what is assigned to one does not reach the other.

    Tensors that are mapped to a checkpoint stay mapped, so this costs no memory.
    """
    shared = {
        id(weight): nn.Parameter(weight.data, requires_grad=weight.requires_grad)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, shared)


def linear_of(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer with the given weight [out, in] and bias [out], which are not copied."""
    made = nn.Linear(1, 1, device="meta")
    made.in_features, made.out_features = weight.shape[1], weight.shape[0]
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = nn.Parameter(bias, requires_grad=False)
    return made


def sort_heads_(model: CausalWanModel, partition: HeadPartition) -> CausalWanModel:
    """Permute every layer's self-attention heads into exported order; the output is unchanged.

    Rows of Wq, Wk, Wv, their biases and the qk-norm weights, and columns of Wo.

    Args:
        model: changed in place.

    Returns:
        The model.
    """
    head_dim = model.shape.head_dim
    for layer, block in enumerate(model.layers):
        heads = torch.tensor(partition.head_order(layer))
        rows = (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()
        if torch.equal(rows, torch.arange(model.shape.dim)):
            continue
        attn = block.self_attn
        for linear in (attn.q, attn.k, attn.v):
            linear.weight.data = _bytes(linear.weight)[rows].view(linear.weight.dtype)
            linear.bias.data = linear.bias.data[rows]
        for norm in (attn.norm_q, attn.norm_k):
            norm.weight.data = norm.weight.data[rows]
        columns = _bytes(attn.o.weight)[:, rows].contiguous()
        attn.o.weight.data = columns.view(attn.o.weight.dtype)
    return model


def _bytes(weight: Tensor) -> Tensor:
    """A weight to pick rows from: not every device indexes 8-bit floats."""
    return weight.data.view(torch.uint8) if weight.dtype.itemsize == 1 else weight.data
