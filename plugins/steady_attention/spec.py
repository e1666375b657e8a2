"""Contract of FkSteadyAttention: FkHeadIndexedAttention without its lengths, which are attributes.

Legend: H heads, N new tokens, D head dim, R pool rows.
"""

from __future__ import annotations

from dataclasses import fields, replace

from forcing_kv.plugins.head_indexed_attention.spec import SPEC as GENERAL
from forcing_kv.plugins.op_spec import AttributeSpec
from forcing_kv.plugins.steady_attention.layout import SteadyLayout

SPEC = replace(
    GENERAL,
    name="FkSteadyAttention",
    torch_name="steady_attention",
    summary="attention over each head block's fixed history prefix and the chunk's own rows",
    inputs=tuple(tensor for tensor in GENERAL.inputs if tensor.dtype == "T"),
    attributes=tuple(AttributeSpec(field.name, "int") for field in fields(SteadyLayout)),
)
