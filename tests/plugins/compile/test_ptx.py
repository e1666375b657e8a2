"""PTX for every device without a GPU: what TensorRT would embed."""

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install 'forcing-kv[plugins]'")

from op_cases import cases_of

from forcing_kv.plugins.compile.launch import (
    NEWER_PTX_VERSIONS,
    SAFE_SHARED_BYTES,
    SHARED_LIMIT_BYTES,
    Problem,
    PtxError,
    SharedMemoryError,
    default_tactic,
)
from forcing_kv.plugins.compile.ptx import (
    compile_kernel,
    entry_parameters,
    strip_hidden_parameters,
    tensor_dtypes,
)
from forcing_kv.plugins.compile.ptxas import assemble
from forcing_kv.plugins.registry import HEAD_INDEXED_ATTENTION, OPS

SIBLINGS = (87, 103, 110, 121)
"""Devices with the units and the shared memory of another."""
DEVICES = tuple(sm for sm in SHARED_LIMIT_BYTES if sm not in SIBLINGS)


def problem_of(spec, dtype):
    case = cases_of(spec)[-1]
    shapes = [tensor.shape(case.sizes) for tensor in spec.inputs]
    return Problem(spec.read_sizes(shapes, case.attributes), case.attributes, dtype, 132)


def build(spec, tactic, sm, dtype="bfloat16"):
    return compile_kernel(spec, problem_of(spec, dtype), tensor_dtypes(spec, dtype), tactic, sm)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Triton's cache in a folder of the test, so that every run compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def check_kernel(kernel, spec, tactic, device):
    parameters = entry_parameters(kernel.ptx, kernel.name)
    extra = len(kernel.launch.scratch) + (2 if tactic.tma else 0)
    assert len(parameters) == len(spec.inputs) + len(spec.outputs) + extra
    assert bool(extra) == tactic.torch_only
    assert ("cp.async.bulk.tensor" in kernel.ptx) == tactic.tma
    assert kernel.shared_bytes <= tactic.shared_limit(device)
    assert f".target {kernel.arch}" in kernel.ptx
    version = NEWER_PTX_VERSIONS.get(kernel.sm, 87) / 10
    assert f".version {version}\n" in kernel.ptx
    assert ".py" not in kernel.ptx
    assert assemble(kernel).registers <= 255


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.torch_name)
def test_portable_tactic_compiles_for_every_device(spec):
    tactic = spec.module("kernel").TACTICS[0]
    kernel = build(spec, tactic, 90)
    assert kernel.sm == 80
    assert kernel.shared_bytes <= SAFE_SHARED_BYTES
    check_kernel(kernel, spec, tactic, 90)
    # Every other device compiles the same PTX just in time.
    assemble(kernel, "sm_90")


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.torch_name)
def test_default_tactic_compiles_for_hopper(spec):
    tactic = default_tactic(spec.module("kernel").TACTICS, 90)
    check_kernel(build(spec, tactic, 90), spec, tactic, 90)


@pytest.mark.parametrize(
    ("schedule", "tma"), [("persistent", False), ("split", False), ("tiles", True), ("split", True)]
)
def test_every_schedule_of_attention_compiles_for_hopper(schedule, tma):
    tactics = HEAD_INDEXED_ATTENTION.module("kernel").TACTICS
    tactic = next(t for t in tactics if (t.schedule, t.tma) == (schedule, tma))
    check_kernel(build(HEAD_INDEXED_ATTENTION, tactic, 90), HEAD_INDEXED_ATTENTION, tactic, 90)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.torch_name)
def test_every_tactic_compiles_for_every_device(spec, dtype, device):
    for tactic in spec.module("kernel").TACTICS:
        if tactic.runs_on(device):
            check_kernel(build(spec, tactic, device, dtype), spec, tactic, device)


@pytest.mark.slow
@pytest.mark.parametrize("device", SIBLINGS)
@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.torch_name)
def test_default_tactic_compiles_for_the_siblings(spec, device):
    tactic = default_tactic(spec.module("kernel").TACTICS, device)
    check_kernel(build(spec, tactic, device), spec, tactic, device)


