"""What the gate lets through."""

from dataclasses import replace

import numpy as np
import pytest
import torch.nn.functional as F

from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import ChunkShape
from forcing_kv.tools.bench.measure.gate import (
    References,
    RolloutResult,
    check,
    roll_out,
    worst_error,
)
from forcing_kv.tools.bench.pytorch import backend
from forcing_kv.tools.bench.pytorch.attention import GroupedHistory
from forcing_kv.tools.bench.subjects import SUBJECTS, LoadClock
from forcing_kv.tools.bench.workloads import random_wan, spread_partition, with_fp8, workload

SCORES = np.linspace(0.1, 0.9, 9, dtype=np.float32).reshape(3, 3)
BEST = np.arange(3, dtype=np.int32)


def rollout(error: float = 0.0, kept=BEST, scores=SCORES) -> RolloutResult:
    latents = np.ones((2, 3, 1, 2, 2), np.float32) * (1 + error)
    return RolloutResult(latents, {1: scores}, {1: np.asarray(kept, np.int32)})


class Fixed(References):
    """References that are given."""

    made: dict

    def get(self, dtype, forced=None):
        return self.made[dtype]


@pytest.fixture
def references(tiny, tmp_path):
    def make(dtype: str, exact: RolloutResult, eager: RolloutResult) -> References:
        fixed = Fixed(tiny().as_dtype(dtype), "cpu", 2, tmp_path)
        fixed.made = {dtype: eager, "float32": exact}
        return fixed

    return make


@pytest.mark.parametrize(("error", "passed"), [(0.019, True), (0.021, False)])
def test_error_may_be_twice_the_eager_one(references, error, passed):
    result = check(rollout(error), references("bfloat16", rollout(), rollout(0.01)))
    assert result.passed is passed
    assert result.kept == "equal"
    assert result.bound == pytest.approx(0.02, rel=1e-5)


def test_float32_has_a_fixed_bound(references):
    assert check(rollout(5e-5), references("float32", rollout(), rollout())).passed
    assert not check(rollout(2e-4), references("float32", rollout(), rollout())).passed


@pytest.mark.parametrize(("rounding", "verdict"), [(0.06, "within rounding"), (0.04, "different")])
def test_other_segments_need_an_excuse(references, rounding, verdict):
    # Segment 3 instead of 2: their scores differ by 0.1, and each may be off by the rounding.
    eager = rollout(0.01, scores=SCORES + np.float32(rounding))
    result = check(rollout(0.01, kept=[0, 1, 3]), references("bfloat16", rollout(), eager))
    assert result.kept == verdict
    assert result.passed is (verdict == "within rounding")


@pytest.mark.parametrize(("error", "passed"), [(0.019, True), (0.021, False)])
def test_large_size_takes_its_bound_from_a_smaller_one(references, error, passed):
    large = references("bfloat16", None, rollout())
    large.scale = references("bfloat16", rollout(), rollout(0.01))
    result = check(rollout(error), large)
    assert result.reference == "same dtype"
    assert result.passed is passed
    assert result.bound == pytest.approx(0.02, rel=1e-5)


@pytest.mark.parametrize(("rounding", "verdict"), [(0.03, "within rounding"), (0.02, "different")])
def test_other_segments_need_an_excuse_in_a_large_size(references, rounding, verdict):
    large = references("bfloat16", None, rollout())
    smaller = rollout(0.01, scores=SCORES + np.float32(rounding))
    large.scale = references("bfloat16", rollout(), smaller)
    # However wrong its own scores are.
    found = rollout(0.01, kept=[0, 1, 3], scores=SCORES[::-1])
    assert check(found, large).kept == verdict
    assert check(rollout(0.01, kept=[0, 1, 8]), large).kept == "different"


@pytest.mark.parametrize("scaled", [False, True])
def test_who_does_not_select_where_the_reference_does_fails(references, scaled):
    made = references("bfloat16", rollout(), rollout(0.01))
    if scaled:
        made.scale = references("bfloat16", rollout(), rollout(0.01))
    never = RolloutResult(rollout().latents, {}, {})
    result = check(never, made)
    assert (result.kept, result.passed) == ("different", False)


def test_random_weights_make_the_gate_see_attention(tiny, tmp_path, monkeypatch):
    shape = replace(tiny().config.model, dim=256, ffn_dim=384, num_layers=4)
    config = replace(
        tiny().config, model=shape, chunk=ChunkShape(3, 8, 12),
        partition=spread_partition(shape, 6, seed=0), dtype="bfloat16",
    )  # fmt: skip
    workload = replace(tiny(), config=config, load=lambda device: random_wan(device, shape))
    references = References(workload, "cpu", 4, tmp_path)

    class OwnRowsAlone(GroupedHistory):
        def attend(self, layer, q, k, v):
            return F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1)

    exact, allowed = references.get("float32"), 2 * references.port_errors()[0]
    monkeypatch.setitem(backend.HISTORIES, "grouped", OwnRowsAlone)
    wrong = References(workload, "cpu", 4, tmp_path / "wrong").get("float32", dict(exact.kept))
    assert worst_error(wrong.latents, exact.latents) > 4 * allowed


def test_not_a_number_never_passes(references):
    found = rollout(float("nan"))
    assert not check(found, references("bfloat16", rollout(), rollout(0.01))).passed
    assert worst_error(found.latents, rollout().latents) == float("inf")


def test_reference_rollouts_are_kept_on_disk(tiny, tmp_path, monkeypatch):
    references = References(tiny(), "cpu", 4, tmp_path)
    first = references.get("float32")
    monkeypatch.setattr(References, "_make", None)
    again = References(tiny(), "cpu", 4, tmp_path).get("float32")
    np.testing.assert_array_equal(first.latents, again.latents)
    assert {2, 3} == set(again.kept) == set(first.kept)


def test_fp8_is_held_against_eager_fp8(tiny, tmp_path):
    plain = tiny().as_dtype("bfloat16")
    work = with_fp8(plain)
    references = References(work, "cpu", 4, tmp_path)
    exact, port = references.get("float32"), references.get("bfloat16")
    # The truth has the rounded weights; what eager FP8 adds is more than bfloat16 does.
    assert worst_error(exact.latents, References(plain, "cpu", 4, tmp_path).get("float32").latents)
    fp8, bf16 = references.port_errors()[0], References(plain, "cpu", 4, tmp_path).port_errors()[0]
    assert fp8 > 1.2 * bf16
    assert check(port, references).passed
    wrong = replace(port, latents=exact.latents + 3 * (port.latents - exact.latents))
    assert not check(wrong, references).passed
    # Our operators are other arithmetic than the port's, and as good.
    clock, operators = LoadClock(), replace(SUBJECTS["operators"], fp8=True)
    with operators.open(work, "cpu", clock) as session:
        assert check(roll_out(session, work.prompt(), 4), references).passed


def test_fp8_is_not_measured_beside_float32():
    with pytest.raises(InputError, match="16-bit dtype"):
        workload("digits", "native", "forcing-kv", "float32", fp8=True)
    assert workload("digits", "native", "forcing-kv", "bfloat16", fp8=True).fp8
