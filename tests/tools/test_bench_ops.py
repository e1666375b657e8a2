"""`fkv bench ops`: the baselines compute the same thing, and the counts behind its rates."""

import pytest
import torch
from typer.testing import CliRunner

from forcing_kv.export.presets import load_preset
from forcing_kv.plugins.accuracy import reference_outputs
from forcing_kv.plugins.cases import attention_case
from forcing_kv.runtime_trt.errors import BackendUnavailableError
from forcing_kv.runtime_trt.resolution import RESOLUTIONS
from forcing_kv.tools.bench.op_baselines import extract_join_scatter, same_key_count
from forcing_kv.tools.bench.op_costs import flops, traffic_nbytes
from forcing_kv.tools.cli import COMMANDS, build_app
from forcing_kv.tools.op_workload import workload_of

CASE = attention_case("two groups", 20, 32, [(12, 12)] * 3 + [(18, 18)] * 2)


def test_the_reference_way_gives_the_same_output():
    inputs = CASE.build(torch.float32)
    (expected,) = reference_outputs(CASE.spec, inputs, CASE.attributes)
    torch.testing.assert_close(extract_join_scatter(CASE, inputs), expected, rtol=0, atol=1e-5)


def test_dense_baseline_has_as_many_keys():
    _, k, _ = same_key_count(CASE, CASE.build(torch.float32))
    assert k.shape[1] * k.shape[2] == pytest.approx(3 * 12 + 2 * 18 + 5 * 20, abs=5)


def test_counts_of_the_published_model():
    norm_rope, attention, similarity, eviction = workload_of(
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
    result = CliRunner().invoke(build_app(COMMANDS), ["bench", "ops"])
    assert isinstance(result.exception, BackendUnavailableError)
    assert "fkv plugins list" in str(result.exception)


@pytest.mark.gpu
def test_rows_on_a_gpu(tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = ["bench", "ops", "--resolution", "12x16", "--iterations", "3", "--out", str(out)]
    result = CliRunner().invoke(build_app(COMMANDS), arguments)
    assert result.exit_code == 0, result.output
    assert len(out.read_text().splitlines()) > 10
