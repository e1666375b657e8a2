"""Contract of FkSimilarityEviction.

Legend: H heads, G dynamic heads, N new tokens, D head dim, R pool rows, F frames per chunk,
P segments per frame, S tokens per segment, M kept segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forcing_kv.plugins.frame_chain.layout import CANDIDATE_ATTRIBUTES, candidate_sizes
from forcing_kv.plugins.op_spec import Attributes, AttributeSpec, OpSpec, TensorSpec


def _read_sizes(shapes: Sequence[Sequence[Any]], attributes: Attributes) -> dict[str, Any]:
    sizes = candidate_sizes((shapes[1], shapes[3]), attributes)
    return sizes | {"M": int(attributes["num_kept"])}


SPEC = OpSpec(
    name="FkSimilarityEviction",
    torch_name="similarity_eviction",
    summary="the segments with the smallest scores, compacted for every dynamic head",
    inputs=(
        TensorSpec("scores", ("F", "P"), "float32"),
        TensorSpec("hist_k", ("R", "D"), "T"),
        TensorSpec("hist_v", ("R", "D"), "T"),
        TensorSpec("new_k", ("H", "N", "D"), "T"),
        TensorSpec("new_v", ("H", "N", "D"), "T"),
    ),
    outputs=(
        TensorSpec("dyn_k", ("G", "M*S", "D"), "T"),
        TensorSpec("dyn_v", ("G", "M*S", "D"), "T"),
        TensorSpec("kept", ("M",), "int32"),
    ),
    attributes=(*CANDIDATE_ATTRIBUTES, AttributeSpec("num_kept", "int")),
    tolerance="exact",
    read_sizes=_read_sizes,
)
