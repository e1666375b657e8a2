"""Contract of FkSegmentSimilarity.

Legend: H heads, N new tokens, D head dim, R pool rows, F frames per chunk, P segments per frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forcing_kv.plugins.frame_chain.layout import CANDIDATE_ATTRIBUTES, candidate_sizes
from forcing_kv.plugins.op_spec import Attributes, OpSpec, TensorSpec


def _read_sizes(shapes: Sequence[Sequence[Any]], attributes: Attributes) -> dict[str, Any]:
    return candidate_sizes(shapes[0], shapes[1], attributes)


SPEC = OpSpec(
    name="FkSegmentSimilarity",
    torch_name="segment_similarity",
    summary="mean cosine of each candidate segment's keys with those of the next frame",
    inputs=(
        TensorSpec("hist_k", ("R", "D"), "T"),
        TensorSpec("new_k", ("H", "N", "D"), "T"),
    ),
    outputs=(TensorSpec("scores", ("F", "P"), "float32"),),
    attributes=CANDIDATE_ATTRIBUTES,
    tolerance="float",
    read_sizes=_read_sizes,
)
