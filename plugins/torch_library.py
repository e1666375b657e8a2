"""Makes opaque torch operators of the specifications, and ONNX nodes of the operators.

The operators have no in-place writes and no hidden state, so `torch.export` keeps each as a single
node; a target then decomposes it as it likes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from forcing_kv.plugins.op_spec import DOMAIN, VERSION, OpSpec
from forcing_kv.plugins.triton_run import empty_outputs, run_on_cuda, torch_output_dtypes

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


def register(spec: OpSpec, reference: Callable[..., Any]) -> CustomOpDef:
    """Define the torch operator of `spec`: the Triton kernel on CUDA, `reference` elsewhere.

    Shapes are checked when the operator is traced and when the kernel is launched.
    """
    operator = torch.library.custom_op(
        f"{DOMAIN}::{spec.torch_name}", reference, mutates_args=(), schema=torch_schema(spec)
    )

    def fake(*arguments: Any) -> Any:
        inputs, attributes = spec.split_arguments(arguments)
        spec.check([x.shape for x in inputs], attributes)
        outputs = empty_outputs(spec, inputs, attributes)
        return outputs if len(outputs) > 1 else outputs[0]

    def on_cuda(*arguments: Any) -> Any:
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
            dtypes=torch_output_dtypes(spec, inputs),
            shapes=shapes,
            version=VERSION,
        )
        return tuple(outputs) if len(spec.outputs) > 1 else outputs[0]

    return decompose
