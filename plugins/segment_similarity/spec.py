"""Contract of FkSegmentSimilarity.

Legend: H heads, N new tokens, D head dim, R pool rows, F frames per chunk, P segments per frame.
"""

from __future__ import annotations

from forcing_kv.plugins.frame_chain.layout import CANDIDATE_ATTRIBUTES, candidate_sizes
from forcing_kv.plugins.op_spec import OpSpec, TensorSpec

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
    read_sizes=candidate_sizes,
)
