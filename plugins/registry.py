"""Every operator of the project, and what an exporter needs of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forcing_kv.plugins.head_indexed_attention.spec import SPEC as HEAD_INDEXED_ATTENTION
from forcing_kv.plugins.op_spec import OpSpec
from forcing_kv.plugins.qk_norm_rope.spec import SPEC as QK_NORM_ROPE
from forcing_kv.plugins.segment_similarity.spec import SPEC as SEGMENT_SIMILARITY
from forcing_kv.plugins.similarity_eviction.spec import SPEC as SIMILARITY_EVICTION
from forcing_kv.plugins.steady_attention.spec import SPEC as STEADY_ATTENTION

if TYPE_CHECKING:
    import onnx

__all__ = [
    "HEAD_INDEXED_ATTENTION",
    "NODES",
    "OPS",
    "OPSET",
    "QK_NORM_ROPE",
    "SEGMENT_SIMILARITY",
    "SIMILARITY_EVICTION",
    "STEADY_ATTENTION",
    "onnx_functions",
]

OPSET = 20
"""Version of ONNX's standard domain in which the graphs and the function bodies are written."""

OPS: tuple[OpSpec, ...] = (
    QK_NORM_ROPE,
    HEAD_INDEXED_ATTENTION,
    SEGMENT_SIMILARITY,
    SIMILARITY_EVICTION,
)
"""Every operator that has a kernel, and so is a TensorRT plugin."""

NODES: tuple[OpSpec, ...] = (*OPS, STEADY_ATTENTION)
"""Every operator that stands in a graph."""


def onnx_functions(opset: int = OPSET) -> list[onnx.FunctionProto]:
    """Standard-operator bodies of every operator, to be attached to a model with custom nodes."""
    from forcing_kv.plugins.onnx_function import build_function

    return [build_function(spec, spec.module("onnx_body").BODY, opset) for spec in NODES]
