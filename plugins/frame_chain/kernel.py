"""Address of a frame in the chain of an eviction, for the Triton kernels.

Legend: D head dim, N new tokens, T tokens per frame.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from forcing_kv.plugins.compile.launch import Problem


@triton.jit
def chain_frame(hist_ptr, new_ptr, dynamic_head, frame, CHAIN: tl.constexpr):
    """Pointer to the first row [T, D] of a frame of a dynamic head; 64-bit offsets.

    CHAIN are the values of `chain_constants`, in its order.
    """
    N: tl.constexpr = CHAIN[0]
    D: tl.constexpr = CHAIN[1]
    FIRST_HEAD: tl.constexpr = CHAIN[2]
    ROW_OFFSET: tl.constexpr = CHAIN[3]
    ROWS_PER_HEAD: tl.constexpr = CHAIN[4]
    SINK_ROWS: tl.constexpr = CHAIN[5]
    TEMPORAL_FRAMES: tl.constexpr = CHAIN[6]
    T: tl.constexpr = CHAIN[7]
    head = tl.cast(dynamic_head, tl.int64)
    if frame < TEMPORAL_FRAMES:
        row = ROW_OFFSET + head * ROWS_PER_HEAD + SINK_ROWS + frame * T
        base = hist_ptr + row * D
    else:
        row = (FIRST_HEAD + head) * N + (frame - TEMPORAL_FRAMES) * T
        base = new_ptr + row * D
    return base


def chain_constants(problem: Problem) -> dict[str, Any]:
    """Constants of `chain_frame`."""
    return {
        "N": problem.sizes["N"],
        "D": problem.sizes["D"],
        "FIRST_HEAD": problem.attributes["first_head"],
        "ROW_OFFSET": problem.attributes["row_offset"],
        "ROWS_PER_HEAD": problem.attributes["rows_per_head"],
        "SINK_ROWS": problem.attributes["sink_rows"],
        "TEMPORAL_FRAMES": problem.attributes["temporal_frames"],
        "T": problem.sizes["T"],
    }
