"""Makes ONNX functions of the specifications: a standard-operator body for each custom node.

A runtime without the plugins (ONNX Runtime, TensorRT-RTX) inlines the body. Bodies are flat, for a
function that calls a function cannot forward an attribute in every runtime.
"""

from __future__ import annotations

import onnx
import onnx.parser

from forcing_kv.plugins.op_spec import DOMAIN, PLUGIN_ATTRIBUTES, OpSpec


def build_function(spec: OpSpec, body: str, opset: int) -> onnx.FunctionProto:
    """Parse the body of an operator.

    Args:
        spec: the operator; its inputs, outputs and attributes become the function's.
        body: nodes in ONNX's text form; `@name` refers to an attribute.
        opset: version of the standard domain that the body is written in.

    Returns:
        The function `spec.name` of the custom domain.

    Raises:
        onnx.checker.ValidationError: the body is not valid in that opset.
    """
    attributes = [*PLUGIN_ATTRIBUTES, *(attribute.name for attribute in spec.attributes)]
    inputs = ", ".join(tensor.name for tensor in spec.inputs)
    outputs = ", ".join(tensor.name for tensor in spec.outputs)
    function = onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{spec.name} <{', '.join(attributes)}> ({inputs}) => ({outputs}) {{\n{body}\n}}"
    )
    function.doc_string = spec.summary
    onnx.checker.check_function(function)
    return function
