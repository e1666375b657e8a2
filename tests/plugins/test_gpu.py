"""The kernels on a GPU: numbers, embedded PTX, capture and replay, 64-bit addresses.

Nothing here has a tolerance of its own: `check` judges by the operator's class against float64.
"""

import pytest
import torch

from forcing_kv.plugins.bind.torch_library import OPERATORS
from forcing_kv.plugins.check.cases import OpCase, attention_case, candidate_case, norm_rope_case
from forcing_kv.plugins.compile.launch import SHARED_LIMIT_BYTES
from forcing_kv.plugins.frame_chain.layout import CandidateLayout
from forcing_kv.plugins.registry import OPS, SEGMENT_SIMILARITY, SIMILARITY_EVICTION

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16]
_TOKENS = 1560
_LAYOUT = CandidateLayout(1, 2 * _TOKENS, 3 * _TOKENS, _TOKENS, 1, _TOKENS, 6)
LARGE = (
    norm_rope_case("480p", 3 * _TOKENS, 12, 128),
    attention_case("480p", 3 * _TOKENS, 128, [(2 * _TOKENS,) * 2] + [(3 * _TOKENS,) * 2] * 2),
    attention_case("head dim 64", 1000, 64, [(3600, 3599), (3600, 1), (7200, 7200)]),
    candidate_case(SEGMENT_SIMILARITY, "480p", _LAYOUT, num_heads=3, num_frames=3, head_dim=128),
    candidate_case(
        SIMILARITY_EVICTION,
        "480p",
        _LAYOUT,
        num_heads=3,
        num_frames=3,
        head_dim=128,
        num_kept=6,
        num_levels=1,
    ),
)


@pytest.fixture(scope="module")
def sm():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and a PyTorch with CUDA")
    pytest.importorskip("triton", reason="needs Triton, which PyTorch with CUDA brings")
    major, minor = torch.cuda.get_device_capability()
    capability = 10 * major + minor
    if capability not in SHARED_LIMIT_BYTES:
        pytest.skip(f"needs a GPU of compute capability {list(SHARED_LIMIT_BYTES)}")
    return capability


def poisoned_outputs(case: OpCase, inputs):
    from forcing_kv.plugins.bind.triton_run import empty_outputs

    outputs = empty_outputs(case.spec, inputs, case.attributes)
    for output in outputs:
        output.fill_(torch.nan if output.is_floating_point() else -1)
    return outputs


def tactics_of(case: OpCase, dtype: torch.dtype, sm: int):
    """Every tactic for the device; in float32, over which the compiler takes long, the first."""
    tactics = case.spec.module("kernel").TACTICS
    return [t for t in tactics if t.runs_on(sm)] if dtype in DTYPES else tactics[:1]


def run(case: OpCase, inputs, outputs, tactic) -> bool:
    """Launch a tactic; False where the device has too little shared memory for it."""
    from triton.runtime.errors import OutOfResources

    from forcing_kv.plugins.bind.triton_run import multiprocessors, run_kernel

    try:
        run_kernel(case.spec, inputs, case.attributes, outputs, tactic, multiprocessors(0))
    except OutOfResources:
        assert not tactic.portable
        return False
    return True


def check_every_tactic(case: OpCase, dtype: torch.dtype, sm: int, check) -> None:
    from forcing_kv.plugins.bind.triton_run import compile_together, multiprocessors

    inputs = case.build(dtype, device="cuda")
    tactics, some = tactics_of(case, dtype, sm), poisoned_outputs(case, inputs)
    compile_together((case.spec, inputs, case.attributes, some, tactic, multiprocessors(0))
                     for tactic in tactics)  # fmt: skip
    for tactic in tactics:
        outputs = poisoned_outputs(case, inputs)
        if run(case, inputs, outputs, tactic):
            check(case, inputs, outputs)


def embedded_kernels(case: OpCase, inputs, sm: int):
    """Kernel of every tactic that fits the device and can be launched without Triton."""
    from forcing_kv.plugins.bind.triton_run import multiprocessors, problem_of
    from forcing_kv.plugins.compile.launch import SharedMemoryError
    from forcing_kv.plugins.compile.ptx import compile_kernel

    problem = problem_of(case.spec, inputs, case.attributes, multiprocessors(0))
    outputs = poisoned_outputs(case, inputs)
    dtypes = [str(x.dtype).removeprefix("torch.") for x in (*inputs, *outputs)]
    for tactic in case.spec.module("kernel").TACTICS:
        if tactic.tma:
            # Only Triton's launcher lends the memory of its hidden parameters.
            continue
        try:
            yield compile_kernel(case.spec, problem, dtypes, tactic, sm)
        except SharedMemoryError:
            continue


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
def test_small_cases(case, dtype, sm, check):
    check_every_tactic(case, dtype, sm, check)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("large", LARGE, ids=lambda case: f"{case.spec.torch_name}-{case.name}")
