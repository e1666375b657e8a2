"""Attention with the heads folded into the batch of PyTorch's variable-length kernels.

Legend: H heads, N new tokens, D head dim, S keys of all heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from forcing_kv.plugins.check.cases import OpCase


@dataclass(frozen=True)
class FoldedHeads:
    """Heads as a batch of sequences of their own lengths, packed one behind the other."""

    q: Tensor
    """Queries [H*N, 1, D], a view."""
    k: Tensor
    """Keys [S, 1, D]: of every head its history, then its new rows."""
    v: Tensor
    """Values [S, 1, D]."""
    cu_q: Tensor
    """First query of each sequence, and their number, int32 [H + 1]."""
    cu_k: Tensor
    """First key of each sequence, and their number, int32 [H + 1]."""
    max_q: int
    """Queries of the longest sequence."""
    max_k: int
    """Keys of the longest sequence."""

    def unfold(self, out: Tensor) -> Tensor:
        """View [N, H, D] of a result [H*N, 1, D]."""
        return out.view(len(self.cu_q) - 1, self.max_q, -1).transpose(0, 1)


def join_heads(case: OpCase, pool: Tensor, new: Tensor) -> Tensor:
    """Rows [S, 1, D] of every head: its history, then its new rows."""
    new_len = case.integers["new_len"][0]
    spans = zip(case.integers["head_offset"], case.integers["hist_len"], strict=True)
    parts = [
        part
        for head, (offset, rows) in enumerate(spans)
        for part in (pool[offset : offset + rows], new[head, :new_len])
    ]
    return torch.cat(parts)[:, None]


def fold_heads(case: OpCase, inputs: Sequence[Tensor]) -> FoldedHeads:
    """A case as variable-length attention, keys and values joined."""
    q, k_new, v_new, hist_k, hist_v = inputs[:5]
    num_heads, num_tokens, head_dim = q.shape
    keys = [rows + case.integers["new_len"][0] for rows in case.integers["hist_len"]]
    starts = torch.tensor(list(accumulate(keys, initial=0)), dtype=torch.int32, device=q.device)
    return FoldedHeads(
        q=q.reshape(num_heads * num_tokens, 1, head_dim),
        k=join_heads(case, hist_k, k_new),
        v=join_heads(case, hist_v, v_new),
        cu_q=torch.arange(num_heads + 1, dtype=torch.int32, device=q.device) * num_tokens,
        cu_k=starts,
        max_q=num_tokens,
        max_k=max(keys),
    )


def flash_folded(heads: FoldedHeads) -> Tensor:
    """FlashAttention's variable-length kernel; CUDA alone."""
    lengths = (heads.cu_q, heads.cu_k, heads.max_q, heads.max_k)
    out = torch.ops.aten._flash_attention_forward(
        heads.q, heads.k, heads.v, *lengths, 0.0, False, False
    )[0]
    return heads.unfold(out)


def cudnn_folded(heads: FoldedHeads) -> Tensor:
    """The variable-length kernel of cuDNN; CUDA alone."""
    lengths = (heads.cu_q, heads.cu_k, heads.max_q, heads.max_k)
    out = torch.ops.aten._cudnn_attention_forward(
        heads.q, heads.k, heads.v, None, *lengths, True, 0.0, False, False
    )[0]
    return heads.unfold(out)


FOLDED: dict[str, Callable[[FoldedHeads], Tensor]] = {"flash": flash_folded, "cudnn": cudnn_folded}
"""Variable-length attention kernels of PyTorch."""
