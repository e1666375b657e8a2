"""What every schedule of FkHeadIndexedAttention does: attend from a tile of queries.

Legend: H heads, N new tokens, D head dim, R pool rows, Q query tile, K key tile.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _attend_tile(
    q,
    k_source,
    v_source,
    place,
    valid,
    acc,
    row_sum,
    row_max,
    SCALE: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One key tile: scores, online softmax, values.

    Keys and values are loaded from pointers at offsets `place` [K, D], or with TMA from descriptors
    at row `place`. `valid` [K] is read if MASKED.
    """
    if TMA:
        k = k_source.load([place, 0])
    elif MASKED:
        k = tl.load(k_source + place, mask=valid[:, None], other=0.0)
    else:
        k = tl.load(k_source + place)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * SCALE)
    weights = tl.exp2(scores * SCALE - new_max[:, None])
    decay = tl.exp2(row_max - new_max)
    row_sum = row_sum * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    if TMA:
        v = v_source.load([place, 0])
    elif MASKED:
        # A masked row may hold NaN, and 0 * NaN is NaN: the values are masked too.
        v = tl.load(v_source + place, mask=valid[:, None], other=0.0)
    else:
        v = tl.load(v_source + place)
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, row_sum, new_max


@triton.jit
def attend_queries(
    q_ptr,
    k_new_ptr,
    v_new_ptr,
    hist_k_ptr,
    hist_v_ptr,
    head_offset_ptr,
    hist_len_ptr,
    new_len_ptr,
    head,
    first_query,
    first,
    stop,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    MAX_HISTORY: tl.constexpr,
    TMA_ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
):
    """Attend from queries first_query .. first_query + Q of a head to its key tiles first .. stop.

    A head's key tiles are the full ones of its history and of the new rows, then what is left of
    either, where anything is. Returns the sum of weighted values, the sum of weights and the
    largest score of every query. Full tiles are loaded by TMA if TMA_ROWS, the most rows of a pool,
    is not 0.
    """
    row = tl.arange(0, Q)
    channel = tl.arange(0, D)
    own = tl.cast(head, tl.int64) * (N * D)
    q_offset = row[:, None] * D + channel[None, :]
    q_mask = (row < N - first_query)[:, None]
    q = tl.load(q_ptr + own + first_query * D + q_offset, mask=q_mask, other=0.0)
    acc = tl.zeros((Q, D), tl.float32)
    row_sum = tl.zeros((Q,), tl.float32)
    row_max = tl.full((Q,), float("-inf"), tl.float32)
    slot = tl.arange(0, K)
    tile = slot[:, None] * D + channel[None, :]

    hist_len = tl.minimum(tl.load(hist_len_ptr + head), MAX_HISTORY)
    new_len = tl.minimum(tl.load(new_len_ptr), N)
    run = tl.load(head_offset_ptr + head).to(tl.int64) * D
    history_tiles = hist_len // K
    full_tiles = history_tiles + new_len // K
    if TMA_ROWS:
        k_tiles = tl.make_tensor_descriptor(hist_k_ptr, [TMA_ROWS, D], [D, 1], [K, D])
        v_tiles = tl.make_tensor_descriptor(hist_v_ptr, [TMA_ROWS, D], [D, 1], [K, D])
        first_row = tl.load(head_offset_ptr + head)
    for i in range(first, tl.minimum(stop, history_tiles)):
        if TMA_ROWS:
            k_source, v_source, place = k_tiles, v_tiles, first_row + i * K
        else:
            start = run + tl.cast(i, tl.int64) * (K * D)
            k_source, v_source, place = hist_k_ptr + start, hist_v_ptr + start, tile
        acc, row_sum, row_max = _attend_tile(
            q, k_source, v_source, place, slot, acc, row_sum, row_max,
            SCALE, False, TMA_ROWS > 0, PRECISION,
        )  # fmt: skip

    if TMA_ROWS:
        k_new_tiles = tl.make_tensor_descriptor(k_new_ptr, [H * N, D], [D, 1], [K, D])
        v_new_tiles = tl.make_tensor_descriptor(v_new_ptr, [H * N, D], [D, 1], [K, D])
    for i in range(tl.maximum(first, history_tiles), tl.minimum(stop, full_tiles)):
        if TMA_ROWS:
            k_source, v_source = k_new_tiles, v_new_tiles
            place = head * N + (i - history_tiles) * K
        else:
            start = own + tl.cast(i - history_tiles, tl.int64) * (K * D)
            k_source, v_source, place = k_new_ptr + start, v_new_ptr + start, tile
        acc, row_sum, row_max = _attend_tile(
            q, k_source, v_source, place, slot, acc, row_sum, row_max,
            SCALE, False, TMA_ROWS > 0, PRECISION,
        )  # fmt: skip

    history_rest = hist_len % K
    for source in range(2):
        if source == 0:
            place = full_tiles
            rest = history_rest
            start = run + tl.cast(history_tiles, tl.int64) * (K * D)
            k_rest, v_rest = hist_k_ptr + start, hist_v_ptr + start
        else:
            place = full_tiles + (history_rest > 0).to(tl.int32)
            rest = new_len % K
            start = own + tl.cast(full_tiles - history_tiles, tl.int64) * (K * D)
            k_rest, v_rest = k_new_ptr + start, v_new_ptr + start
        if (rest > 0) & (first <= place) & (place < stop):
            acc, row_sum, row_max = _attend_tile(
                q, k_rest, v_rest, tile, slot < rest, acc, row_sum, row_max,
                SCALE, True, False, PRECISION,
            )  # fmt: skip
    return acc, row_sum, row_max


@triton.jit
def store_queries(
    out_ptr,
    head,
    first_query,
    acc,
    row_sum,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
):
    """Write the outputs of queries first_query .. first_query + Q of a head."""
    row = tl.arange(0, Q)
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    start = tl.cast(first_query, tl.int64) * (H * D) + head * D
    offset = row[:, None] * (H * D) + tl.arange(0, D)[None, :]
    tl.store(out_ptr + start + offset, out, mask=(row < N - first_query)[:, None])
