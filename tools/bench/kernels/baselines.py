"""Other ways to do what an operator does, to be timed beside it.

Legend: H heads, N new tokens, D head dim, R pool rows, K keys of a head, S keys of all heads,
M padded history rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from forcing_kv.plugins.accuracy import OutputError, output_errors, reference_outputs
from forcing_kv.plugins.cases import OpCase, attention_case
from forcing_kv.plugins.launch import ceil_div
from forcing_kv.plugins.registry import HEAD_INDEXED_ATTENTION

Call = Callable[[], Any]

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
"""Attention kernels of PyTorch that the operator is compared with."""

_FLEX_BLOCK = 128
"""Tile of FlexAttention's block masks, its default."""


@dataclass(frozen=True)
class Baseline:
    """A call to time, and the case by whose truth its result is judged before."""

    name: str
    """For listings. Where a name says join, histories and new rows are joined within the call."""
    case: OpCase
    """What is computed."""
    inputs: Sequence[Tensor]
    """The case's inputs."""
    prepare: Callable[[], Call]
    """Makes the call; raises a RuntimeError where this device or build lacks the kernel."""


def head_groups(case: OpCase) -> list[slice]:
    """Runs of neighbouring heads with one history length."""
    lengths = case.integers["hist_len"]
    starts = [i for i in range(len(lengths)) if i == 0 or lengths[i] != lengths[i - 1]]
    return [slice(*pair) for pair in zip(starts, [*starts[1:], len(lengths)], strict=True)]


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


def flex_call(
    case: OpCase, inputs: Sequence[Tensor], attend: Callable[..., Any] = flex_attention
) -> Call:
    """FlexAttention with a mask per head over padded histories, joined beforehand.

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


def baselines(case: OpCase, inputs: Sequence[Tensor]) -> Iterator[Baseline]:
    """What to time beside a case's kernel.

    Attention: PyTorch's kernels on the same number of keys, the heads folded into the batch of
    variable-length kernels, FlexAttention, and the reference implementation's way. Others: the
    reference in plain PyTorch.
    """
    if case.spec is not HEAD_INDEXED_ATTENTION:
        yield Baseline("torch", case, inputs, partial(_reference_call, case, inputs))
        return
    dense = same_key_count(case)
    dense_inputs = dense.build(inputs[0].dtype, device=str(inputs[0].device))
    for name, backend in BACKENDS.items():
        prepare = partial(_dense_call, backend, dense, dense_inputs)
        yield Baseline(f"sdpa-{name}", dense, dense_inputs, prepare)
    for name, attend in FOLDED.items():
        call = partial(_folded_call, attend, case, inputs)
        yield Baseline(f"varlen-{name}", case, inputs, partial(call, join=False))
        yield Baseline(f"join-varlen-{name}", case, inputs, partial(call, join=True))
    yield Baseline("flex", case, inputs, partial(_compiled_flex_call, case, inputs))
    for name, backend in BACKENDS.items():
        prepare = partial(_extract_call, backend, case, inputs)
        yield Baseline(f"extract-join-scatter-{name}", case, inputs, prepare)


def baseline_errors(baseline: Baseline, result: Any) -> tuple[OutputError, ...]:
    """Judge what a baseline's call gave by the operator's tolerance class."""
    outputs = result if isinstance(result, tuple) else (result,)
    case = baseline.case
    return output_errors(case.spec, baseline.inputs, case.attributes, outputs)


def _reference_call(case: OpCase, inputs: Sequence[Tensor]) -> Call:
    return partial(reference_outputs, case.spec, inputs, case.attributes)


def _dense_call(backend: SDPBackend, case: OpCase, inputs: Sequence[Tensor]) -> Call:
    return _with_backend(backend, dense_attention(case, inputs))


def _extract_call(backend: SDPBackend, case: OpCase, inputs: Sequence[Tensor]) -> Call:
    return _with_backend(backend, partial(extract_join_scatter, case, inputs))


def _compiled_flex_call(case: OpCase, inputs: Sequence[Tensor]) -> Call:
    return flex_call(case, inputs, torch.compile(flex_attention, dynamic=False))


def _folded_call(
    attend: Callable[[FoldedHeads], Tensor], case: OpCase, inputs: Sequence[Tensor], join: bool
) -> Call:
    heads = fold_heads(case, inputs)
    _, k_new, v_new, hist_k, hist_v = inputs[:5]

    def call() -> Tensor:
        if not join:
            return attend(heads)
        k, v = join_heads(case, hist_k, k_new), join_heads(case, hist_v, v_new)
        return attend(replace(heads, k=k, v=v))

    return call


def _with_backend(backend: SDPBackend, function: Call) -> Call:
    def call() -> Any:
        with sdpa_kernel(backend):
            return function()

    return call
