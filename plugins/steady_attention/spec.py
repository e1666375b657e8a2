"""Contract of FkSteadyAttention.

Legend: H heads, N new tokens, D head dim, R pool rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from forcing_kv.plugins.op_spec import Attributes, AttributeSpec, OpSpec, TensorSpec
from forcing_kv.plugins.steady_attention.layout import SteadyLayout


def _read_sizes(shapes: Sequence[Sequence[Any]], attributes: Attributes) -> dict[str, Any]:
    num_heads, num_tokens, head_dim = shapes[0]
    return {"H": num_heads, "N": num_tokens, "D": head_dim, "R": shapes[3][0]}


SPEC = OpSpec(
    name="FkSteadyAttention",
    torch_name="steady_attention",
    summary="attention over each head block's fixed history prefix and the chunk's own rows",
    inputs=(
        TensorSpec("q", ("H", "N", "D"), "T"),
        TensorSpec("k_new", ("H", "N", "D"), "T"),
        TensorSpec("v_new", ("H", "N", "D"), "T"),
        TensorSpec("hist_k", ("R", "D"), "T"),
        TensorSpec("hist_v", ("R", "D"), "T"),
    ),
    outputs=(TensorSpec("out", ("N", "H", "D"), "T"),),
    attributes=tuple(AttributeSpec(field.name, "int") for field in fields(SteadyLayout)),
    tolerance="float",
    read_sizes=_read_sizes,
)
