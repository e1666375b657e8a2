"""The ONNX bodies, run by ONNX Runtime, against the references; and the way there from torch."""

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from op_cases import cases_of  # noqa: E402

from forcing_kv.plugins.bind.torch_library import OPERATORS, onnx_decompositions  # noqa: E402
from forcing_kv.plugins.check.cases import OpCase  # noqa: E402
from forcing_kv.plugins.op_spec import DOMAIN, PLUGIN_ATTRIBUTES, VERSION  # noqa: E402
from forcing_kv.plugins.registry import (  # noqa: E402
    NODES,
    OPS,
    OPSET,
    onnx_functions,
)

ELEMENT_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.int32: onnx.TensorProto.INT32,
}


def node_of(case: OpCase) -> "onnx.NodeProto":
    spec = case.spec
    return onnx.helper.make_node(
        spec.name,
        [tensor.name for tensor in spec.inputs],
        [tensor.name for tensor in spec.outputs],
        domain=DOMAIN,
        **PLUGIN_ATTRIBUTES,
        **case.attributes,
    )


def model_of(case: OpCase, inputs) -> "onnx.ModelProto":
    spec = case.spec
    make_info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node_of(case)],
        "case",
        [
            make_info(tensor.name, ELEMENT_TYPES[x.dtype], list(x.shape))
            for tensor, x in zip(spec.inputs, inputs, strict=True)
        ],
        [onnx.ValueInfoProto(name=tensor.name) for tensor in spec.outputs],
    )
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=onnx_functions())
    model.ir_version = 10
    return model


def run_model(model: "onnx.ModelProto", inputs) -> list[torch.Tensor]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(x) for x in session.run(None, feeds)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_body_equals_reference(case, dtype, check):
    inputs = case.build(dtype)
    check(case, inputs, run_model(model_of(case, inputs), inputs))


@pytest.mark.parametrize("scores", [[np.nan, 0.5], [np.inf, -np.inf]])
def test_body_orders_special_scores_like_the_reference(scores, reference):
    case = next(case for case in cases_of(OPS[-1]) if case.name == "ties")
    inputs = case.build(torch.float32)
    inputs[0].view(-1)[[2, 9]] = torch.tensor(scores, dtype=torch.float32)
    found = run_model(model_of(case, inputs), inputs)
    for x, expected in zip(found, reference(case, inputs), strict=True):
        assert torch.equal(x, expected)


@pytest.mark.parametrize("spec", NODES, ids=lambda spec: spec.torch_name)
def test_body_is_flat_and_declares_every_attribute(spec):
    function = next(f for f in onnx_functions() if f.name == spec.name)
    assert {node.domain for node in function.node} == {""}
    assert list(function.attribute) == [*PLUGIN_ATTRIBUTES, *(a.name for a in spec.attributes)]
    assert list(function.input) == [tensor.name for tensor in spec.inputs]
    assert list(function.output) == [tensor.name for tensor in spec.outputs]


class OneOperator(torch.nn.Module):
    def __init__(self, case: OpCase) -> None:
        super().__init__()
        self.operator = OPERATORS[case.spec]
        self.arguments = case.arguments

    def forward(self, *inputs):
        return self.operator(*inputs, *self.arguments)


@pytest.mark.parametrize("spec", NODES, ids=lambda spec: spec.torch_name)
def test_exporter_keeps_one_node_with_every_attribute(spec, check):
    ir = pytest.importorskip("onnxscript").ir
    case = cases_of(spec)[0]
    inputs = case.build(torch.float32)
    exported = torch.export.export(OneOperator(case), tuple(inputs))
    exported = exported.run_decompositions(onnx_decompositions())
    program = torch.onnx.export(
        exported, dynamo=True, opset_version=OPSET, optimize=False, verbose=False
    )
    assert [node.op_type for node in program.model.graph] == [spec.name]
    for proto in onnx_functions():
        function = ir.from_proto(proto)
        program.model.functions[function.identifier()] = function
    model = program.model_proto
    onnx.checker.check_model(model)
    values = {a.name: onnx.helper.get_attribute_value(a) for a in model.graph.node[0].attribute}
    expected = {**PLUGIN_ATTRIBUTES, **case.attributes}
    assert list(values) == list(expected)
    assert values["plugin_namespace"] == DOMAIN.encode()
    assert values["aot"] == 1
    for name, value in case.attributes.items():
        assert values[name] == pytest.approx(value)
    check(case, inputs, run_model(model, inputs))
