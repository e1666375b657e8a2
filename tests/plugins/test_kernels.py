"""The Triton kernels in the interpreter (no GPU) against the truth, and how they are scheduled."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="needs Triton: pip install 'forcing-kv[plugins]'")

from op_cases import cases_of  # noqa: E402

from forcing_kv.plugins.bind.triton_run import accepted_inputs  # noqa: E402
from forcing_kv.plugins.check.cases import (  # noqa: E402
    KERNEL_CASES,
    attention_case,
    norm_rope_case,
)
from forcing_kv.plugins.compile.launch import (  # noqa: E402
    SHARED_LIMIT_BYTES,
    ceil_div,
    default_tactic,
)
from forcing_kv.plugins.head_indexed_attention.schedule import tile_counts  # noqa: E402
from forcing_kv.plugins.registry import HEAD_INDEXED_ATTENTION, OPS, QK_NORM_ROPE  # noqa: E402

pytestmark = pytest.mark.long


def release(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


WORKER = Path(__file__).parent / "interpreter_worker.py"


def interpret(out, *arguments):
    """Outputs of every kernel on every case, from one process in interpreter mode."""
    if release(triton.__version__) < (3, 7) and release(np.__version__) >= (2, 4):
        pytest.skip("needs Triton 3.7 or numpy < 2.4: older interpreters fail on loop bounds")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(out), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory):
    return interpret(tmp_path_factory.mktemp("interpreter") / "outputs.pt")


def outputs_of(results, case, dtype):
    """Outputs of the case by every tactic that was run."""
    wanted = (case.spec.name, case.name, str(dtype))
    found = [outputs for key, outputs in results.items() if key[:3] == wanted]
    assert len(found) >= 2
    return found


def check_outputs(case, dtype, interpreted, check):
    inputs = case.build(dtype)
    for outputs in outputs_of(interpreted, case, dtype):
        check(case, inputs, outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_kernel_equals_reference(kernel_case, dtype, interpreted, check):
    check_outputs(kernel_case, dtype, interpreted, check)


@pytest.mark.slow
def test_every_tactic_equals_reference(tmp_path, check):
    outputs = interpret(tmp_path / "outputs.pt", "every")
    for case in KERNEL_CASES:
        for dtype in (torch.float32, torch.float16):
            found = outputs_of(outputs, case, dtype)
            assert len(found) == len(case.spec.module("kernel").TACTICS)
            check_outputs(case, dtype, outputs, check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_attention_with_a_tail_of_smaller_tiles(dtype, interpreted, check):
    case = attention_case("waves", 200, 32, [(70, 70), (70, 66), (100, 3), (100, 100)])
    assert all(tile_counts(200, 4, 128, 64, 3))
    check_outputs(case, dtype, interpreted, check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_attention_with_the_keys_of_a_tile_split_over_three_programs(dtype, interpreted, check):
    check_outputs(attention_case("one tile", 40, 32, [(300, 299)]), dtype, interpreted, check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_norm_and_rope_of_rows_that_lie_apart(dtype, interpreted, check):
    case = norm_rope_case("rows apart", 21, 3, 32)
    check_outputs(case, dtype, interpreted, check)


@pytest.mark.parametrize("spec", OPS[1:], ids=lambda spec: spec.torch_name)
def test_pool_with_more_than_two_to_the_31_elements(spec, interpreted, check):
    case = replace(cases_of(spec)[-1], name="far rows")
    check_outputs(case, torch.float16, interpreted, check)


def test_only_what_a_kernel_cannot_read_is_copied():
    rows = torch.randn(4, 3 * 64, dtype=torch.float16)
    q = rows.chunk(3, dim=1)[0]
    odd = torch.randn(4, 65, dtype=torch.float16)[:, :64]
    others = [torch.ones(64), torch.ones(64), torch.ones(4, 16), torch.ones(16, 4).T]
    given_inputs = [q, odd, *others]
    readable, strides = accepted_inputs(QK_NORM_ROPE, given_inputs)
    assert strides == {"q": 192}
    assert readable[0] is q
    assert all(x.is_contiguous() for x in readable[1:])
    assert all(torch.equal(a, b) for a, b in zip(readable, given_inputs, strict=True))


@given(
    num_tokens=st.integers(1, 20000),
    num_heads=st.integers(1, 40),
    tile=st.sampled_from([64, 128]),
    num_sms=st.integers(1, 148),
)
def test_tiles_cover_every_query_once(num_tokens, num_heads, tile, num_sms):
    full, tail_tiles = tile_counts(num_tokens, num_heads, tile, 64, num_sms)
    assert full >= 0
    assert tail_tiles >= 0
    covered = full * tile + tail_tiles * 64
    # Nothing is left over and no tile is empty.
    last = 64 if tail_tiles else tile
    assert covered - last < num_tokens <= covered


def test_full_tiles_fill_whole_waves_at_480p():
    full, tail = tile_counts(4680, 12, 128, 64, 132)
    assert 12 * full == 3 * 132
    assert 12 * tail <= 132


def predicted_share(schedule, num_tokens, num_keys, num_sms, *, tail, tile=128, key_tile=64):
    """Useful work over the time of the busiest multiprocessor, which runs one program at a time."""
    ideal = num_tokens * sum(num_keys) / num_sms
    if schedule == "split":
        pairs = sum(ceil_div(num_tokens, tile) * ceil_div(keys, key_tile) for keys in num_keys)
        return ideal / (ceil_div(pairs, num_sms) * tile * key_tile)
    full, tails = tile_counts(num_tokens, len(num_keys), tile, tail, num_sms)
    longest_first = sorted(num_keys, reverse=True)
    work = [tile * keys for keys in longest_first for _ in range(full)]
    work += [tail * keys for keys in longest_first for _ in range(tails)]
    busy = [0] * num_sms
    for item, amount in enumerate(work):
        # A launch gives the next tile to whoever is free first; a persistent program takes its own.
        index = item % num_sms if schedule == "persistent" else busy.index(min(busy))
        busy[index] += amount
    return ideal / max(busy)


@pytest.mark.parametrize(
    ("tokens_per_frame", "shares"),
    [(1560, (86, 94, 94, 98)), (3600, (97, 97, 96, 99)), (8160, (97, 99, 99, 100))],
    ids=["480p", "720p", "1080p"],
)
def test_predicted_shares_are_the_documented_ones(tokens_per_frame, shares):
    num_new = 3 * tokens_per_frame
    keys = [num_new + 2 * tokens_per_frame] * 4 + [num_new + 3 * tokens_per_frame] * 8
    found = [
        predicted_share(schedule, num_new, keys, 132, tail=tail)
        for schedule, tail in (("tiles", 128), ("tiles", 64), ("persistent", 64), ("split", 64))
    ]
    assert [round(100 * share) for share in found] == list(shares)


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.torch_name)
def test_every_operator_has_a_portable_and_a_fast_tactic(spec):
    tactics = spec.module("kernel").TACTICS
    assert len({tactic.name for tactic in tactics}) == len(tactics)
    assert tactics[0].portable
    for sm in SHARED_LIMIT_BYTES:
        default = default_tactic(tactics, sm)
        assert not default.portable
        assert not default.torch_only
        if spec is HEAD_INDEXED_ATTENTION:
            large = SHARED_LIMIT_BYTES[sm] >= 227 * 1024
            assert default.name == ("128x128" if large else "128x64s3")
    assert default_tactic(tactics, 75).portable
