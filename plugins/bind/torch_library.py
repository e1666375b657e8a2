"""Makes an opaque torch operator of every specification, and ONNX nodes of the operators.

The operators have no in-place writes and no hidden state, so `torch.export` keeps each as a single
node; a target then decomposes it as it likes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from forcing_kv.plugins.bind.triton_run import empty_outputs, run_on_cuda, torch_output_dtypes
from forcing_kv.plugins.op_spec import DOMAIN, PLUGIN_ATTRIBUTES, VERSION, OpSpec, result_of
from forcing_kv.plugins.registry import NODES, OPS

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef


def torch_schema(spec: OpSpec) -> str:
    """Schema of the torch operator: inputs, then attributes."""
    inputs = [f"Tensor {tensor.name}" for tensor in spec.inputs]
    attributes = [f"{attribute.kind} {attribute.name}" for attribute in spec.attributes]
    outputs = ["Tensor"] * len(spec.outputs)
    returns = outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})"
    return f"({', '.join(inputs + attributes)}) -> {returns}"


def _define(spec: OpSpec) -> CustomOpDef:
    """Define the torch operator of `spec`: its kernel on CUDA if it has one, else the reference.

    Shapes are checked when the operator is traced and when the kernel is launched.
    """
    reference = getattr(spec.module("reference"), spec.torch_name)
    operator = torch.library.custom_op(
        f"{DOMAIN}::{spec.torch_name}", reference, mutates_args=(), schema=torch_schema(spec)
    )

    def fake(*arguments: Any) -> Any:
        inputs, attributes = spec.split_arguments(arguments)
        spec.check([x.shape for x in inputs], attributes)
        return result_of(empty_outputs(spec, inputs, attributes))

    def on_cuda(*arguments: Any) -> Any:
        return result_of(run_on_cuda(spec, *arguments))

    operator.register_fake(fake)
    if spec in OPS:
        operator.register_kernel("cuda")(on_cuda)
    return operator


OPERATORS = {spec: _define(spec) for spec in NODES}
"""Every operator as torch knows it, `torch.ops.forcing_kv.*`."""


def overload(spec: OpSpec) -> Any:
    """The operator as a traced graph names it, by which decompositions find it."""
    return getattr(getattr(torch.ops, DOMAIN), spec.torch_name).default


def onnx_decompositions() -> dict[Any, Callable[..., Any]]:
    """Decompositions that turn each torch operator into one ONNX node of the custom domain.

    Returns:
        A table for `ExportedProgram.run_decompositions`; merge it with other decompositions.
    """
    return {overload(spec): _onnx_decomposition(spec) for spec in NODES}


def _onnx_decomposition(spec: OpSpec) -> Callable[..., Any]:
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
        return result_of(outputs)

    return decompose
