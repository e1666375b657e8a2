"""Meaning of FkHeadIndexedAttention in plain torch.

Legend: H heads, N new tokens, D head dim, R pool rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def head_indexed_attention(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    hist_k: Tensor,
    hist_v: Tensor,
    head_offset: Tensor,
    hist_len: Tensor,
    new_len: Tensor,
    max_history: int,
) -> Tensor:
    """Attend from every new token to its head's history prefix and to the new rows.

    Rows behind a length may hold anything, NaN included. Reads the lengths on the host: this is
    the meaning, not the fast way.

    Args:
        q: queries [H, N, D], compute dtype.
        k_new: keys of the chunk [H, N, D], same dtype.
        v_new: values of the chunk [H, N, D], same dtype.
        hist_k: pool of history keys [R, D], same dtype.
        hist_v: pool of history values [R, D], same dtype.
        head_offset: first pool row of each head [H], int32.
        hist_len: valid history rows of each head [H], int32, 0 .. max_history.
        new_len: valid new rows [1], int32, 1 .. N.
        max_history: largest history capacity of any head in rows; 0 means no history at all.

    Returns:
        Attention output [N, H, D], contiguous, in q's dtype; softmax and sums in float32, scale
        1 / sqrt(D).
    """
    num_new = int(new_len)
    lengths = [min(length, max_history) for length in hist_len.tolist()]
    outputs = []
    for head, (offset, length) in enumerate(zip(head_offset.tolist(), lengths, strict=True)):
        rows = slice(offset, offset + length)
        k = torch.cat((hist_k[rows], k_new[head, :num_new])).float()
        v = torch.cat((hist_v[rows], v_new[head, :num_new])).float()
        # With a batch and a head axis PyTorch works in tiles; without, it holds N x M scores.
        q_11ND, k_11MD, v_11MD = (x[None, None] for x in (q[head].float(), k, v))
        outputs.append(F.scaled_dot_product_attention(q_11ND, k_11MD, v_11MD)[0, 0])
    return torch.stack(outputs, dim=1).to(q.dtype)
