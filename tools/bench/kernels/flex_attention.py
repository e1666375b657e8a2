"""FlexAttention with a mask per head over padded histories.

Legend: H heads, N new tokens, D head dim, K padded keys of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from forcing_kv.plugins.check.cases import OpCase
from forcing_kv.plugins.compile.launch import ceil_div
from forcing_kv.tools.bench.kernels.grouped_attention import Call

_FLEX_BLOCK = 128
"""Tile of FlexAttention's block masks, its default."""


def flex_call(
    case: OpCase, inputs: Sequence[Tensor], attend: Callable[..., Any] = flex_attention
) -> Call:
    """A case by FlexAttention, histories and new rows joined beforehand.

    Args:
        case: the call.
        inputs: its inputs.
        attend: `flex_attention`, compiled or not.

    Returns:
        A call that gives a view [N, H, D] of the result.
    """
    q, k_new, v_new, hist_k, hist_v, _, hist_len, new_len = inputs
    num_new = case.integers["new_len"][0]
    num_heads, num_tokens, head_dim = q.shape
    # The new rows begin with a block, so that few blocks are masked in part.
    padded = ceil_div(max(case.integers["hist_len"]), _FLEX_BLOCK) * _FLEX_BLOCK
    spans = list(zip(case.integers["head_offset"], case.integers["hist_len"], strict=True))

    def pad(pool: Tensor, new: Tensor) -> Tensor:
        # Masked rows count with weight zero: they must not hold NaN.
        rows_HKD = pool.new_zeros(num_heads, padded + num_tokens, head_dim)
        for head, (offset, rows) in enumerate(spans):
            rows_HKD[head, :rows] = pool[offset : offset + rows]
        rows_HKD[:, padded : padded + num_new] = new[:, :num_new]
        return rows_HKD[None]

    def is_valid(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < hist_len[head]) | ((key >= padded) & (key < padded + new_len[0]))

    # Every row of query tiles sees the same keys: the mask of one is repeated.
    num_keys = padded + num_tokens
    one = create_block_mask(
        is_valid, 1, num_heads, _FLEX_BLOCK, num_keys, str(q.device), BLOCK_SIZE=_FLEX_BLOCK
    )
    rows = ceil_div(num_tokens, _FLEX_BLOCK)
    assert one.full_kv_num_blocks is not None
    assert one.full_kv_indices is not None
    mask = BlockMask.from_kv_blocks(
        one.kv_num_blocks.repeat(1, 1, rows),
        one.kv_indices.repeat(1, 1, rows, 1),
        one.full_kv_num_blocks.repeat(1, 1, rows),
        one.full_kv_indices.repeat(1, 1, rows, 1),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=is_valid,
        seq_lengths=(num_tokens, num_keys),
    )
    k, v = pad(hist_k, k_new), pad(hist_v, v_new)
    return lambda: attend(q[None], k, v, block_mask=mask)[0].transpose(0, 1)
