"""FkSimilarityEviction on a GPU: selection inside the compaction.

Every program ranks all segments itself (there are at most a few dozen, so that costs less than a
second launch or a hand-over would), finds the one that belongs in its slot and moves its rows.

Legend: G dynamic heads, D head dim, F frames per chunk, P segments per frame, S tokens per segment,
M kept segments.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from forcing_kv.plugins.compile.launch import Launch, Problem, Tactic, ceil_div, next_power_of_2
from forcing_kv.plugins.frame_chain.kernel import chain_constants, chain_frame

TACTICS = (
    Tactic("tokens64", num_warps=4, blocks={"BLOCK": 64}, portable=True),
    Tactic("tokens128", num_warps=8, blocks={"BLOCK": 128}),
)


@triton.jit
def segment_in_slot(scores_ptr, slot, SEGMENTS: tl.constexpr, M: tl.constexpr, PAD: tl.constexpr):
    """Index of the segment that is kept in `slot`, in ascending order of the index.

    Smaller scores first, the lower index among equals; NaN counts as the largest score.
    """
    index = tl.arange(0, PAD)
    score = tl.load(scores_ptr + index, mask=index < SEGMENTS, other=float("inf"))
    score = tl.where(score == score, score, float("inf"))
    # Padding ranks last: it has the largest score and the highest indices.
    smaller = score[None, :] < score[:, None]
    lower_equal = (score[None, :] == score[:, None]) & (index[None, :] < index[:, None])
    rank = tl.sum((smaller | lower_equal).to(tl.int32), axis=1)
    is_kept = (rank < M).to(tl.int32)
    position = tl.cumsum(is_kept, axis=0) - is_kept
    return tl.sum(tl.where((is_kept == 1) & (position == slot), index, 0), axis=0)


@triton.jit
def similarity_eviction_kernel(
    scores_ptr,
    hist_k_ptr,
    hist_v_ptr,
    new_k_ptr,
    new_v_ptr,
    dyn_k_ptr,
    dyn_v_ptr,
    kept_ptr,
    N: tl.constexpr,
    D: tl.constexpr,
    FIRST_HEAD: tl.constexpr,
    ROW_OFFSET: tl.constexpr,
    ROWS_PER_HEAD: tl.constexpr,
    SINK_ROWS: tl.constexpr,
    TEMPORAL_FRAMES: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    M: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (ceil(S / BLOCK), M, G)."""
    CHAIN: tl.constexpr = (
        N, D, FIRST_HEAD, ROW_OFFSET, ROWS_PER_HEAD, SINK_ROWS, TEMPORAL_FRAMES, T
    )  # fmt: skip
    slot = tl.program_id(1)
    head = tl.program_id(2)
    segment = segment_in_slot(scores_ptr, slot, SEGMENTS, M, PAD)
    if (tl.program_id(0) == 0) & (head == 0):
        tl.store(kept_ptr + slot, segment)

    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (token < S)[:, None]
    channel = tl.arange(0, D)[None, :]
    source = ((segment % P) * S + token)[:, None] * D + channel
    target_row = tl.cast(head, tl.int64) * (M * S) + slot * S
    target = target_row * D + token[:, None] * D + channel
    k_ptr = chain_frame(hist_k_ptr, new_k_ptr, head, segment // P, CHAIN)
    v_ptr = chain_frame(hist_v_ptr, new_v_ptr, head, segment // P, CHAIN)
    k = tl.load(k_ptr + source, mask=mask)
    v = tl.load(v_ptr + source, mask=mask)
    tl.store(dyn_k_ptr + target, k, mask=mask)
    tl.store(dyn_v_ptr + target, v, mask=mask)


def launch(problem: Problem, tactic: Tactic) -> Launch:
    """Plan of one call."""
    sizes = problem.sizes
    num_segments = sizes["F"] * sizes["P"]
    constants = chain_constants(problem) | {
        "P": sizes["P"],
        "S": sizes["S"],
        "M": sizes["M"],
        "SEGMENTS": num_segments,
        "PAD": next_power_of_2(num_segments),
        "BLOCK": tactic.blocks["BLOCK"],
    }
    grid = (ceil_div(sizes["S"], tactic.blocks["BLOCK"]), sizes["M"], sizes["G"])
    return Launch(similarity_eviction_kernel, constants, grid, tactic.num_warps, tactic.num_stages)
