"""Every operator of the project, and what an exporter needs of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from forcing_kv.plugins.head_indexed_attention.spec import SPEC as HEAD_INDEXED_ATTENTION
from forcing_kv.plugins.op_spec import OpSpec
from forcing_kv.plugins.qk_norm_rope.spec import SPEC as QK_NORM_ROPE
from forcing_kv.plugins.segment_similarity.spec import SPEC as SEGMENT_SIMILARITY
from forcing_kv.plugins.similarity_eviction.spec import SPEC as SIMILARITY_EVICTION

if TYPE_CHECKING:
    import onnx

    from forcing_kv.plugins.tensorrt_plugin import TargetDevice

__all__ = [
    "HEAD_INDEXED_ATTENTION",
    "OPS",
    "OPSET",
    "QK_NORM_ROPE",
    "SEGMENT_SIMILARITY",
    "SIMILARITY_EVICTION",
    "onnx_decompositions",
    "onnx_functions",
    "register_tensorrt_plugins",
]

OPSET = 20
"""Version of ONNX's standard domain in which the graphs and the function bodies are written."""

OPS: tuple[OpSpec, ...] = (
    QK_NORM_ROPE,
    HEAD_INDEXED_ATTENTION,
    SEGMENT_SIMILARITY,
    SIMILARITY_EVICTION,
)
"""Every operator."""


def onnx_decompositions() -> dict[Any, Callable[..., Any]]:
    """Decompositions that turn each torch operator into one ONNX node of the custom domain.

    Returns:
        A table for `ExportedProgram.run_decompositions`; merge it with other decompositions.
    """
    import torch

    from forcing_kv.plugins.op_spec import DOMAIN
    from forcing_kv.plugins.torch_library import onnx_decomposition

    for spec in OPS:
        spec.module("torch_op")
    namespace = getattr(torch.ops, DOMAIN)
    return {getattr(namespace, s.torch_name).default: onnx_decomposition(s) for s in OPS}


def onnx_functions(opset: int = OPSET) -> list[onnx.FunctionProto]:
    """Standard-operator bodies of every operator, to be attached to a model with custom nodes."""
    return [spec.module("onnx_body").onnx_function(opset) for spec in OPS]


def register_tensorrt_plugins(device: TargetDevice) -> tuple[str, ...]:
    """Register every operator in TensorRT, once per process, before an ONNX file is parsed.

    Args:
        device: the device that engines are built for.

    Returns:
        Identifiers of the plugins.
    """
    return tuple(spec.module("trt").register(device) for spec in OPS)
