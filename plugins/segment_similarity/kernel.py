"""FkSegmentSimilarity on a GPU: one program per candidate segment.

A program keeps the dot product and both squared norms of its tokens in registers while it walks the
dynamic heads, so keys are read once per side and the sum has one order: equal runs give equal bits.

Legend: G dynamic heads, D head dim, F frames per chunk, P segments per frame, S tokens per segment.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from forcing_kv.plugins.compile.launch import Launch, Problem, Tactic
from forcing_kv.plugins.frame_chain.kernel import chain_constants, chain_frame

TACTICS = (
    Tactic("tokens32", num_warps=4, blocks={"BLOCK": 32}, portable=True),
    Tactic("tokens64", num_warps=8, blocks={"BLOCK": 64}),
    Tactic("tokens128", num_warps=16, blocks={"BLOCK": 128}),
)


@triton.jit
def segment_similarity_kernel(
    hist_k_ptr,
    new_k_ptr,
    scores_ptr,
    N: tl.constexpr,
    D: tl.constexpr,
    FIRST_HEAD: tl.constexpr,
    ROW_OFFSET: tl.constexpr,
    ROWS_PER_HEAD: tl.constexpr,
    SINK_ROWS: tl.constexpr,
    TEMPORAL_FRAMES: tl.constexpr,
    T: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (F * P): program j * P + p scores segment p of candidate j."""
    CHAIN: tl.constexpr = (
        N, D, FIRST_HEAD, ROW_OFFSET, ROWS_PER_HEAD, SINK_ROWS, TEMPORAL_FRAMES, T
    )  # fmt: skip
    segment = tl.program_id(0)
    frame = segment // P
    first_token = (segment % P) * S
    channel = tl.arange(0, D)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, S, BLOCK):
        token = start + tl.arange(0, BLOCK)
        mask = (token < S)[:, None]
        offset = (first_token + token)[:, None] * D + channel[None, :]
        dot = tl.zeros((BLOCK,), tl.float32)
        current_square = tl.zeros((BLOCK,), tl.float32)
        next_square = tl.zeros((BLOCK,), tl.float32)
        for head in range(G):
            current_ptr = chain_frame(hist_k_ptr, new_k_ptr, head, frame, CHAIN)
            next_ptr = chain_frame(hist_k_ptr, new_k_ptr, head, frame + 1, CHAIN)
            current = tl.load(current_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            following = tl.load(next_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            dot += tl.sum(current * following, axis=1)
            current_square += tl.sum(current * current, axis=1)
            next_square += tl.sum(following * following, axis=1)
        current_norm = tl.maximum(tl.sqrt_rn(current_square), 1e-8)
        next_norm = tl.maximum(tl.sqrt_rn(next_square), 1e-8)
        total += tl.where(token < S, tl.div_rn(dot, current_norm * next_norm), 0.0)
    tl.store(scores_ptr + segment, tl.sum(total, axis=0) / S)


def launch(problem: Problem, tactic: Tactic) -> Launch:
    """Plan of one call."""
    sizes = problem.sizes
    constants = chain_constants(problem) | {
        "G": sizes["G"],
        "P": sizes["P"],
        "S": sizes["S"],
        "BLOCK": tactic.blocks["BLOCK"],
    }
    grid = (sizes["F"] * sizes["P"], 1, 1)
    return Launch(segment_similarity_kernel, constants, grid, tactic.num_warps, tactic.num_stages)
