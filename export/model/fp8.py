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
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forcing_kv.plugins.op_spec import DOMAIN
from forcing_kv.runtime_trt.bundle.fp8 import FP8_MAX, LinearScales

FP8 = torch.float8_e4m3fn


def round_to_fp8(x: Tensor, scale: float) -> Tensor:
    """The nearest E4M3 values of x / scale, ties to even; what is beyond the largest becomes it."""
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


@dataclass(frozen=True)
class _Call:
    """Arguments of the operator, in its order."""

    x: Tensor
    """[..., K], compute dtype."""
    weight: Tensor
    """[M, K] E4M3."""
    bias: Tensor | None
    """[M], compute dtype."""
    input_scale: Tensor
    """[1, 1] float32 on x's device: what a kernel reads."""
    weight_scale: Tensor
    input_value: float
    """The same number, for graphs that hold it."""
    weight_value: float


def _reference(*arguments: Any) -> Tensor:
    """The meaning: both factors rounded and dequantised, a product in x's dtype."""
    call = _Call(*arguments)
    dtype = call.x.dtype
    rounded = round_to_fp8(call.x, call.input_value).to(dtype) * call.input_value
    return F.linear(rounded, call.weight.to(dtype) * call.weight_value, call.bias)


def _scaled_product(*arguments: Any) -> Tensor:
    """The same by PyTorch's scaled product of FP8 tensors, for CUDA and 16-bit x."""
    call = _Call(*arguments)
    rows = round_to_fp8(call.x, call.input_value).reshape(-1, call.x.shape[-1])
    # Sums stay in the tensor cores for the whole row: the form that inference engines use.
    factors = (rows, call.weight.t(), call.input_scale, call.weight_scale)
    out = torch._scaled_mm(*factors, bias=call.bias, out_dtype=call.x.dtype, use_fast_accum=True)
    return out.view(*call.x.shape[:-1], -1)


def _onnx_nodes(*arguments: Any) -> Tensor:
    """Standard nodes, scales of the compute dtype."""
    from forcing_kv.plugins.registry import OPSET

    call = _Call(*arguments)
    dtype, zero = call.x.dtype, torch.zeros((), dtype=FP8)

    def node(name: str, tensor: Tensor, scale: float, made: torch.dtype) -> Tensor:
        inputs = (tensor, torch.full((), scale, dtype=dtype), zero)
        return torch.onnx.ops.symbolic(name, inputs, dtype=made, shape=tensor.shape, version=OPSET)

    quantized = node("QuantizeLinear", call.x, call.input_value, FP8)
    rounded = node("DequantizeLinear", quantized, call.input_value, dtype)
    weight = node("DequantizeLinear", call.weight, call.weight_value, dtype)
    return F.linear(rounded, weight, call.bias)


fp8_linear = torch.library.custom_op(
    f"{DOMAIN}::fp8_linear",
    _reference,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor input_scale, Tensor weight_scale,"
    " float input_value, float weight_value) -> Tensor",
)
"""x [..., K] times weight [M, K] in FP8, plus bias: [..., M] in x's dtype; arguments: `_Call`."""


@fp8_linear.register_fake
def _(*arguments: Any) -> Tensor:
    call = _Call(*arguments)
    return call.x.new_empty((*call.x.shape[:-1], call.weight.shape[0]))


@fp8_linear.register_kernel("cuda")
def _(*arguments: Any) -> Tensor:
    body = _reference if arguments[0].dtype == torch.float32 else _scaled_product
    return body(*arguments)


_OPERATOR = torch.ops.forcing_kv.fp8_linear.default


def compiler_body(device: str) -> dict[Any, Callable[..., Tensor]]:
    """What replaces the operator for PyTorch's compiler, by device (`cpu` or `cuda`)."""
    return {_OPERATOR: _reference if device == "cpu" else _scaled_product}


def onnx_decomposition() -> dict[Any, Callable[..., Tensor]]:
    """What replaces the operator for ONNX."""
    return {_OPERATOR: _onnx_nodes}


class Fp8Linear(nn.Module):
    """A linear layer whose weight is E4M3 and stays so whatever dtype the model is cast to."""

    def __init__(self, weight: Tensor, bias: Tensor, scales: LinearScales) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.scales = scales
        # Weights come later to a layer on the meta device, but these are known.
        device = "cpu" if weight.is_meta else weight.device
        for name, value in (("input_scale", scales.input), ("weight_scale", scales.weight)):
            # PyTorch's compiler would inline a scalar or a vector of one element, and fill a new
            # tensor with it before every product; two axes it leaves alone.
            scale = torch.full((1, 1), value, dtype=torch.float32, device=device)
            self.register_buffer(name, scale, persistent=False)

    @classmethod
    def of(cls, linear: nn.Linear, scales: LinearScales) -> Fp8Linear:
        """Round the weight of a linear layer."""
        weight = linear.weight.detach()
        rounded = weight if weight.is_meta else round_to_fp8(weight, scales.weight)
        return cls(rounded.to(FP8), linear.bias.detach(), scales)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, self.weight, self.bias)

    def rows(self, x: Tensor, rows: slice) -> Tensor:
        """The given rows of the output alone, [..., N, rows]."""
        # PyTorch's compiler (2.11) cannot lower a scaled product whose bias is a slice.
        return self._run(x, self.weight[rows], None) + self.bias[rows]

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scales = self.get_buffer("input_scale"), self.get_buffer("weight_scale")
        out = fp8_linear(x, weight, bias, *scales, self.scales.input, self.scales.weight)
        return cast(Tensor, out)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move the layer; a cast reaches the bias alone."""
        kept = {"weight": self.weight.data, **dict(self.named_buffers())}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            tensor = getattr(self, name)
            if tensor.dtype != before.dtype:
                tensor.data = before.to(tensor.device)
        return self
