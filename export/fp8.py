"""Linear layers in FP8 (E4M3): activations and weights rounded to 8 bits, sums in float32.

One scale a tensor, both static: the weight's from its largest value, the activation's from a
calibration (`fkv calibrate fp8`). Scales are powers of two. So dividing by one is exact, a rounded
value is exact in bfloat16 and float16 too, and every backend computes the same numbers up to the
order of its sums; in a floating-point format the binade that this gives away costs no precision
but that of the smallest values.

In ONNX a layer is QuantizeLinear and DequantizeLinear around a standard product, which TensorRT
fuses into FP8 kernels and ONNX Runtime computes as written; in a package for CUDA it is cuBLASLt's
scaled product.

Legend: N tokens, K input width, M output width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forcing_kv.plugins.op_spec import DOMAIN
from forcing_kv.runtime_trt.fp8 import FP8_MAX, LinearScales

FP8 = torch.float8_e4m3fn


def round_to_fp8(x: Tensor, scale: float) -> Tensor:
    """The nearest E4M3 values of x / scale, ties to even; what is beyond the largest becomes it."""
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor, input_scale: float, weight_scale: float
) -> Tensor:
    """The meaning: x [..., K] times weight [M, K], both dequantised, in x's dtype."""
    rounded = round_to_fp8(x, input_scale).to(x.dtype) * input_scale
    return F.linear(rounded, weight.to(x.dtype) * weight_scale, bias)


def _scaled_product(
    x: Tensor, weight: Tensor, bias: Tensor, input_scale: float, weight_scale: float
) -> Tensor:
    """The same by PyTorch's scaled product of FP8 tensors, for CUDA and 16-bit x."""
    a, b = (
        torch.full((), scale, dtype=torch.float32, device=x.device)
        for scale in (input_scale, weight_scale)
    )
    rows = round_to_fp8(x, input_scale).reshape(-1, x.shape[-1])
    # Sums stay in the tensor cores for the whole row: the form that inference engines use.
    out = torch._scaled_mm(
        rows, weight.t(), a, b, bias=bias, out_dtype=x.dtype, use_fast_accum=True
    )
    return out.view(*x.shape[:-1], weight.shape[0])


fp8_linear = torch.library.custom_op(
    f"{DOMAIN}::fp8_linear",
    _reference,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, float input_scale, float weight_scale)"
    " -> Tensor",
)
"""(x [..., K], weight [M, K] E4M3, bias [M], input_scale, weight_scale) -> [..., M], x's dtype."""


@fp8_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, input_scale: float, weight_scale: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@fp8_linear.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor, input_scale: float, weight_scale: float) -> Tensor:
    body = _reference if x.dtype == torch.float32 else _scaled_product
    return body(x, weight, bias, input_scale, weight_scale)


_OPERATOR = torch.ops.forcing_kv.fp8_linear.default


def compiler_body(device: str) -> dict[Any, Callable[..., Tensor]]:
    """What replaces the operator for PyTorch's compiler, by device (`cpu` or `cuda`)."""
    return {_OPERATOR: _reference if device == "cpu" else _scaled_product}


def onnx_decomposition() -> dict[Any, Callable[..., Tensor]]:
    """What replaces the operator for ONNX: standard nodes, scales of the compute dtype."""
    return {_OPERATOR: _onnx_nodes}


def _onnx_nodes(
    x: Tensor, weight: Tensor, bias: Tensor, input_scale: float, weight_scale: float
) -> Tensor:
    from forcing_kv.plugins.registry import OPSET

    zero = torch.zeros((), dtype=FP8)

    def node(name: str, tensor: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        inputs = (tensor, torch.full((), scale, dtype=x.dtype), zero)
        return torch.onnx.ops.symbolic(name, inputs, dtype=dtype, shape=tensor.shape, version=OPSET)

    quantized = node("QuantizeLinear", x, input_scale, FP8)
    rounded = node("DequantizeLinear", quantized, input_scale, x.dtype)
    return F.linear(rounded, node("DequantizeLinear", weight, weight_scale, x.dtype), bias)


class Fp8Linear(nn.Module):
    """A linear layer whose weight is E4M3 and stays so whatever dtype the model is cast to."""

    def __init__(self, weight: Tensor, bias: Tensor, scales: LinearScales) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.scales = scales

    @classmethod
    def of(cls, linear: nn.Linear, scales: LinearScales) -> Fp8Linear:
        """Round the weight of a linear layer."""
        weight = linear.weight.detach()
        rounded = weight if weight.is_meta else round_to_fp8(weight, scales.weight)
        return cls(rounded.to(FP8), linear.bias.detach(), scales)

    def forward(self, x: Tensor) -> Tensor:
        """Run on x [..., N, K]."""
        return self._run(x, self.weight, self.bias)

    def rows(self, x: Tensor, rows: slice) -> Tensor:
        """The given rows of the output alone, [..., N, rows]."""
        return self._run(x, self.weight[rows], self.bias[rows])

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = fp8_linear(x, weight, bias, self.scales.input, self.scales.weight)
        return cast(Tensor, out)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move the layer; a cast reaches the bias alone."""
        weight = self.weight.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight.dtype != FP8:
            self.weight.data = weight.to(self.weight.device)
        return self