def test_one_kernel_serves_every_split_of_heads():
    kernel = HEAD_INDEXED_ATTENTION.module("kernel")
    sizes = [{"N": 96, "H": 4, "D": 128, "R": rows} for rows in (1000, 2000)]
    for tactic in kernel.TACTICS:
        first, second = (
            kernel.launch(Problem(each, {"max_history": 300}, "bfloat16", 132), tactic)
            for each in sizes
        )
        assert first.constants == second.constants


@pytest.mark.parametrize(
    "device",
    [pytest.param(sm, marks=[] if sm == 120 else pytest.mark.slow) for sm in (86, 89, 120)],
)
def test_attention_of_devices_with_99_kb_fills_their_registers_without_spills(device):
    spec = HEAD_INDEXED_ATTENTION
    sizes = {"H": 12, "N": 4680, "D": 128, "R": 12 * 7800}
    problem = Problem(sizes, {"max_history": 7800}, "bfloat16", 128)
    tactic = default_tactic(spec.module("kernel").TACTICS, device)
    kernel = compile_kernel(spec, problem, tensor_dtypes(spec, "bfloat16"), tactic, device)
    report = assemble(kernel)
    assert 48 * 1024 < kernel.shared_bytes <= 99 * 1024
    assert report.spilled_bytes == 0
    # One block of 8 warps: as many warps as two blocks of the portable tactic.
    assert 65536 // 2 < report.registers * kernel.block_threads <= 65536


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.torch_name)
def test_wide_loads_are_promised_of_whole_tensors_alone(spec, monkeypatch):
    import triton

    promised = {}

    def look(source, target, options):
        promised.update({place: nbytes for (place,), [[_, nbytes]] in source.attrs.items()})
        return compiler(source, target=target, options=options)

    compiler = triton.compile
    monkeypatch.setattr(triton, "compile", look)
    kernel = build(spec, spec.module("kernel").TACTICS[0], 80)
    tensors = (*spec.inputs, *spec.outputs)
    expected = [4 if tensor.dtype == "int32" else 16 for tensor in tensors]
    assert [promised[place] for place in range(len(tensors))] == expected
    assert kernel.alignments == tuple(expected)


def test_tma_is_refused_where_there_is_none():
    tactics = HEAD_INDEXED_ATTENTION.module("kernel").TACTICS
    tactic = next(tactic for tactic in tactics if tactic.tma)
    with pytest.raises(SharedMemoryError, match="needs compute capability 90"):
        build(HEAD_INDEXED_ATTENTION, tactic, 89)


def test_unknown_device_is_refused_with_the_known_ones():
    spec = OPS[0]
    with pytest.raises(ValueError, match="compute capability 75; supported are"):
        build(spec, spec.module("kernel").TACTICS[0], 75)


def test_refused_ptx_is_an_error_with_the_assembler_s_words():
    spec = OPS[0]
    kernel = build(spec, spec.module("kernel").TACTICS[0], 90)
    broken = replace(kernel, ptx=kernel.ptx.replace("ld.global", "ld.nowhere"))
    with pytest.raises(PtxError, match=r"ptxas refuses the PTX for sm_80: .*nowhere"):
        assemble(broken)


PTX = """
.visible .entry run(
	.param .u64 .ptr .global .align 16 run_param_0,
	.param .u64 .ptr .global .align 1 run_param_1,
	.param .u64 .ptr .global .align 1 run_param_2
)
.reqntid 128
{{
	ld.param.b64 %rd1, [{read}];
	ret;
}}
"""


def test_hidden_parameters_are_removed():
    stripped = strip_hidden_parameters(PTX.format(read="run_param_0"), "run", 1, "here")
    assert entry_parameters(stripped, "run") == ("run_param_0",)
    assert "run_param_1" not in stripped


def test_read_hidden_parameter_is_refused():
    with pytest.raises(PtxError, match=r"here: the kernel reads .*run_param_2"):
        strip_hidden_parameters(PTX.format(read="run_param_2"), "run", 1, "here")


def test_unknown_number_of_hidden_parameters_is_refused():
    with pytest.raises(PtxError, match="expected 2 and 2 hidden ones"):
        strip_hidden_parameters(PTX.format(read="run_param_0"), "run", 2, "here")


def test_parameter_that_is_no_pointer_is_refused():
    with pytest.raises(PtxError, match="not a 64-bit pointer"):
        entry_parameters(".visible .entry run(\n.param .u32 run_param_0\n)\n{}", "run")
