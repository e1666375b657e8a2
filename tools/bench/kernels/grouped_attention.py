"""Attention with one call for each run of heads of one history length: dense, and the research way.

Legend: H heads, N new tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from forcing_kv.plugins.check.cases import OpCase, attention_case

Call = Callable[[], Any]


def head_groups(case: OpCase) -> list[slice]:
    """Runs of neighbouring heads with one history length."""
    lengths = case.integers["hist_len"]
    starts = [i for i in range(len(lengths)) if i == 0 or lengths[i] != lengths[i - 1]]
    return [slice(*pair) for pair in zip(starts, [*starts[1:], len(lengths)], strict=True)]


def group_rows(case: OpCase, heads: slice) -> tuple[int, int]:
    """Pool rows and valid rows of each head of a group."""
    offsets = [*case.integers["head_offset"], case.sizes["R"]]
    return offsets[heads.start + 1] - offsets[heads.start], case.integers["hist_len"][heads.start]


def group_history(case: OpCase, pool: Tensor, heads: slice) -> Tensor:
    """View [heads, rows, D] of the valid history of a group whose heads lie evenly apart."""
    offsets, rows = case.integers["head_offset"][heads], case.integers["hist_len"][heads.start]
    step = offsets[1] - offsets[0] if len(offsets) > 1 else rows
    assert offsets == tuple(offsets[0] + i * step for i in range(len(offsets)))
    head_dim = pool.shape[1]
    size, stride = (len(offsets), rows, head_dim), (step * head_dim, head_dim, 1)
    return pool.as_strided(size, stride, offsets[0] * head_dim)


def extract_join_scatter(case: OpCase, inputs: Sequence[Tensor]) -> Tensor:
    """Head-indexed attention the reference implementation's way.

    For each group of heads: extract its queries, join history and new rows, attend, and write the
    result to the group's place.

    Returns:
        Attention output [N, H, D].
    """
    q, k_new, v_new, hist_k, hist_v = inputs[:5]
    num_heads, num_tokens, head_dim = q.shape
    out = q.new_empty(num_tokens, num_heads, head_dim)
    for heads in head_groups(case):
        keys, values = (
            torch.cat((group_history(case, pool, heads), new[heads]), dim=1)
            for pool, new in ((hist_k, k_new), (hist_v, v_new))
        )
        attended = F.scaled_dot_product_attention(q[heads][None], keys[None], values[None])[0]
        out[:, heads] = attended.transpose(0, 1)
    return out


def same_key_count(case: OpCase) -> OpCase:
    """A case with as many keys in all, spread evenly over the heads: dense attention."""
    num_heads, lengths = case.sizes["H"], case.integers["hist_len"]
    rows = sum(lengths) // num_heads
    history = [(rows, rows)] * num_heads
    return attention_case(f"{case.name}, dense", case.sizes["N"], case.sizes["D"], history)


def dense_attention(case: OpCase, inputs: Sequence[Tensor]) -> Call:
    """Attention of a case whose heads have one length, keys and values joined beforehand.

    Returns:
        A call that gives a view [N, H, D] of the result.
    """
    (heads,) = head_groups(case)
    q, k_new, v_new, hist_k, hist_v = inputs[:5]
    k, v = (
        torch.cat((group_history(case, pool, heads), new), dim=1)[None]
        for pool, new in ((hist_k, k_new), (hist_v, v_new))
    )
    return lambda: F.scaled_dot_product_attention(q[None], k, v)[0].transpose(0, 1)
