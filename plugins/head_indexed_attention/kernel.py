"""FkHeadIndexedAttention on a GPU: one launch for all heads, whatever their lengths.

A program attends from one tile of queries to its head's valid history and then to the chunk's rows,
with an online softmax in float32. Full key tiles run without masks; what is left of the history and
of the new rows runs masked, last. Lengths are read from device memory. `schedule.py` says how the
tiles are dealt to the programs.

Legend: H heads, N new tokens, D head dim, R pool rows, Q query tile, K key tile.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from forcing_kv.plugins.compile.launch import (
    Launch,
    Problem,
    Scratch,
    Tactic,
    ceil_div,
    next_power_of_2,
)
from forcing_kv.plugins.head_indexed_attention.schedule import MIN_TAIL, tile_counts
from forcing_kv.plugins.head_indexed_attention.split import split_attention_kernel
from forcing_kv.plugins.head_indexed_attention.tile import attend_queries, store_queries

# Bytes of a thread that ptxas spills for D 128, bfloat16, at 480p. On sm_90: 128x128 16,
# 128x64_split 44, the others none. Elsewhere: 128x128 540 on sm_80 .. 89, 28 on sm_100, 660 on
# sm_120; 64x64 12 on sm_120; 128x64_persistent 24 on sm_80 .. 89, 60 on sm_120; 128x64_split 148 on
# sm_80 .. 89, 180 on sm_120; 128x64s3_tma_split 72 on sm_120. Not here: 64x128 spilled 572 on
# sm_90, 64x64 with one stage 208 on sm_80, 128x128 on sm_90 272 when persistent and 384 when split;
# with TMA it crashes ptxas on small sizes. Speed is unmeasured.
# 128x64s3 is what devices of 99 KB take unmeasured (sm_86, 89, 120): 96 KB, 255 registers (252 on
# sm_120), no spills. The registers of a multiprocessor hold one such block, 8 warps, and as many
# warps of 64x32 in two blocks (237 registers): equal occupancy, but a key that is fetched serves
# 128 queries instead of 64, in half as many rounds of the softmax, with a round more under way.
# 64x64 in 56 KB leaves room for one block of 4 warps.
TACTICS = (
    Tactic("64x32", num_warps=4, blocks={"Q": 64, "K": 32}, portable=True),
    Tactic("128x32", num_warps=8, blocks={"Q": 128, "K": 32}, portable=True),
    Tactic("128x128", num_warps=8, blocks={"Q": 128, "K": 128}, least_shared_kb=227),
    Tactic("128x64s3", 8, num_stages=3, blocks={"Q": 128, "K": 64}, least_shared_kb=99),
    Tactic("128x64", num_warps=8, blocks={"Q": 128, "K": 64}),
    Tactic("64x64", num_warps=4, blocks={"Q": 64, "K": 64}),
    Tactic("128x64_persistent", 8, blocks={"Q": 128, "K": 64}, schedule="persistent"),
    Tactic("128x64_split", 8, blocks={"Q": 128, "K": 64}, schedule="split", torch_only=True),
    Tactic("128x64s3_tma", 8, 3, blocks={"Q": 128, "K": 64}, tma=True, torch_only=True),
    Tactic(
        "128x64s3_tma_split",
        num_warps=8,
        num_stages=3,
        blocks={"Q": 128, "K": 64},
        schedule="split",
        tma=True,
        torch_only=True,
    ),
)


MAX_POOL_ROWS = 2**30
"""What a pool's tensor descriptor states as its rows: more than any pool has. Only full tiles of
valid rows are loaded through it, and so one kernel serves layers whatever their split of heads."""


@triton.jit
def _head_by_length(length, position, HEADS: tl.constexpr):
    """The head in `position` when heads with more history come first, then lower heads."""
    head = tl.arange(0, HEADS)
    longer = length[None, :] > length[:, None]
    lower_equal = (length[None, :] == length[:, None]) & (head[None, :] < head[:, None])
    rank = tl.sum((longer | lower_equal).to(tl.int32), axis=1)
    return tl.sum(tl.where(rank == position, head, 0), axis=0)


@triton.jit
def _attend_item(
    q_ptr,
    k_new_ptr,
    v_new_ptr,
    hist_k_ptr,
    hist_v_ptr,
    head_offset_ptr,
    hist_len_ptr,
    new_len_ptr,
    out_ptr,
    length,
    item,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    MAX_HISTORY: tl.constexpr,
    TMA_ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    FIRST: tl.constexpr,
    TILES: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One of H * TILES tiles of queries, from query FIRST of each head on, and all its keys."""
    head = _head_by_length(length, item // max(TILES, 1), HEADS)
    first_query = FIRST + (item % max(TILES, 1)) * Q
    EVERY_KEY: tl.constexpr = 2**30
    acc, row_sum, _ = attend_queries(
        q_ptr, k_new_ptr, v_new_ptr, hist_k_ptr, hist_v_ptr,
        head_offset_ptr, hist_len_ptr, new_len_ptr, head, first_query, 0, EVERY_KEY,
        N, H, D, MAX_HISTORY, TMA_ROWS, SCALE, PRECISION, Q, K,
    )  # fmt: skip
    store_queries(out_ptr, head, first_query, acc, row_sum, N, H, D, Q)


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
    TMA_ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    FULL_TILES: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_TILES: tl.constexpr,
    HEADS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Grid (PROGRAMS): every head's full tiles, then every head's tail, dealt out in rounds."""
    # Loaded here and not in the function: PyTorch would take an address that a call gives, and with
    # it this input, for written memory.
    slot = tl.arange(0, HEADS)
    length = tl.load(hist_len_ptr + slot, mask=slot < H, other=-1)
    program = tl.program_id(0)
    FULL_ITEMS: tl.constexpr = H * FULL_TILES
    TAIL_ITEMS: tl.constexpr = H * TAIL_TILES
    if PROGRAMS == FULL_ITEMS + TAIL_ITEMS:
        # The loops below would run once; without them it takes fewer registers.
        if program < FULL_ITEMS:
            _attend_item(
                q_ptr, k_new_ptr, v_new_ptr, hist_k_ptr, hist_v_ptr,
                head_offset_ptr, hist_len_ptr, new_len_ptr, out_ptr, length, program,
                N, H, D, MAX_HISTORY, TMA_ROWS, SCALE, PRECISION, Q, K,
                0, FULL_TILES, HEADS,
            )  # fmt: skip
        else:
            _attend_item(
                q_ptr, k_new_ptr, v_new_ptr, hist_k_ptr, hist_v_ptr,
                head_offset_ptr, hist_len_ptr, new_len_ptr, out_ptr, length, program - FULL_ITEMS,
                N, H, D, MAX_HISTORY, TMA_ROWS, SCALE, PRECISION, TAIL, K,
                FULL_TILES * Q, TAIL_TILES, HEADS,
            )  # fmt: skip
    else:
        for item in range(program, FULL_ITEMS, PROGRAMS):
            _attend_item(
                q_ptr, k_new_ptr, v_new_ptr, hist_k_ptr, hist_v_ptr,
                head_offset_ptr, hist_len_ptr, new_len_ptr, out_ptr, length, item,
                N, H, D, MAX_HISTORY, TMA_ROWS, SCALE, PRECISION, Q, K,
                0, FULL_TILES, HEADS,
            )  # fmt: skip
        # Whoever has no tile in the last round of full ones comes first.
        program = (program + PROGRAMS - FULL_ITEMS % PROGRAMS) % PROGRAMS
        for item in range(program, TAIL_ITEMS, PROGRAMS):
            _attend_item(
                q_ptr, k_new_ptr, v_new_ptr, hist_k_ptr, hist_v_ptr,
                head_offset_ptr, hist_len_ptr, new_len_ptr, out_ptr, length, item,
                N, H, D, MAX_HISTORY, TMA_ROWS, SCALE, PRECISION, TAIL, K,
                FULL_TILES * Q, TAIL_TILES, HEADS,
            )  # fmt: skip


def launch(problem: Problem, tactic: Tactic) -> Launch:
    """Plan of one call."""
    num_tokens, num_heads, head_dim = (problem.sizes[axis] for axis in "NHD")
    # float32 exists for tests: half the tile keeps it in the same shared memory.
    shrink = 2 if problem.dtype == "float32" else 1
    tile = tactic.blocks["Q"] // shrink
    constants = {
        "N": num_tokens,
        "H": num_heads,
        "D": head_dim,
        "MAX_HISTORY": problem.attributes["max_history"],
        "TMA_ROWS": MAX_POOL_ROWS if tactic.tma else 0,
        "SCALE": math.log2(math.e) / math.sqrt(head_dim),
        "PRECISION": "ieee" if problem.dtype == "float32" else "tf32",
        "Q": tile,
        "K": tactic.blocks["K"] // shrink,
        "HEADS": next_power_of_2(num_heads),
    }
    if tactic.schedule == "split":
        return _launch_split(constants, tactic, problem.num_sms)
    tail = min(tile, max(MIN_TAIL, tile // 2))
    full_tiles, tail_tiles = tile_counts(num_tokens, num_heads, tile, tail, problem.num_sms)
    programs = num_heads * (full_tiles + tail_tiles)
    if tactic.schedule == "persistent":
        programs = min(programs, problem.num_sms)
    constants |= {
        "FULL_TILES": full_tiles,
        "TAIL": tail,
        "TAIL_TILES": tail_tiles,
        "PROGRAMS": programs,
    }
    grid = (programs, 1, 1)
    return Launch(
        head_indexed_attention_kernel, constants, grid, tactic.num_warps, tactic.num_stages
    )


def _launch_split(constants: dict[str, Any], tactic: Tactic, num_sms: int) -> Launch:
    """Plan of the split schedule: one program per multiprocessor, with a place for two pieces."""
    tile, head_dim = constants["Q"], constants["D"]
    constants = constants | {"TILES": ceil_div(constants["N"], tile), "PROGRAMS": num_sms}
    return Launch(
        split_attention_kernel,
        constants,
        (num_sms, 1, 1),
        tactic.num_warps,
        tactic.num_stages,
        (
            Scratch("pieces", (2 * num_sms, tile, head_dim + 2), "float32"),
            Scratch("arrived", (num_sms,), "int32", zeroed=True),
        ),
    )
