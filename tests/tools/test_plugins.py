"""`fkv plugins list` and the layers that it and `fkv bench ops` take from the presets."""

import json

import pytest
from command_line import fkv

pytest.importorskip("torch", reason="needs PyTorch: pip install 'forcing-kv[export]'")

from forcing_kv.export.request.presets import load_preset
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.resolution import RESOLUTIONS
from forcing_kv.tools.bench.kernels.layer import compressed_layer


def test_the_layer_of_the_published_model():
    layer = compressed_layer(load_preset("self-forcing-1.3b"), RESOLUTIONS["480p"])
    attention = layer.cases()[1]
    assert [case.spec.torch_name for case in layer.cases()] == [
        "qk_norm_rope",
        "head_indexed_attention",
        "segment_similarity",
        "similarity_eviction",
    ]
    assert attention.sizes["N"] == 4680
    assert set(attention.integers["hist_len"]) == {3120, 4680}
    assert attention.integers["hist_len"].count(4680) == 8
    for case in layer.cases():
        case.spec.check([t.shape(case.sizes) for t in case.spec.inputs], case.attributes)


def test_policy_without_segments_has_no_eviction():
    layer = compressed_layer(load_preset("krea-14b"), RESOLUTIONS["480p"])
    assert len(layer.cases()) == 2


def test_more_dynamic_heads_than_heads_are_refused():
    with pytest.raises(InputError, match="13 dynamic heads asked for"):
        compressed_layer(load_preset("self-forcing-1.3b"), RESOLUTIONS["480p"], 13)


@pytest.mark.slow
def test_list_names_every_tactic():
    pytest.importorskip("triton", reason="needs Triton: pip install 'forcing-kv[plugins]'")
    result = fkv("plugins", "list", "--resolution", "12x16", "--sm", 90, "--sm", 86, "--json")
    assert result.exit_code == 0, result.output
    kernels = json.loads(result.stdout)["kernels"]
    assert {row["device_sm"] for row in kernels} == {90, 86}
    assert all(row["fits"] == (row["registers"] is not None) for row in kernels)
    assert sum(row["default"] for row in kernels) == 2 * 4


def test_unknown_device_is_refused():
    pytest.importorskip("triton", reason="needs Triton: pip install 'forcing-kv[plugins]'")
    with pytest.raises(InputError, match=r"--sm \[75\]"):
        fkv("plugins", "list", "--sm", 75)
