"""Contract of FkQkNormRope.

Legend: N tokens, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forcing_kv.plugins.op_spec import Attributes, AttributeSpec, OpSpec, TensorSpec


def _read_sizes(shapes: Sequence[Sequence[Any]], attributes: Attributes) -> dict[str, Any]:
    num_heads = int(attributes["num_heads"])
    return {"N": shapes[0][0], "H": num_heads, "D": shapes[0][1] // num_heads}


SPEC = OpSpec(
    name="FkQkNormRope",
    torch_name="qk_norm_rope",
    summary="RMS norm of q and k over the full row, weight, rotary embedding, head-major layout",
    inputs=(
        TensorSpec("q", ("N", "H*D"), "T"),
        TensorSpec("k", ("N", "H*D"), "T"),
        TensorSpec("q_weight", ("H*D",), "W"),
        TensorSpec("k_weight", ("H*D",), "W"),
        TensorSpec("cos", ("N", "D/2"), "float32"),
        TensorSpec("sin", ("N", "D/2"), "float32"),
    ),
    outputs=(
        TensorSpec("q_out", ("H", "N", "D"), "T"),
        TensorSpec("k_out", ("H", "N", "D"), "T"),
    ),
    attributes=(AttributeSpec("num_heads", "int"), AttributeSpec("eps", "float")),
    tolerance="float",
    read_sizes=_read_sizes,
)
