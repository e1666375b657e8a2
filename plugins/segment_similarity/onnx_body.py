"""FkSegmentSimilarity in standard ONNX operators.

Legend: G dynamic heads, D head dim, F frames per chunk, T tokens per frame, P segments per frame.
"""

from __future__ import annotations

from forcing_kv.plugins.frame_chain.onnx_body import CHAIN_CONSTANTS, chain_nodes

_SCORE = """
    chain32 = Cast <to = 1> (chain)
    chain_shape = Concat <axis = 0> (num_dynamic, minus_one, tokens, dim)
    frames = Reshape (chain32, chain_shape)
    current = Slice (frames, zero, minus_one, one)
    next = Slice (frames, one, large, one)
    reduced = Constant <value_ints: ints = [0, 3]> ()
    products = Mul (current, next)
    dot_FT = ReduceSum <keepdims = 0> (products, reduced)
    squares = Mul (frames, frames)
    square_sum = ReduceSum <keepdims = 0> (squares, reduced)
    length = Sqrt (square_sum)
    floor = Constant <value_float: float = 1e-8> ()
    norm = Max (length, floor)
    current_norm = Slice (norm, zero, minus_one, zero)
    next_norm = Slice (norm, one, large, zero)
    norm_FT = Mul (current_norm, next_norm)
    cosine_FT = Div (dot_FT, norm_FT)
    segment_shape = Concat <axis = 0> (num_frames, segments, minus_one)
    cosine_FPS = Reshape (cosine_FT, segment_shape)
    scores = ReduceMean <keepdims = 0> (cosine_FPS, minus_one)
"""

BODY = (
    CHAIN_CONSTANTS
    + "    chain_rows = Add (num_new, tokens)\n"
    + chain_nodes("hist_k", "new_k", "chain", "chain_rows")
    + _SCORE
)
