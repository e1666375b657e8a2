"""FkHeadIndexedAttention on a GPU: one launch for all heads, whatever their lengths.

A program attends from one tile of queries to its head's valid history and then to the chunk's rows,
with an online softmax in float32. Full key tiles run without masks; what is left of the history and
of the new rows runs masked, last. Two things keep the device busy to the end: heads with more keys
come first, and the last rows of every head are cut into tiles of half the height, launched last, so
that the final wave is short. Lengths are read from device memory.

Legend: H heads, N new tokens, D head dim, R pool rows, Q query tile, K key tile.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import math

import triton
import triton.language as tl

from forcing_kv.plugins.launch import Launch, Problem, Tactic, ceil_div, next_power_of_2

# By ptxas for D 128, bfloat16: no tactic spills on sm_90; 128x128 spills 588 bytes of a thread on
# sm_80 .. 89, 20 on sm_100 and 664 on sm_120; 64x128 spilled 572 on sm_90 and 64x64 with one stage
# 208 on sm_80, hence neither is here. Speed is unmeasured.
TACTICS = (
    Tactic("64x32", num_warps=4, blocks={"Q": 64, "K": 32}, portable=True),
    Tactic("128x32", num_warps=8, blocks={"Q": 128, "K": 32}, portable=True),
    Tactic("128x128", num_warps=8, blocks={"Q": 128, "K": 128}),
    Tactic("128x64s3", num_warps=8, num_stages=3, blocks={"Q": 128, "K": 64}),
    Tactic("128x64", num_warps=8, blocks={"Q": 128, "K": 64}),
    Tactic("64x64", num_warps=4, blocks={"Q": 64, "K": 64}),
)

MIN_TAIL = 64
"""Smallest tile of the tail: the height of a warp group's matrix instruction."""


