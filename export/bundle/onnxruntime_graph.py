"""Passes over a chunk with ONNX Runtime's fused attention.

Its CPU kernel works in tiles as long as it gets no mask. Heads are handed to it as samples of one
head each, which is how pools and new rows lie in memory.
"""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from forcing_kv.export.bundle.fused_attention import dense_body, replace_attention
from forcing_kv.plugins.registry import OPSET
from forcing_kv.runtime_trt.rollout.config import RolloutConfig

_OPSETS = {"": OPSET, "com.microsoft": 1}

_ATTEND = """
    {b}_mixed = com.microsoft.MultiHeadAttention <num_heads: int = 1> ({b}_q, {b}_k, {b}_v)
"""

_ATTEND_16_BITS = """
    {b}_q32 = Cast <to = 1> ({b}_q)
    {b}_k32 = Cast <to = 1> ({b}_k)
    {b}_v32 = Cast <to = 1> ({b}_v)
    {b}_mixed32 = com.microsoft.MultiHeadAttention <num_heads: int = 1> ({b}_q32, {b}_k32, {b}_v32)
    {b}_mixed = CastLike ({b}_mixed32, q)
"""
"""The kernel is for float32 alone."""


def fuse_attention(model: ir.Model, config: RolloutConfig) -> int:
    """Replace every attention over a history; changes the model and returns their number."""
    attend = _ATTEND if config.dtype == "float32" else _ATTEND_16_BITS
    body = partial(dense_body, attend=attend, dim=config.model.head_dim)
    return replace_attention(model, config, _OPSETS, body)
