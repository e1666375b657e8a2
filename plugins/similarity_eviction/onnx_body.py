"""FkSimilarityEviction in standard ONNX operators.

A segment's rank is counted by comparing it with every other, so that ties are decided by the index
in every runtime.

Legend: G dynamic heads, D head dim, I candidate segments, M kept segments, S tokens per segment.
"""

from __future__ import annotations

from forcing_kv.plugins.frame_chain.onnx_body import CHAIN_CONSTANTS, chain_nodes

_SELECT = """
    num_kept_ = Constant <value_int: int = @num_kept> ()
    scalar_zero = Constant <value_int: int = 0> ()
    scalar_one = Constant <value_int: int = 1> ()
    infinity = Constant <value: tensor = float {inf}> ()
    raw_I = Reshape (scores, minus_one)
    is_nan_I = IsNaN (raw_I)
    score_I = Where (is_nan_I, infinity, raw_I)
    candidate_count = Squeeze (num_candidates)
    index_I = Range (scalar_zero, candidate_count, scalar_one)
    score_I1 = Unsqueeze (score_I, one)
    index_I1 = Unsqueeze (index_I, one)
    smaller_II = Less (score_I, score_I1)
    equal_II = Equal (score_I, score_I1)
    lower_II = Less (index_I, index_I1)
    equal_lower_II = And (equal_II, lower_II)
    before_II = Or (smaller_II, equal_lower_II)
    before64_II = Cast <to = 7> (before_II)
    rank_I = ReduceSum <keepdims = 0> (before64_II, one)
    is_kept_I = Less (rank_I, num_kept_)
    kept_lower_II = And (is_kept_I, lower_II)
    kept_lower64_II = Cast <to = 7> (kept_lower_II)
    slot_I = ReduceSum <keepdims = 0> (kept_lower64_II, one)
    slot_M = Range (scalar_zero, num_kept_, scalar_one)
    slot_M1 = Unsqueeze (slot_M, one)
    same_MI = Equal (slot_M1, slot_I)
    chosen_MI = And (same_MI, is_kept_I)
    index_MI = Where (chosen_MI, index_I, scalar_zero)
    kept64 = ReduceSum <keepdims = 0> (index_MI, one)
    kept = Cast <to = 6> (kept64)
    segment_shape = Concat <axis = 0> (num_dynamic, num_candidates, minus_one, dim)
    compact_shape = Concat <axis = 0> (num_dynamic, minus_one, dim)
"""


def _compact(pool: str, new: str, out: str) -> str:
    """Nodes that gather the kept segments of keys or of values."""
    return f"""{chain_nodes(pool, new, out + "_candidates", "num_new")}
    {out}_segments = Reshape ({out}_candidates, segment_shape)
    {out}_kept = Gather <axis = 1> ({out}_segments, kept64)
    {out} = Reshape ({out}_kept, compact_shape)
"""


BODY = (
    CHAIN_CONSTANTS
    + _SELECT
    + _compact("hist_k", "new_k", "dyn_k")
    + _compact("hist_v", "new_v", "dyn_v")
)
