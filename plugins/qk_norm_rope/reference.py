"""Meaning of FkQkNormRope in plain torch.

Legend: N tokens, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Normalise, rotate and lay out queries and keys.

    Args:
        q: queries [N, H*D], compute dtype.
        k: keys [N, H*D], same dtype.
        q_weight: norm weight of q [H*D], compute dtype or float32 (then rounded to q's dtype).
        k_weight: norm weight of k [H*D], likewise.
        cos: cosines of the rotary angles [N, D/2], float32.
        sin: sines of the rotary angles [N, D/2], float32.
        num_heads: attention heads, H.
        eps: epsilon added to the mean square.

    Returns:
        q and k, [H, N, D] each, contiguous, in q's dtype.
    """
    return (
        _norm_rope(q, q_weight, cos, sin, num_heads, eps),
        _norm_rope(k, k_weight, cos, sin, num_heads, eps),
    )


def _norm_rope(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, num_heads: int, eps: float
) -> Tensor:
    """RMSNorm in float32, rounded before the weight (Wan2.1), then pairwise rotation."""
    x32 = x.float()
    normed = (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    x_HND = (normed * weight.to(x.dtype)).unflatten(-1, (num_heads, -1)).transpose(0, 1)
    even, odd = x_HND.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype).contiguous()
