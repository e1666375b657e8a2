"""FkQkNormRope on a GPU: one pass over q and k.

A program handles a few tokens of q or of k. A row is read as [H, D]; the head axis is padded to a
power of two and masked, which costs no traffic. Rows of q and k may lie apart, as those of a fused
product of q, k and v do.

Legend: N tokens, H heads, D head dim, R rows of a program.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from forcing_kv.plugins.compile.launch import Launch, Problem, Tactic, ceil_div, next_power_of_2

TACTICS = (
    Tactic("rows1", num_warps=4, blocks={"ROWS": 1}, portable=True),
    Tactic("rows2", num_warps=8, blocks={"ROWS": 2}),
    Tactic("rows4", num_warps=8, blocks={"ROWS": 4}),
)

ROW_STRIDED_INPUTS = ("q", "k")
"""Inputs whose rows may lie apart."""


@triton.jit
def _norm_rope_rows(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    STRIDE: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.arange(0, HEADS)
    channel = tl.arange(0, D)
    pair = tl.arange(0, D // 2)
    dtype = out_ptr.dtype.element_ty

    token64 = token.to(tl.int64)[:, None, None]
    mask = (token < N)[:, None, None] & (head < H)[None, :, None]
    row_offset = head[None, :, None] * D + channel[None, None, :]
    x = tl.load(x_ptr + token64 * STRIDE + row_offset, mask=mask, other=0.0).to(tl.float32)
    weight_offset = head[:, None] * D + channel[None, :]
    weight = tl.load(weight_ptr + weight_offset, mask=head[:, None] < H, other=0.0)

    mean_square = tl.sum(tl.sum(x * x, axis=2), axis=1) / (H * D)
    inverse = tl.rsqrt(mean_square + EPS)
    # Rounded to the compute dtype after the norm and after the weight, as Wan2.1 does.
    normed = (x * inverse[:, None, None]).to(dtype).to(tl.float32)
    scaled = (normed * weight.to(dtype).to(tl.float32)[None, :, :]).to(dtype).to(tl.float32)

    even, odd = tl.split(tl.reshape(scaled, (ROWS, HEADS, D // 2, 2)))
    angle_offset = token64 * (D // 2) + pair[None, None, :]
    angle_mask = (token < N)[:, None, None]
    cos = tl.load(cos_ptr + angle_offset, mask=angle_mask, other=0.0)
    sin = tl.load(sin_ptr + angle_offset, mask=angle_mask, other=0.0)
    rotated = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    out = tl.reshape(rotated, (ROWS, HEADS, D)).to(dtype)

    head64 = head.to(tl.int64)[None, :, None]
    out_offset = (head64 * N + token64) * D + channel[None, None, :]
    tl.store(out_ptr + out_offset, out, mask=mask)


@triton.jit
def qk_norm_rope_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
):
    """Grid (ceil(N / ROWS), 2): the second axis is q or k."""
    if tl.program_id(1) == 0:
        _norm_rope_rows(
            q_ptr, q_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, Q_STRIDE, N, H, D, EPS, ROWS, HEADS
        )
    else:
        _norm_rope_rows(
            k_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_out_ptr, K_STRIDE, N, H, D, EPS, ROWS, HEADS
        )


def launch(problem: Problem, tactic: Tactic) -> Launch:
    """Plan of one call."""
    num_tokens, num_heads, head_dim = (problem.sizes[axis] for axis in "NHD")
    constants = {
        "N": num_tokens,
        "H": num_heads,
        "D": head_dim,
        "EPS": float(problem.attributes["eps"]),
        "ROWS": tactic.blocks["ROWS"],
        "HEADS": next_power_of_2(num_heads),
        "Q_STRIDE": problem.row_strides.get("q", num_heads * head_dim),
        "K_STRIDE": problem.row_strides.get("k", num_heads * head_dim),
    }
    grid = (ceil_div(num_tokens, tactic.blocks["ROWS"]), 2, 1)
    return Launch(qk_norm_rope_kernel, constants, grid, tactic.num_warps, tactic.num_stages)
