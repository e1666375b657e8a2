"""ONNX nodes that cut the frame chain of an eviction out of a pool and the new rows.

Legend: G dynamic heads, D head dim, F frames per chunk, T tokens per frame.
"""

from __future__ import annotations

CHAIN_CONSTANTS = """
    zero = Constant <value_ints: ints = [0]> ()
    one = Constant <value_ints: ints = [1]> ()
    minus_one = Constant <value_ints: ints = [-1]> ()
    two = Constant <value_ints: ints = [2]> ()
    large = Constant <value_ints: ints = [9223372036854775807]> ()
    first_head_ = Constant <value_int: int = @first_head> ()
    row_offset_ = Constant <value_int: int = @row_offset> ()
    rows_per_head_ = Constant <value_int: int = @rows_per_head> ()
    sink_rows_ = Constant <value_int: int = @sink_rows> ()
    temporal_frames_ = Constant <value_int: int = @temporal_frames> ()
    tokens_per_frame_ = Constant <value_int: int = @tokens_per_frame> ()
    num_segments_ = Constant <value_int: int = @num_segments> ()
    head_start = Reshape (first_head_, one)
    row_start = Reshape (row_offset_, one)
    capacity = Reshape (rows_per_head_, one)
    sink = Reshape (sink_rows_, one)
    temporal = Reshape (temporal_frames_, one)
    tokens = Reshape (tokens_per_frame_, one)
    segments = Reshape (num_segments_, one)
    local_rows = Mul (temporal, tokens)
    local_stop = Add (sink, local_rows)
    new_shape = Shape (new_k)
    num_heads = Slice (new_shape, zero, one, zero)
    num_new = Slice (new_shape, one, two, zero)
    dim = Slice (new_shape, two, large, zero)
    num_dynamic = Sub (num_heads, head_start)
    pool_rows = Mul (num_dynamic, capacity)
    row_stop = Add (row_start, pool_rows)
    run_shape = Concat <axis = 0> (num_dynamic, capacity, dim)
    num_frames = Div (num_new, tokens)
    num_candidates = Mul (num_frames, segments)
"""
"""Constants and sizes; reads `new_k`."""


def chain_nodes(pool: str, new: str, out: str, num_rows: str) -> str:
    """Nodes that put the first `num_rows` rows of the chain [G, num_rows, D] into `out`.

    Args:
        pool: value name of the pool [R, D].
        new: value name of the new rows [H, N, D].
        out: value name of the result, also the prefix of the intermediate names.
        num_rows: value name of a row count [1], int64, at most T_d * T + N.
    """
    return f"""
    {out}_pool = Slice ({pool}, row_start, row_stop, zero)
    {out}_runs = Reshape ({out}_pool, run_shape)
    {out}_local = Slice ({out}_runs, sink, local_stop, one)
    {out}_new = Slice ({new}, head_start, large, zero)
    {out}_chain = Concat <axis = 1> ({out}_local, {out}_new)
    {out} = Slice ({out}_chain, zero, {num_rows}, one)
"""
