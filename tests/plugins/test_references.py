"""The references against plain loops, and the torch operators made of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from op_cases import cases_of

from forcing_kv.plugins.bind.torch_library import OPERATORS
from forcing_kv.plugins.check.accuracy import float64_outputs, output_errors
from forcing_kv.plugins.check.cases import OpCase
from forcing_kv.plugins.frame_chain.layout import CandidateLayout
from forcing_kv.plugins.registry import NODES, SIMILARITY_EVICTION
from forcing_kv.plugins.similarity_eviction.reference import select_segments


def call_operator(case: OpCase, inputs):
    outputs = OPERATORS[case.spec](*inputs, *case.arguments)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def test_reference_equals_plain_loop(case, truth, reference):
    inputs = case.build(torch.float32)
    for found, true in zip(reference(case, inputs), truth(case, inputs), strict=True):
        np.testing.assert_allclose(found.double().numpy(), true, rtol=0, atol=5e-6)


def test_float64_truth_equals_plain_loop(case, truth):
    if case.spec.tolerance == "exact":
        return
    inputs = case.build(torch.float32)
    found = float64_outputs(case.spec, inputs, case.attributes)
    for x, true in zip(found, truth(case, inputs), strict=True):
        assert x.dtype == torch.float64
        np.testing.assert_allclose(x.numpy(), true, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_reference_stays_near_the_truth(case, dtype, truth, reference):
    inputs = case.build(dtype)
    for found, true in zip(reference(case, inputs), truth(case, inputs), strict=True):
        bound = 4 * torch.finfo(dtype).eps * max(1.0, np.abs(true).max())
        np.testing.assert_allclose(found.double().numpy(), true, rtol=0, atol=bound)


@pytest.mark.parametrize("wrong", [torch.nan, 1.0])
def test_a_wrong_or_missing_value_is_found(wrong, reference):
    for spec in NODES:
        case = cases_of(spec)[-1]
        inputs = case.build(torch.float16)
        outputs = reference(case, inputs)
        outputs[0].view(-1)[-1] += wrong
        assert not output_errors(spec, inputs, case.attributes, outputs)[0].passed


def test_shapes_and_dtypes_follow_the_specification(case, reference):
    inputs = case.build(torch.float16)
    case.spec.check([x.shape for x in inputs], case.attributes)
    outputs = reference(case, inputs)
    assert [tuple(x.shape) for x in outputs] == list(case.output_shapes())
    for tensor, output in zip(case.spec.outputs, outputs, strict=True):
        assert output.dtype == (
            torch.float16 if tensor.dtype == "T" else getattr(torch, tensor.dtype)
        )
        assert output.is_contiguous()


def test_operator_accepts_strided_inputs(case, strided, reference):
    inputs = case.build(torch.float32)
    expected = reference(case, inputs)
    for found, same in zip(call_operator(case, map(strided, inputs)), expected, strict=True):
        torch.testing.assert_close(found, same, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", NODES, ids=lambda spec: spec.torch_name)
def test_operator_obeys_the_rules_of_torch(spec):
    case = cases_of(spec)[-1]
    operator = getattr(torch.ops.forcing_kv, spec.torch_name).default
    torch.library.opcheck(
        operator,
        (*(x.nan_to_num() for x in case.build(torch.float32)), *case.arguments),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("spec", NODES, ids=lambda spec: spec.torch_name)
def test_wrong_shape_is_refused_by_name(spec):
    case = cases_of(spec)[0]
    inputs = case.build(torch.float32)
    inputs[-1] = torch.cat((inputs[-1], inputs[-1]), dim=-1)
    with pytest.raises(ValueError, match=rf"{spec.name}: input {spec.inputs[-1].name} "):
        spec.check([x.shape for x in inputs], case.attributes)


@pytest.mark.parametrize(
    ("field", "value"), [("num_segments", 5), ("temporal_frames", 0), ("sink_rows", 193)]
)
def test_impossible_candidate_layout_is_refused(field, value):
    layout = CandidateLayout(2, 0, 288, 96, 1, 96, 6)
    with pytest.raises(ValueError, match=field):
        replace(layout, **{field: value})


def test_equal_scores_keep_the_lower_index():
    scores = torch.tensor([[1.0, 0.5, 0.5], [0.5, 2.0, 0.5]])
    assert select_segments(scores, 3).tolist() == [1, 2, 3]


def test_nan_scores_are_kept_last():
    scores = torch.tensor([[torch.nan, 3.0], [torch.inf, -torch.inf]])
    assert select_segments(scores, 2).tolist() == [1, 3]
    assert select_segments(scores, 3).tolist() == [0, 1, 3]


def test_eviction_moves_bytes(reference):
    case = cases_of(SIMILARITY_EVICTION)[0]
    inputs = case.build(torch.bfloat16)
    dyn_k, dyn_v, _ = reference(case, inputs)
    rows = torch.cat((inputs[1], inputs[3].flatten(0, 1)))
    assert all((rows == row).all(-1).any() for row in dyn_k[0])
    assert not torch.equal(dyn_k, dyn_v)
