"""Meaning of FkSteadyAttention in plain torch.

FkHeadIndexedAttention with lengths that are known when the graph is made, so that each block of
heads is one dense attention. It has no kernel of its own: every compiler brings a fused one.

Legend: G heads of a block, H heads, N new tokens, D head dim, R pool rows, M rows that a head sees.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from forcing_kv.plugins.steady_attention.layout import HeadBlock, SteadyLayout

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Dense attention: q [1, G, N, D], k and v [1, G, M, D] -> [1, G, N, D]."""


def steady_attention(
    q: Tensor, k_new: Tensor, v_new: Tensor, hist_k: Tensor, hist_v: Tensor, *layout: int
) -> Tensor:
    """Attend from every new token to its head's history prefix and to the new rows.

    Rows behind a prefix may hold anything, NaN included.

    Args:
        q: queries [H, N, D], compute dtype.
        k_new: keys of the chunk [H, N, D], same dtype.
        v_new: values of the chunk [H, N, D], same dtype.
        hist_k: pool of history keys [R, D], same dtype.
        hist_v: pool of history values [R, D], same dtype.
        layout: fields of `SteadyLayout`, in order.

    Returns:
        Attention output [N, H, D], contiguous, in q's dtype; softmax and sums in float32, scale
        1 / sqrt(D).
    """
    return attend_blocks(F.scaled_dot_product_attention, q, k_new, v_new, hist_k, hist_v, *layout)


def attend_blocks(
    attend: Attend,
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    hist_k: Tensor,
    hist_v: Tensor,
    *layout: int,
) -> Tensor:
    """`steady_attention` by the given dense attention, one call for each block of heads."""
    outputs = []
    for block in SteadyLayout(*layout).blocks(q.shape[0]):
        k_GMD = _joined(hist_k, k_new, block)
        v_GMD = _joined(hist_v, v_new, block)
        # With a batch axis PyTorch works in tiles; without, it holds N x M scores.
        q_1GND, k_1GMD, v_1GMD = (x[None] for x in (q[block.heads], k_GMD, v_GMD))
        outputs.append(attend(q_1GND, k_1GMD, v_1GMD)[0])
    return torch.cat(outputs).transpose(0, 1).contiguous()


def _joined(pool: Tensor, new: Tensor, block: HeadBlock) -> Tensor:
    """Rows [G, M, D] that the heads of a block see: of the past, then their own."""
    held = pool[block.pool].unflatten(0, (block.num_heads, block.capacity))
    return torch.cat((held[:, : block.num_rows], new[block.heads]), dim=1)
