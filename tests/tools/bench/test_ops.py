"""`fkv bench ops`: the baselines compute the same thing, and the counts behind its rates."""

import pytest
import torch
from command_line import fkv

from forcing_kv.export.request.presets import load_preset
from forcing_kv.plugins.check.accuracy import output_errors
from forcing_kv.plugins.check.cases import attention_case
from forcing_kv.plugins.compile import tuning
from forcing_kv.runtime_trt.errors import BackendUnavailableError, InputError
from forcing_kv.runtime_trt.rollout.resolution import RESOLUTIONS
from forcing_kv.tools.bench.kernels.baselines import Baseline, baseline_errors, baselines
from forcing_kv.tools.bench.kernels.costs import flops, traffic_nbytes
from forcing_kv.tools.bench.kernels.flex_attention import flex_call
from forcing_kv.tools.bench.kernels.folded_attention import fold_heads
from forcing_kv.tools.bench.kernels.grouped_attention import (
    dense_attention,
    extract_join_scatter,
    same_key_count,
)
from forcing_kv.tools.bench.kernels.layer import compressed_layer

CASE = attention_case("two groups", 20, 32, [(12, 12)] * 3 + [(18, 18)] * 2)
APART = attention_case("room behind the history", 20, 32, [(16, 4)] * 3 + [(24, 24)] * 2)
UNEVEN = attention_case(
    "uneven", 150, 32, [(12, 0), (130, 128), (300, 129), (300, 300)], new_len=130
)


def assert_correct(case, inputs, output):
    for error in output_errors(case.spec, inputs, case.attributes, (output,)):
        assert error.passed, error


@pytest.mark.parametrize("case", [CASE, APART], ids=lambda case: case.name)
def test_the_reference_way_gives_the_same_output(case):
    inputs = case.build(torch.float32)
    assert_correct(case, inputs, extract_join_scatter(case, inputs))


def test_dense_baseline_has_as_many_keys_and_is_attention():
    dense = same_key_count(CASE)
    assert sum(dense.integers["hist_len"]) == pytest.approx(3 * 12 + 2 * 18, abs=4)
    assert dense.sizes["N"] == CASE.sizes["N"]
    inputs = dense.build(torch.float32)
    assert_correct(dense, inputs, dense_attention(dense, inputs)())


@pytest.mark.parametrize("case", [CASE, UNEVEN], ids=lambda case: case.name)
def test_flex_attention_gives_the_same_output(case):
    inputs = case.build(torch.float32)
    assert_correct(case, inputs, flex_call(case, inputs)())


@pytest.mark.parametrize("case", [CASE, UNEVEN], ids=lambda case: case.name)
def test_heads_folded_into_the_batch_are_variable_length_attention(case):
    """By hand: PyTorch's variable-length kernels are for CUDA alone."""
    inputs = case.build(torch.float32)
    heads = fold_heads(case, inputs)
    out = torch.full_like(heads.q, torch.nan)
    spans = zip(heads.cu_q, heads.cu_q[1:], heads.cu_k, heads.cu_k[1:], strict=False)
    for first, last, first_key, last_key in spans:
        assert last_key - first_key <= heads.max_k
        q = heads.q[first:last, 0]
        k, v = (x[first_key:last_key, 0] for x in (heads.k, heads.v))
        out[first:last, 0] = torch.softmax(q @ k.T / q.shape[-1] ** 0.5, -1) @ v
    assert_correct(case, inputs, heads.unfold(out))


def test_every_baseline_is_judged_and_a_wrong_one_fails():
    inputs = CASE.build(torch.float32)
    names = [baseline.name for baseline in baselines(CASE, inputs)]
    assert len(set(names)) == len(names) == 11
    baseline = Baseline("wrong", CASE, inputs, lambda: lambda: torch.zeros(20, 5, 32))
    assert not all(error.passed for error in baseline_errors(baseline, baseline.prepare()()))


def test_counts_of_the_published_model():
    norm_rope, attention, similarity, eviction = compressed_layer(
        load_preset("self-forcing-1.3b"), RESOLUTIONS["480p"]
    ).cases()
    keys = 4 * 3120 + 8 * 4680 + 12 * 4680
    assert flops(attention) == 4 * 4680 * keys * 128
    assert flops(similarity) == 0
    assert traffic_nbytes(similarity, "bfloat16") == 4 * 1560 * 8 * 128 * 2
    assert traffic_nbytes(eviction, "bfloat16") == 4 * 8 * 1560 * 128 * 2
    rows = 4 * 4680 * 1536 * 2
    angles, weights = 2 * 4680 * 64 * 4, 2 * 1536 * 4
    assert traffic_nbytes(norm_rope, "bfloat16") == rows + angles + weights


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do():
    with pytest.raises(BackendUnavailableError, match="fkv plugins list"):
        fkv("bench", "ops")


def test_table_that_cannot_be_written_is_refused_before_anything_is_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "absent" / "table.json")
    with pytest.raises(InputError, match="--update-table"):
        fkv("bench", "ops", "--update-table")


@pytest.mark.gpu
def test_rows_on_a_gpu(tmp_path):
    out = tmp_path / "rows.jsonl"
    result = fkv("bench", "ops", "--resolution", "12x16", "--iterations", 3, "--out", out)
    assert result.exit_code == 0, result.output
    assert len(out.read_text().splitlines()) > 10
