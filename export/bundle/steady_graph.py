"""The steady form of an exported pass, made of the general one.

Only attention differs between the two (`export.model.graphs.ChunkGraph`), so what was captured and
translated once serves both.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from forcing_kv.export.bundle.onnx_graph import attach_functions
from forcing_kv.export.model.graphs import steady_layout
from forcing_kv.plugins.op_spec import DOMAIN
from forcing_kv.plugins.registry import HEAD_INDEXED_ATTENTION, STEADY_ATTENTION
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.ports import LENGTHS, split_name


def make_steady_(model: ir.Model, config: RolloutConfig) -> ir.Model:
    """Bake the rows that a steady chunk sees into a pass; changes and returns `model`.

    Args:
        model: general form of the pass, custom nodes with function bodies.
    """
    for node in model.graph:
        if (node.domain, node.op_type) != (DOMAIN, HEAD_INDEXED_ATTENTION.name):
            continue
        layout = steady_layout(config.layouts[pool_layer(node)])
        for attribute in HEAD_INDEXED_ATTENTION.attributes:
            node.attributes.pop(attribute.name)
        for name, value in layout.attributes().items():
            node.attributes.add(ir.AttrInt64(name, value))
        node.op_type = STEADY_ATTENTION.name
        node.resize_inputs(len(STEADY_ATTENTION.inputs))
    RemoveUnusedNodesPass()(model)
    inputs = model.graph.inputs
    for length in [each for each in inputs if each.name in LENGTHS]:
        assert not length.uses(), f"{length.name} is read by attention alone"
        inputs.remove(length)
    attach_functions(model)
    return model


def pool_layer(node: ir.Node) -> int:
    """Layer of an attention over a history, by the name of the pool that it reads."""
    hist_k = node.inputs[3]
    assert hist_k is not None
    assert hist_k.name is not None, "the pool is a graph input"
    _, layer = split_name(hist_k.name)
    assert layer is not None, f"{hist_k.name} is the pool of a layer"
    return layer
