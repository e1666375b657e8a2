"""FkHeadIndexedAttention with the keys split, so that every multiprocessor has an equal share.

Needs memory for unfinished tiles, and counters that start at zero. A launch by PyTorch has both; a
TensorRT plugin is one kernel, whose spare outputs hold anything when it starts, and from unknown
contents thread blocks can agree on nothing. Hence this schedule is not offered to TensorRT.

Legend: H heads, N new tokens, D head dim, R pool rows, Q query tile, K key tile.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from forcing_kv.plugins.head_indexed_attention.tile import attend_queries, store_queries


@triton.jit
def _store_piece(piece_ptr, acc, row_sum, row_max, D: tl.constexpr, Q: tl.constexpr):
    """Keep what a program found of a tile: weighted values, then sums, then largest scores."""
    row = tl.arange(0, Q)
    tl.store(piece_ptr + row[:, None] * D + tl.arange(0, D)[None, :], acc)
    tl.store(piece_ptr + Q * D + row, row_sum)
    tl.store(piece_ptr + Q * (D + 1) + row, row_max)


@triton.jit
def _join_pieces(pieces_ptr, first_program, last_program, D: tl.constexpr, Q: tl.constexpr):
    """The whole of a tile from the pieces of several programs, in their order."""
    row = tl.arange(0, Q)
    tile = row[:, None] * D + tl.arange(0, D)[None, :]
    acc = tl.zeros((Q, D), tl.float32)
    row_sum = tl.zeros((Q,), tl.float32)
    row_max = tl.full((Q,), float("-inf"), tl.float32)
    for program in range(first_program, last_program + 1):
        piece = 2 * program + (program == first_program).to(tl.int32)
        start = pieces_ptr + tl.cast(piece, tl.int64) * (Q * (D + 2))
        piece_max = tl.load(start + Q * (D + 1) + row, cache_modifier=".cg")
        new_max = tl.maximum(row_max, piece_max)
        decay, weight = tl.exp2(row_max - new_max), tl.exp2(piece_max - new_max)
        piece_sum = tl.load(start + Q * D + row, cache_modifier=".cg")
        row_sum = row_sum * decay + piece_sum * weight
        piece_acc = tl.load(start + tile, cache_modifier=".cg")
        acc = acc * decay[:, None] + piece_acc * weight[:, None]
        row_max = new_max
    return acc, row_sum


@triton.jit
def split_attention_kernel(
    q_ptr,
    k_new_ptr,
    v_new_ptr,
    hist_k_ptr,
    hist_v_ptr,
    head_offset_ptr,
    hist_len_ptr,
    new_len_ptr,
    out_ptr,
    pieces_ptr,
    arrived_ptr,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    MAX_HISTORY: tl.constexpr,
    TMA_ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    TILES: tl.constexpr,
    HEADS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Grid (PROGRAMS): an equal share of all pairs of query and key tiles for each.

    A share begins and ends within a tile of queries. The programs that share one leave their pieces
    in memory; the last to arrive joins them, in a fixed order. Nobody waits for anybody.
    """
    program = tl.program_id(0)
    slot = tl.arange(0, HEADS)
    length = tl.load(hist_len_ptr + slot, mask=slot < H, other=0)
    history = tl.minimum(length, MAX_HISTORY)
    new_len = tl.minimum(tl.load(new_len_ptr), N)
    # As `attend_queries` counts: a tile that is not full is one too.
    key_tiles = (history + K - 1) // K + (new_len + K - 1) // K
    work = tl.where(slot < H, key_tiles * TILES, 0)
    work_stop = tl.sum(tl.where(slot[:, None] <= slot[None, :], work[:, None], 0), axis=0)
    total = tl.sum(work, axis=0)
    share = (total + PROGRAMS - 1) // PROGRAMS
    at = program * share
    end = tl.minimum(at + share, total)
    while at < end:
        head = tl.sum((work_stop <= at).to(tl.int32), axis=0)
        tiles = tl.sum(tl.where(slot == head, key_tiles, 0), axis=0)
        within = at - tl.sum(tl.where(slot == head, work_stop - work, 0), axis=0)
        first_query = (within // tiles) * Q
        first = within % tiles
        stop = tl.minimum(tiles, first + end - at)
        acc, row_sum, row_max = attend_queries(
            q_ptr, k_new_ptr, v_new_ptr, hist_k_ptr, hist_v_ptr,
            head_offset_ptr, hist_len_ptr, new_len_ptr, head, first_query, first, stop,
            N, H, D, MAX_HISTORY, TMA_ROWS, SCALE, PRECISION, Q, K,
        )  # fmt: skip
        if stop - first == tiles:
            store_queries(out_ptr, head, first_query, acc, row_sum, N, H, D, Q)
        else:
            # Of the tiles that a program begins, it leaves at most the last unfinished, and of the
            # ones that others began, it gets at most one: two pieces.
            first_program = (at - first) // share
            last_program = (at - first + tiles - 1) // share
            piece = 2 * program + (first == 0).to(tl.int32)
            start = tl.cast(piece, tl.int64) * (Q * (D + 2))
            _store_piece(pieces_ptr + start, acc, row_sum, row_max, D, Q)
            # Every warp's part is written before the arrival is told.
            tl.debug_barrier()
            arrived = tl.atomic_add(arrived_ptr + first_program, 1, sem="acq_rel")
            if arrived == last_program - first_program:
                joined, joined_sum = _join_pieces(pieces_ptr, first_program, last_program, D, Q)
                store_queries(out_ptr, head, first_query, joined, joined_sum, N, H, D, Q)
        at += stop - first
