"""Attention over a history, rewritten to the fused attention operator of one runtime.

The portable bodies hold every score in memory. A runtime's own operator works in tiles, if it is
given exactly the rows that a head sees: the heads of a layer fall into blocks that see equally
many, so that each block is one dense call without a mask.

Legend: H heads, G heads of a block, N new tokens, D head dim, M rows that a head sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import onnx
import onnx.parser
import onnx_ir as ir

from forcing_kv.export.bundle.steady_graph import pool_layer
from forcing_kv.plugins.op_spec import DOMAIN, OpSpec
from forcing_kv.plugins.registry import HEAD_INDEXED_ATTENTION, STEADY_ATTENTION
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import HeadGroup, LayerLayout

MakeBody = Callable[[LayerLayout, OpSpec], str]
"""Nodes in ONNX's text form that make `out` of the inputs of the given operator."""

_ATTENTIONS = {spec.name: spec for spec in (HEAD_INDEXED_ATTENTION, STEADY_ATTENTION)}


def replace_attention(
    model: ir.Model, config: RolloutConfig, opsets: Mapping[str, int], make_body: MakeBody
) -> int:
    """Give every attention over a history a body of its own; changes the model.

    Args:
        model: a graph as exported, custom nodes with function bodies.
        opsets: versions of the domains that the bodies are written in; the whole model takes them.
        make_body: called for every node.

    Returns:
        Number of nodes replaced.
    """
    count = 0
    for node in model.graph:
        spec = _ATTENTIONS.get(node.op_type) if node.domain == DOMAIN else None
        if spec is None:
            continue
        layer = pool_layer(node)
        function = _function(spec, layer, make_body(config.layouts[layer], spec), opsets)
        node.op_type = function.name
        for name in list(node.attributes):
            node.attributes.pop(name)
        body = cast(ir.Function, ir.from_proto(function))
        model.functions[body.identifier()] = body
        count += 1
    if count:
        model.opset_imports.update(opsets)
        for held in model.functions.values():
            held.opset_imports.update(opsets)
    return count


def _function(spec: OpSpec, layer: int, body: str, opsets: Mapping[str, int]) -> onnx.FunctionProto:
    inputs = ", ".join(tensor.name for tensor in spec.inputs)
    versions = ", ".join(f'"{domain}" : {version}' for domain, version in opsets.items())
    function = onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: [{versions}]>\n'
        f"FkFusedAttention{layer} ({inputs}) => (out) {{\n{body}\n}}"
    )
    onnx.checker.check_function(function)
    return function


def dense_body(layout: LayerLayout, spec: OpSpec, attend: str, dim: int) -> str:
    """One dense attention for each block of heads over exactly the rows that it sees.

    Args:
        attend: nodes that make `{b}_mixed` [G, N, D] of `{b}_q` [G, N, D], `{b}_k` and `{b}_v`
            [G, M, D], in which `{b}` stands for the block.
    """
    steady = spec is STEADY_ATTENTION
    blocks = [f"b{i}" for i in range(len(layout.groups))]
    parts = [_AXES if steady else _AXES + _LENGTHS]
    for block, group in zip(blocks, layout.groups, strict=True):
        parts += [_block(block, group, dim, steady=steady), attend.replace("{b}", block)]
    mixed = ", ".join(f"{block}_mixed" for block in blocks)
    return "".join(parts) + _JOINED.format(mixed=mixed)


_AXES = """
    axis0 = Constant <value_ints: ints = [0]> ()
    axis1 = Constant <value_ints: ints = [1]> ()
"""

_LENGTHS = """
    hist_len64 = Cast <to = 7> (hist_len)
    new_len64 = Cast <to = 7> (new_len)
"""

_JOINED = """
    mixed_HND = Concat <axis = 0> ({mixed})
    out = Transpose <perm = [1, 0, 2]> (mixed_HND)
"""


def _block(block: str, group: HeadGroup, dim: int, *, steady: bool) -> str:
    """Queries, keys and values of a block of heads."""
    lines = [
        _ints(f"{block}_begin", group.heads.start),
        _ints(f"{block}_end", group.heads.stop),
        f"{block}_q = Slice (q, {block}_begin, {block}_end, axis0)",
    ]
    if group.rows_per_head:
        lines += [
            _ints(f"{block}_from", group.rows.start),
            _ints(f"{block}_to", group.rows.stop),
            _ints(f"{block}_shape", group.num_heads, group.rows_per_head, dim),
            _ints(f"{block}_length", group.steady_rows)
            if steady
            else f"{block}_length = Slice (hist_len64, {block}_begin, {block}_next, axis0)",
        ]
        lines.insert(0, _ints(f"{block}_next", group.heads.start + 1))
    for part in "kv":
        lines.append(f"{block}_own_{part} = Slice ({part}_new, {block}_begin, {block}_end, axis0)")
        own = f"{block}_own_{part}"
        if not steady:
            lines.append(f"{block}_real_{part} = Slice ({own}, axis0, new_len64, axis1)")
            own = f"{block}_real_{part}"
        if not group.rows_per_head:
            lines.append(f"{block}_{part} = Identity ({own})")
            continue
        lines += [
            f"{block}_flat_{part} = Slice (hist_{part}, {block}_from, {block}_to, axis0)",
            f"{block}_pool_{part} = Reshape ({block}_flat_{part}, {block}_shape)",
            f"{block}_past_{part} = Slice ({block}_pool_{part}, axis0, {block}_length, axis1)",
            f"{block}_{part} = Concat <axis = 1> ({block}_past_{part}, {own})",
        ]
    return "".join(f"    {line}\n" for line in lines)


def _ints(name: str, *values: int) -> str:
    return f"{name} = Constant <value_ints: ints = {list(values)}> ()"
