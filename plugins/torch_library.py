"""Makes opaque torch operators of the specifications, and ONNX nodes of the operators.

The operators have no in-place writes and no hidden state, so `torch.export` keeps each as a single
node; a target then decomposes it as it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from forcing_kv.plugins.op_spec import DOMAIN, VERSION, OpSpec, TensorSpec

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

PLUGIN_ATTRIBUTES: dict[str, int | str] = {
    "plugin_namespace": DOMAIN,
    "plugin_version": str(VERSION),
    "aot": 1,
}
"""Node attributes by which TensorRT's ONNX parser finds a plugin with embedded kernels."""


def torch_schema(spec: OpSpec) -> str:
    """Schema of the torch operator: inputs, then attributes."""
    inputs = [f"Tensor {tensor.name}" for tensor in spec.inputs]
    attributes = [f"{attribute.kind} {attribute.name}" for attribute in spec.attributes]
    outputs = ["Tensor"] * len(spec.outputs)
    returns = outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})"
    return f"({', '.join(inputs + attributes)}) -> {returns}"


def output_dtype(spec: OpSpec, tensor: TensorSpec, inputs: Sequence[Tensor]) -> torch.dtype:
    """Dtype of an output: its own, or that of the inputs in the compute dtype."""
    if tensor.dtype == "T":
        return next(x.dtype for x, s in zip(inputs, spec.inputs, strict=True) if s.dtype == "T")
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    return dtype


def register(spec: OpSpec, reference: Callable[..., Any]) -> CustomOpDef:
    """Define the torch operator of `spec`: the Triton kernel on CUDA, `reference` elsewhere.

    Shapes are checked when the operator is traced and when the kernel is launched.
    """
    operator = torch.library.custom_op(
        f"{DOMAIN}::{spec.torch_name}", reference, mutates_args=(), schema=torch_schema(spec)
    )

    def fake(*arguments: Any) -> Any:
        inputs, attributes = spec.split_arguments(arguments)
        shapes = [x.shape for x in inputs]
        spec.check(shapes, attributes)
        outputs = tuple(
            inputs[0].new_empty(shape, dtype=output_dtype(spec, tensor, inputs))
            for tensor, shape in zip(
                spec.outputs, spec.output_shapes(shapes, attributes), strict=True
            )
        )
        return outputs if len(outputs) > 1 else outputs[0]

    def on_cuda(*arguments: Any) -> Any:
        from forcing_kv.plugins.triton_run import run_on_cuda

        outputs = run_on_cuda(spec, *arguments)
        return outputs if len(outputs) > 1 else outputs[0]

    operator.register_fake(fake)
    operator.register_kernel("cuda")(on_cuda)
    return operator


def onnx_decomposition(spec: OpSpec) -> Callable[..., Any]:
    """Decomposition of the torch operator into one symbolic ONNX node of the custom domain."""

    def decompose(*arguments: Any) -> Any:
        inputs, attributes = spec.split_arguments(arguments)
        shapes = spec.output_shapes([x.shape for x in inputs], attributes)
        outputs = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{spec.name}",
            inputs,
            {**PLUGIN_ATTRIBUTES, **attributes},
            dtypes=[output_dtype(spec, tensor, inputs) for tensor in spec.outputs],
            shapes=shapes,
            version=VERSION,
        )
        return tuple(outputs) if len(spec.outputs) > 1 else outputs[0]

    return decompose