def test_large_cases(large, dtype, sm, check):
    check_every_tactic(large, dtype, sm, check)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("large", LARGE, ids=lambda case: f"{case.spec.torch_name}-{case.name}")
def test_embedded_ptx_gives_the_same_numbers(large, dtype, sm, check):
    from forcing_kv.plugins.bind.triton_run import scratch_memory
    from forcing_kv.plugins.compile.ptx_launch import LoadedKernel

    inputs = large.build(dtype, device="cuda")
    for kernel in embedded_kernels(large, inputs, sm):
        outputs = poisoned_outputs(large, inputs)
        tensors = (*inputs, *outputs, *scratch_memory(kernel.launch, inputs[0].device))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with LoadedKernel(kernel) as loaded:
            loaded.launch([x.data_ptr() for x in tensors], stream.cuda_stream)
            stream.synchronize()
        check(large, inputs, outputs)


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.torch_name)
def test_operator_runs_its_kernel_and_accepts_strided_inputs(spec, strided, sm, check):
    case = next(case for case in LARGE if case.spec is spec)
    inputs = case.build(torch.bfloat16, device="cuda")
    operator = OPERATORS[spec]
    outputs = operator(*(strided(x) for x in inputs), *case.arguments)
    check(case, inputs, outputs if isinstance(outputs, tuple) else (outputs,))


def test_replayed_graph_reads_the_lengths_of_the_day(sm, check):
    capacity = [512, 512, 1024]
    case = attention_case("replay", 700, 128, [(rows, rows) for rows in capacity])
    inputs = case.build(torch.bfloat16, device="cuda")
    hist_len, new_len = inputs[6], inputs[7]
    for tactic in tactics_of(case, torch.bfloat16, sm):
        outputs = poisoned_outputs(case, inputs)
        if not run(case, inputs, outputs, tactic):
            continue
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(case, inputs, outputs, tactic)
        for lengths, rows in (([0, 0, 0], 700), ([512, 1, 1024], 64), ([3, 511, 65], 333)):
            hist_len.copy_(torch.tensor(lengths, dtype=torch.int32))
            new_len.fill_(rows)
            outputs[0].fill_(torch.nan)
            graph.replay()
            torch.cuda.synchronize()
            check(case, inputs, outputs)
        hist_len.copy_(torch.tensor(capacity, dtype=torch.int32))
        new_len.fill_(700)


def test_neighbours_of_an_output_stay_untouched(sm):
    for case in LARGE:
        inputs = case.build(torch.bfloat16, device="cuda")
        for tactic in tactics_of(case, torch.bfloat16, sm):
            guarded = [torch.full((x.numel() + 512,), 7, dtype=x.dtype, device="cuda")
                       for x in poisoned_outputs(case, inputs)]  # fmt: skip
            shapes = case.output_shapes()
            outputs = [x[256:-256].view(shape) for x, shape in zip(guarded, shapes, strict=True)]
            run(case, inputs, outputs, tactic)
            for x in guarded:
                assert (x[:256] == 7).all()
                assert (x[-256:] == 7).all()


def test_pool_with_more_than_two_to_the_31_elements(sm, check):
    head_dim, rows = 128, 200
    first = 2**31 // head_dim + 5
    pool = torch.full((first + rows, head_dim), torch.nan, dtype=torch.bfloat16, device="cuda")
    pool[first:] = torch.randn(rows, head_dim, device="cuda")
    case = attention_case("far rows", 100, head_dim, [(rows, rows)])
    inputs = case.build(torch.bfloat16, device="cuda")
    inputs[3] = inputs[4] = pool
    inputs[5].fill_(first)
    for tactic in tactics_of(case, torch.bfloat16, sm):
        outputs = poisoned_outputs(case, inputs)
        if run(case, inputs, outputs, tactic):
            check(case, inputs, outputs)
