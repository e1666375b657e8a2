"""What the compiler gets in place of an operator means the same, and hides no host read."""

import importlib.util
import inspect

import pytest
import torch

from forcing_kv.plugins.bind.compiler_bodies import aten_bodies
from forcing_kv.plugins.check.cases import CASES, OpCase
from forcing_kv.plugins.op_spec import DOMAIN
from forcing_kv.plugins.registry import HEAD_INDEXED_ATTENTION, NODES, OPS
from forcing_kv.runtime_trt.errors import InputError


def body_of(case: OpCase):
    return aten_bodies()[getattr(getattr(torch.ops, DOMAIN), case.spec.torch_name).default]


def outputs(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("op_case", CASES, ids=lambda case: f"{case.spec.torch_name}: {case.name}")
def test_aten_body_equals_reference(op_case):
    case = op_case
    inputs = case.build(torch.float32)
    wanted = getattr(case.spec.module("reference"), case.spec.torch_name)
    valid = slice(0, case.valid_new_rows)
    pairs = zip(
        outputs(body_of(case)(*inputs, *case.arguments)),
        outputs(wanted(*inputs, *case.arguments)),
        strict=True,
    )
    for found, truth in pairs:
        if case.valid_new_rows is not None:
            found, truth = found[valid], truth[valid]
        torch.testing.assert_close(found, truth, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("spec", NODES, ids=lambda spec: spec.torch_name)
def test_aten_body_is_traced_without_a_host_read(spec):
    case = next(case for case in CASES if case.spec is spec)
    operator = getattr(getattr(torch.ops, DOMAIN), spec.torch_name).default

    class Graph(torch.nn.Module):
        def forward(self, *inputs):
            return operator(*inputs, *case.arguments)

    program = torch.export.export(Graph(), tuple(case.build(torch.float32)), strict=False)
    opened = program.run_decompositions(aten_bodies())
    assert DOMAIN not in str(opened.graph)


@pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="needs the Python package triton"
)
@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.torch_name)
def test_triton_body_keeps_the_schema(spec, monkeypatch):
    from forcing_kv.plugins.bind import triton_run
    from forcing_kv.plugins.bind.compiler_bodies import cuda_bodies

    monkeypatch.setattr(triton_run, "multiprocessors", lambda _: 132)
    operator = getattr(getattr(torch.ops, DOMAIN), spec.torch_name)
    body = cuda_bodies()[operator.default]
    schema, wanted = body._opoverload._schema, operator.default._schema
    assert [(a.name, str(a.type)) for a in schema.arguments] == [
        (a.name, str(a.type)) for a in wanted.arguments
    ]
    assert inspect.signature(body._init_fn) is not None
    with pytest.raises(InputError, match="has no tactic 'x'"):
        cuda_bodies({spec.torch_name: "x"})


@pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="needs the Python package triton"
)
@pytest.mark.parametrize(("version", "lends"), [("2.11.0+cu130", False), ("2.13.0", True)])
def test_package_takes_tma_from_a_pytorch_that_lends_enough_memory_alone(
    version, lends, monkeypatch
):
    from forcing_kv.plugins.bind.compiler_bodies import (
        _triton_operator,
        cuda_bodies,
        packaged_tactics,
    )

    tactics = HEAD_INDEXED_ATTENTION.module("kernel").TACTICS
    monkeypatch.setattr(torch, "__version__", version)
    names = {tactic.name for tactic in tactics if lends or not tactic.tma}
    assert {tactic.name for tactic in packaged_tactics(tactics)} == names
    if not lends:
        _triton_operator.cache_clear()
        with pytest.raises(InputError, match=r"for a package of PyTorch 2\.11\.0\+cu130; it has"):
            cuda_bodies({"head_indexed_attention": "128x64s3_tma"})


@pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="needs the Python package triton"
)
def test_unknown_operator_of_a_tactic():
    from forcing_kv.plugins.bind.compiler_bodies import cuda_bodies

    with pytest.raises(InputError, match=r"unknown operators \['attention'\]"):
        cuda_bodies({"attention": "64x64"})


@pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="needs the Python package triton"
)
@pytest.mark.parametrize(("named", "wanted"), [({}, 2), ({"qk_norm_rope": "rows4"}, 4)])
def test_body_launches_the_named_or_the_measured_tactic(named, wanted, monkeypatch):
    from forcing_kv.plugins.bind import triton_run
    from forcing_kv.plugins.bind.compiler_bodies import _triton_operator, cuda_bodies
    from forcing_kv.plugins.registry import QK_NORM_ROPE

    kernel = QK_NORM_ROPE.module("kernel")
    measured = next(tactic for tactic in kernel.TACTICS if tactic.name == "rows2")
    monkeypatch.setattr(triton_run, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(triton_run, "tactic_for", lambda *_: measured)
    launched = []

    class Launcher:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: launched.append((arguments, constants))

    monkeypatch.setattr(torch.library, "wrap_triton", lambda _: Launcher())
    _triton_operator.cache_clear()
    body = cuda_bodies(named)[torch.ops.forcing_kv.qk_norm_rope.default]
    _triton_operator.cache_clear()
    *_, case = (case for case in CASES if case.spec is QK_NORM_ROPE)
    inputs = case.build(torch.float16)
    apart = torch.cat((*inputs[:2], inputs[0]), dim=1)
    inputs[:2] = apart.chunk(3, dim=1)[:2]
    body._init_fn(*inputs, *case.arguments)
    ((arguments, constants),) = launched
    assert constants["ROWS"] == wanted
    assert constants["Q_STRIDE"] == constants["K_STRIDE"] == apart.shape[1]
    assert arguments[0] is inputs[0]


class _H200:
    """What Triton asks of a driver when PyTorch has a kernel's memory accesses analysed."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def is_active(self):
        return True


@pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="needs the Python package triton"
)
@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.torch_name)
def test_compiler_sees_that_inputs_are_only_read(spec, monkeypatch):
    """Else it would copy every history pool before every call."""
    import torch._higher_order_ops.triton_kernel_wrap as wrap
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.runtime import driver

    from forcing_kv.plugins.bind.triton_run import empty_outputs, problem_of, scratch_memory

    monkeypatch.setattr(driver, "_active", _H200())
    kernel = spec.module("kernel")
    case = next(case for case in CASES if case.spec is spec)
    real = case.build(torch.float16)
    with FakeTensorMode():
        inputs = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in real]
        outputs = empty_outputs(spec, inputs, case.attributes)
    for tactic in kernel.TACTICS:
        plan = kernel.launch(problem_of(spec, inputs, case.attributes, 132), tactic)
        names = plan.kernel.arg_names
        with FakeTensorMode():
            tensors = [*inputs, *outputs, *scratch_memory(plan, inputs[0].device)]
        given = dict(zip(names, tensors, strict=False)) | dict(plan.constants)
        analyse = getattr(wrap, "identify_mutated_tensors", None)
        if analyse is not None:
            written = set(analyse(plan.kernel, given, {}))
        else:
            access = wrap.identify_accessed_tensors(plan.kernel, given, {})
            written = {dep.name for dep in access.read_writes.writes}
        assert written == set(names[len(inputs) : len(tensors)])
