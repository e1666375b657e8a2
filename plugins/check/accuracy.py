"""Float64 truth of the operators on any device, and the tolerance classes.

Legend: G dynamic heads, H heads, N new tokens, D head dim, F frames per chunk, T tokens per frame,
C width of a token over the dynamic heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forcing_kv.plugins.frame_chain.layout import CandidateLayout
from forcing_kv.plugins.frame_chain.reference import frame_chain
from forcing_kv.plugins.op_spec import Attributes, OpSpec
from forcing_kv.plugins.steady_attention.layout import SteadyLayout

_QUERY_BLOCK = 2048
"""Queries at a time, to bound the memory of the scores."""


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the truth."""

    name: str
    error: float
    """Largest absolute difference from the float64 truth; for moves, differing elements."""
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is allowed; NaN is not."""
        return self.error <= self.allowed


def float64_outputs(
    spec: OpSpec, inputs: Sequence[Tensor], attributes: Attributes
) -> tuple[Tensor, ...]:
    """Outputs in float64 arithmetic of the given (already rounded) inputs."""
    function = _FLOAT64[spec.torch_name]
    return function(*inputs, *attributes.values())


def reference_outputs(
    spec: OpSpec, inputs: Sequence[Tensor], attributes: Attributes
) -> tuple[Tensor, ...]:
    """Outputs of the reference in the inputs' dtype."""
    function: Callable[..., Any] = getattr(spec.module("reference"), spec.torch_name)
    outputs = function(*inputs, *attributes.values())
    return outputs if isinstance(outputs, tuple) else (outputs,)


def output_errors(
    spec: OpSpec, inputs: Sequence[Tensor], attributes: Attributes, outputs: Sequence[Tensor]
) -> tuple[OutputError, ...]:
    """Judge outputs by the operator's tolerance class.

    A float output may be twice as far from the truth as the same-dtype reference is, and four
    rounding steps more, for the reference may happen to be exact; an exact one may not differ.
    """
    references = reference_outputs(spec, inputs, attributes)
    if spec.tolerance == "exact":
        return tuple(
            OutputError(tensor.name, float((found != same).sum()), 0.0)
            for tensor, found, same in zip(spec.outputs, outputs, references, strict=True)
        )
    errors = []
    truths = float64_outputs(spec, inputs, attributes)
    for tensor, found, same, true in zip(spec.outputs, outputs, references, truths, strict=True):
        floor = 4 * torch.finfo(found.dtype).eps * float(true.abs().max())
        allowed = 2 * float((same.double() - true).abs().max()) + floor
        errors.append(OutputError(tensor.name, float((found.double() - true).abs().max()), allowed))
    return tuple(errors)


def _qk_norm_rope(*arguments: Any) -> tuple[Tensor, ...]:
    q, k, q_weight, k_weight, cos, sin, num_heads, eps = arguments
    outputs = []
    for x, weight in ((q.double(), q_weight.double()), (k.double(), k_weight.double())):
        row = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
        row_HND = row.unflatten(-1, (num_heads, -1)).transpose(0, 1)
        turned = torch.view_as_complex(row_HND.unflatten(-1, (-1, 2)).contiguous())
        turned = turned * torch.complex(cos.double(), sin.double())
        outputs.append(torch.view_as_real(turned).flatten(-2))
    return tuple(outputs)


def _head_indexed_attention(*arguments: Any) -> tuple[Tensor, ...]:
    q, k_new, v_new, hist_k, hist_v, head_offset, hist_len, new_len, max_history = arguments
    heads = []
    for head, (offset, length) in enumerate(
        zip(head_offset.tolist(), hist_len.tolist(), strict=True)
    ):
        rows = slice(offset, offset + min(length, max_history))
        k = torch.cat((hist_k[rows], k_new[head, : int(new_len)])).double()
        v = torch.cat((hist_v[rows], v_new[head, : int(new_len)])).double()
        scale = q.shape[-1] ** -0.5
        blocks = [
            torch.softmax(block.double() @ k.T * scale, -1) @ v
            for block in q[head].split(_QUERY_BLOCK)
        ]
        heads.append(torch.cat(blocks))
    return (torch.stack(heads, dim=1),)


def _steady_attention(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, layout = arguments[:5], SteadyLayout(*arguments[5:])
    num_heads, num_tokens, _ = tensors[0].shape
    heads = [
        (block.pool.start + head * block.capacity, block.num_rows)
        for block in layout.blocks(num_heads)
        for head in range(block.num_heads)
    ]
    offsets, lengths = torch.tensor(heads).unbind(-1)
    return _head_indexed_attention(*tensors, offsets, lengths, num_tokens, int(lengths.max()))


def _segment_similarity(hist_k: Tensor, new_k: Tensor, *attributes: int) -> tuple[Tensor, ...]:
    layout = CandidateLayout(*attributes)
    chain = frame_chain(hist_k, new_k, layout).double()
    tokens_FTC = chain.permute(1, 2, 0, 3).flatten(-2)
    norm_FT = tokens_FTC.norm(dim=-1).clamp_min(1e-8)
    dot_FT = (tokens_FTC[:-1] * tokens_FTC[1:]).sum(-1)
    cosine_FT = dot_FT / (norm_FT[:-1] * norm_FT[1:])
    return (cosine_FT.unflatten(-1, (layout.num_segments, -1)).mean(-1),)


_FLOAT64: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "qk_norm_rope": _qk_norm_rope,
    "head_indexed_attention": _head_indexed_attention,
    "segment_similarity": _segment_similarity,
    "steady_attention": _steady_attention,
}