@triton.jit
def _attend_tile(
    q,
    k_ptr,
    v_ptr,
    offset,
    valid,
    acc,
    row_sum,
    row_max,
    SCALE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One key tile: scores, online softmax, values. `valid` [K] is read if MASKED."""
    if MASKED:
        k = tl.load(k_ptr + offset, mask=valid[:, None], other=0.0)
    else:
        k = tl.load(k_ptr + offset)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * SCALE)
    weights = tl.exp2(scores * SCALE - new_max[:, None])
    decay = tl.exp2(row_max - new_max)
    row_sum = row_sum * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    if MASKED:
        # A masked row may hold NaN, and 0 * NaN is NaN: the values are masked too.
        v = tl.load(v_ptr + offset, mask=valid[:, None], other=0.0)
    else:
        v = tl.load(v_ptr + offset)
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, row_sum, new_max


@triton.jit
def _attend_queries(
    q_ptr,
    k_new_ptr,
    v_new_ptr,
    hist_k_ptr,
    hist_v_ptr,
    head_offset_ptr,
    hist_len_ptr,
    new_len_ptr,
    out_ptr,
    head,
    first_query,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    MAX_HISTORY: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
):
    """Attend from queries first_query .. first_query + Q of a head."""
    query = first_query + tl.arange(0, Q)
    channel = tl.arange(0, D)
    query_mask = (query < N)[:, None]
    own = tl.cast(head, tl.int64) * (N * D)
    q_offset = query[:, None] * D + channel[None, :]
    q = tl.load(q_ptr + own + q_offset, mask=query_mask, other=0.0)
    acc = tl.zeros((Q, D), tl.float32)
    row_sum = tl.zeros((Q,), tl.float32)
    row_max = tl.full((Q,), float("-inf"), tl.float32)
    slot = tl.arange(0, K)
    tile = slot[:, None] * D + channel[None, :]

    hist_len = tl.minimum(tl.load(hist_len_ptr + head), MAX_HISTORY)
    run = tl.load(head_offset_ptr + head).to(tl.int64) * D
    full_history = hist_len // K
    for i in range(full_history):
        start = run + tl.cast(i, tl.int64) * (K * D)
        acc, row_sum, row_max = _attend_tile(
            q,
            hist_k_ptr + start,
            hist_v_ptr + start,
            tile,
            slot,
            acc,
            row_sum,
            row_max,
            SCALE,
            False,
            PRECISION,
        )

    new_len = tl.minimum(tl.load(new_len_ptr), N)
    full_new = new_len // K
    for i in range(full_new):
        start = own + tl.cast(i, tl.int64) * (K * D)
        acc, row_sum, row_max = _attend_tile(
            q,
            k_new_ptr + start,
            v_new_ptr + start,
            tile,
            slot,
            acc,
            row_sum,
            row_max,
            SCALE,
            False,
            PRECISION,
        )

    history_rest = hist_len - full_history * K
    new_rest = new_len - full_new * K
    for source in range(2):
        if source == 0:
            rest = history_rest
            start = run + tl.cast(full_history, tl.int64) * (K * D)
            k_rest, v_rest = hist_k_ptr + start, hist_v_ptr + start
        else:
            rest = new_rest
            start = own + tl.cast(full_new, tl.int64) * (K * D)
            k_rest, v_rest = k_new_ptr + start, v_new_ptr + start
        if rest > 0:
            acc, row_sum, row_max = _attend_tile(
                q,
                k_rest,
                v_rest,
                tile,
                slot < rest,
                acc,
                row_sum,
                row_max,
                SCALE,
                True,
                PRECISION,
            )

    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    out_offset = query.to(tl.int64)[:, None] * (H * D) + head * D + channel[None, :]
    tl.store(out_ptr + out_offset, out, mask=query_mask)


@triton.jit
def _head_by_length(length, position, HEADS: tl.constexpr):
    """The head in `position` when heads with more history come first, then lower heads."""
    head = tl.arange(0, HEADS)
    longer = length[None, :] > length[:, None]
    lower_equal = (length[None, :] == length[:, None]) & (head[None, :] < head[:, None])
    rank = tl.sum((longer | lower_equal).to(tl.int32), axis=1)
    return tl.sum(tl.where(rank == position, head, 0), axis=0)


@triton.jit
def head_indexed_attention_kernel(
    q_ptr,
    k_new_ptr,
    v_new_ptr,
    hist_k_ptr,
    hist_v_ptr,
    head_offset_ptr,
    hist_len_ptr,
    new_len_ptr,
    out_ptr,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    MAX_HISTORY: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    FULL_TILES: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_TILES: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid (H * (FULL_TILES + TAIL_TILES)): every head's full tiles, then every head's tail."""
    program = tl.program_id(0)
    # Loaded here and not in the function: PyTorch would take an address that a call gives, and with
    # it this input, for written memory.
    slot = tl.arange(0, HEADS)
    length = tl.load(hist_len_ptr + slot, mask=slot < H, other=-1)
    if program < H * FULL_TILES:
        head = _head_by_length(length, program // max(FULL_TILES, 1), HEADS)
        _attend_queries(
            q_ptr,
            k_new_ptr,
            v_new_ptr,
            hist_k_ptr,
            hist_v_ptr,
            head_offset_ptr,
            hist_len_ptr,
            new_len_ptr,
            out_ptr,
            head,
            (program % max(FULL_TILES, 1)) * Q,
            N,
            H,
            D,
            MAX_HISTORY,
            SCALE,
            PRECISION,
            Q,
            K,
        )
    else:
        rest = program - H * FULL_TILES
        head = _head_by_length(length, rest // max(TAIL_TILES, 1), HEADS)
        _attend_queries(
            q_ptr,
            k_new_ptr,
            v_new_ptr,
            hist_k_ptr,
            hist_v_ptr,
            head_offset_ptr,
            hist_len_ptr,
            new_len_ptr,
            out_ptr,
            head,
            FULL_TILES * Q + (rest % max(TAIL_TILES, 1)) * TAIL,
            N,
            H,
            D,
            MAX_HISTORY,
            SCALE,
            PRECISION,
            TAIL,
            K,
        )


def tile_counts(
    num_tokens: int, num_heads: int, tile: int, tail: int, num_sms: int
) -> tuple[int, int]:
    """Full tiles and tail tiles of every head.

    As many full tiles as make whole waves over the device (one program per multiprocessor); the
    rows that are left go to tail tiles. Without a smaller tail, or where everything fits in whole
    waves, full tiles alone.

    Args:
        num_tokens: queries of a head, N.
        num_heads: heads, H.
        tile: rows of a full tile.
        tail: rows of a tail tile.
        num_sms: multiprocessors of the device.

    Returns:
        Full tiles and tail tiles; together they cover every query.
    """
    all_tiles = ceil_div(num_tokens, tile)
    waves = num_heads * all_tiles // num_sms
    full = waves * num_sms // num_heads
    if tail >= tile or num_heads * all_tiles % num_sms == 0:
        return all_tiles, 0
    full = min(full, num_tokens // tile)
    return full, ceil_div(num_tokens - full * tile, tail)


def launch(problem: Problem, tactic: Tactic) -> Launch:
    """Plan of one call."""
    num_tokens, num_heads, head_dim = (problem.sizes[axis] for axis in "NHD")
    # float32 exists for tests: half the tile keeps it in the same shared memory.
    shrink = 2 if problem.dtype == "float32" else 1
    tile = tactic.blocks["Q"] // shrink
    tail = min(tile, max(MIN_TAIL, tile // 2))
    full_tiles, tail_tiles = tile_counts(num_tokens, num_heads, tile, tail, problem.num_sms)
    constants = {
        "N": num_tokens,
        "H": num_heads,
        "D": head_dim,
        "MAX_HISTORY": problem.attributes["max_history"],
        "SCALE": math.log2(math.e) / math.sqrt(head_dim),
        "PRECISION": "ieee" if problem.dtype == "float32" else "tf32",
        "Q": tile,
        "K": tactic.blocks["K"] // shrink,
        "FULL_TILES": full_tiles,
        "TAIL": tail,
        "TAIL_TILES": tail_tiles,
        "HEADS": next_power_of_2(num_heads),
    }
    grid = (num_heads * (full_tiles + tail_tiles), 1, 1)
    return Launch(
        head_indexed_attention_kernel, constants, grid, tactic.num_warps, tactic.num_stages
    )
