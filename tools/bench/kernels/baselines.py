"""Other ways to do what an operator does, to be timed beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from forcing_kv.plugins.check.accuracy import OutputError, output_errors, reference_outputs
from forcing_kv.plugins.check.cases import OpCase
from forcing_kv.plugins.registry import HEAD_INDEXED_ATTENTION
from forcing_kv.plugins.steady_attention.cuda_body import KERNELS, steady_attention
from forcing_kv.plugins.steady_attention.layout import SteadyLayout
from forcing_kv.tools.bench.kernels.flex_attention import flex_call
from forcing_kv.tools.bench.kernels.folded_attention import (
    FOLDED,
    FoldedHeads,
    fold_heads,
    join_heads,
)
from forcing_kv.tools.bench.kernels.grouped_attention import (
    Call,
    dense_attention,
    extract_join_scatter,
    group_rows,
    head_groups,
    same_key_count,
)

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
"""Attention kernels of PyTorch that the operator is compared with."""

STEADY = "steady-"
"""Begins the names of the kernels that serve FkSteadyAttention; joins are within the call."""


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


def baselines(case: OpCase, inputs: Sequence[Tensor]) -> Iterator[Baseline]:
    """What to time beside a case's kernel.

    Attention: PyTorch's kernels on the same number of keys, the steady form by each of its kernels,
    the heads folded into the batch of variable-length kernels, FlexAttention, and the reference
    implementation's way. Others: the reference in plain PyTorch.
    """
    if case.spec is not HEAD_INDEXED_ATTENTION:
        reference = partial(reference_outputs, case.spec, inputs, case.attributes)
        yield Baseline("torch", case, inputs, lambda: reference)
        return
    dense = same_key_count(case)
    dense_inputs = dense.build(inputs[0].dtype, device=str(inputs[0].device))
    for name, backend in BACKENDS.items():
        prepare = partial(_dense_call, backend, dense, dense_inputs)
        yield Baseline(f"sdpa-{name}", dense, dense_inputs, prepare)
    for name in KERNELS:
        yield Baseline(f"{STEADY}{name}", case, inputs, partial(_steady_call, name, case, inputs))
    for name, attend in FOLDED.items():
        call = partial(_folded_call, attend, case, inputs)
        yield Baseline(f"varlen-{name}", case, inputs, partial(call, join=False))
        yield Baseline(f"join-varlen-{name}", case, inputs, partial(call, join=True))
    yield Baseline("flex", case, inputs, partial(_compiled_flex_call, case, inputs))
    for name, backend in BACKENDS.items():
        extract = partial(extract_join_scatter, case, inputs)
        prepare = partial(_with_backend, backend, extract)
        yield Baseline(f"extract-join-scatter-{name}", case, inputs, prepare)


def baseline_errors(baseline: Baseline, result: Any) -> tuple[OutputError, ...]:
    """Judge what a baseline's call gave by the operator's tolerance class."""
    outputs = result if isinstance(result, tuple) else (result,)
    case = baseline.case
    return output_errors(case.spec, baseline.inputs, case.attributes, outputs)


def _dense_call(backend: SDPBackend, case: OpCase, inputs: Sequence[Tensor]) -> Call:
    return _with_backend(backend, dense_attention(case, inputs))


def _compiled_flex_call(case: OpCase, inputs: Sequence[Tensor]) -> Call:
    return flex_call(case, inputs, torch.compile(flex_attention, dynamic=False))


def _steady_call(kernel: str, case: OpCase, inputs: Sequence[Tensor]) -> Call:
    """The steady form of a case whose heads are in two blocks of even capacity at most."""
    first, *others = head_groups(case)
    blocks = [(block, group_rows(case, block)) for block in (first, *others)]
    capacity, rows = blocks[0][1]
    second = blocks[1][1] if others else (0, 0)
    layout = SteadyLayout(first.stop, capacity, rows, *second)
    return partial(steady_attention(kernel), *inputs[:5], *astuple(layout))


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
