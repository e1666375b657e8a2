"""Other ways to do what an operator does, to be timed beside it.

Legend: H heads, N new tokens, D head dim, R pool rows, K keys of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from forcing_kv.plugins.accuracy import reference_outputs
from forcing_kv.plugins.cases import OpCase
from forcing_kv.plugins.registry import HEAD_INDEXED_ATTENTION

Call = Callable[[], Any]

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
"""Attention kernels of PyTorch that the operator is compared with."""


def head_groups(case: OpCase) -> list[tuple[slice, int, int]]:
    """Runs of neighbouring heads with one history length: (heads, first row of the first, rows)."""
    lengths = case.integers["hist_len"]
    starts = [i for i in range(len(lengths)) if i == 0 or lengths[i] != lengths[i - 1]]
    stops = [*starts[1:], len(lengths)]
    offsets = case.integers["head_offset"]
    return [
        (slice(start, stop), offsets[start], lengths[start])
        for start, stop in zip(starts, stops, strict=True)
    ]


def extract_join_scatter(case: OpCase, inputs: Sequence[Tensor]) -> Tensor:
    """Head-indexed attention the reference implementation's way.

    For each group of heads: extract its queries, join history and new rows, attend, and write the
    result to the group's place. Needs every history to fill its rows up to the next head's.

    Returns:
        Attention output [N, H, D].
    """
    q, k_new, v_new, hist_k, hist_v = inputs[:5]
    num_heads, num_tokens, head_dim = q.shape
    out = q.new_empty(num_tokens, num_heads, head_dim)
    for heads, first, rows in head_groups(case):
        count = heads.stop - heads.start
        run = slice(first, first + count * rows)

        def join(pool: Tensor, new: Tensor) -> Tensor:
            history = pool[run].view(count, rows, head_dim)  # noqa: B023
            return torch.cat((history, new[heads]), dim=1)  # noqa: B023

        keys, values = join(hist_k, k_new), join(hist_v, v_new)
        attended = F.scaled_dot_product_attention(q[heads][None], keys[None], values[None])[0]
        out[:, heads] = attended.transpose(0, 1)
    return out


def same_key_count(case: OpCase, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Dense q, k, v with as many keys in all as the case has, spread evenly over the heads."""
    q = inputs[0]
    num_heads, num_tokens, head_dim = q.shape
    keys = num_tokens + sum(case.integers["hist_len"]) // num_heads
    k, v = (torch.randn(1, num_heads, keys, head_dim).to(q) for _ in range(2))
    return q[None], k, v


def baselines(case: OpCase, inputs: Sequence[Tensor]) -> Iterator[tuple[str, Call]]:
    """Named calls to time beside a case's kernel.

    Attention: PyTorch's kernels on the same number of keys, and the reference implementation's
    way on top of each. Others: the reference in plain PyTorch.
    """
    if case.spec is not HEAD_INDEXED_ATTENTION:
        yield "torch", lambda: reference_outputs(case.spec, inputs, case.attributes)
        return
    dense = same_key_count(case, inputs)
    for name, backend in BACKENDS.items():
        yield f"sdpa-{name}", _with_backend(backend, F.scaled_dot_product_attention, *dense)
    for name, backend in BACKENDS.items():
        call = _with_backend(backend, extract_join_scatter, case, inputs)
        yield f"extract-join-scatter-{name}", call


def _with_backend(backend: SDPBackend, function: Callable[..., Any], *arguments: Any) -> Call:
    def call() -> Any:
        with sdpa_kernel(backend):
            return function(*arguments)

    return call
