"""FkHeadIndexedAttention in traceable torch operators: fixed shapes, lengths read on the device.

For compilers that have no kernel of ours (Inductor on a CPU). History rows are gathered per head,
padded to the largest capacity and masked; a padded row may hold NaN, so keys and values are cleared
too.

Legend: H heads, N new tokens, D head dim, R pool rows, M padded history rows.
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
    """Same as `reference.head_indexed_attention`, without a host read."""
    num_new = q.shape[1]
    new_valid_HN = (torch.arange(num_new, device=q.device) < new_len).expand(q.shape[0], -1)
    slot_M = torch.arange(max_history, device=q.device)
    hist_valid_HM = slot_M < hist_len[:, None].clamp(max=max_history)
    row_HM = torch.where(hist_valid_HM, head_offset[:, None] + slot_M, 0)
    valid_HK = torch.cat((hist_valid_HM, new_valid_HN), dim=1)

    def joined(pool: Tensor, new: Tensor) -> Tensor:
        rows_HKD = torch.cat((pool[row_HM], new), dim=1).float()
        return torch.where(valid_HK[..., None], rows_HKD, 0.0)

    k_1HKD, v_1HKD = joined(hist_k, k_new)[None], joined(hist_v, v_new)[None]
    mask = valid_HK[None, :, None, :]
    out_HND = F.scaled_dot_product_attention(q.float()[None], k_1HKD, v_1HKD, attn_mask=mask)[0]
    return out_HND.transpose(0, 1).contiguous().to(q.dtype)
