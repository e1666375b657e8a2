"""Weights that are not finite, wherever they come from: named, refused, and taken if asked for."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from stand_ins import peft_file

from forcing_kv.export.bundle.write import BundleLabels, export_bundle
from forcing_kv.export.checkpoint.adapter.file import adapter_files
from forcing_kv.export.checkpoint.finite import FiniteCheck, is_finite
from forcing_kv.export.checkpoint.load import CheckpointSource, load_model
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.model.fp8_layers import block_linears, quantize_, scales_for
from forcing_kv.runtime_trt.bundle.fp8 import Fp8Scales, LinearScales
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy

SHAPE = ModelShape(2, 32, 48, 2, in_channels=4, text_len=6, text_dim=8, freq_dim=16)
NAME, SECOND = "blocks.1.ffn.0.weight", "head.head.bias"


def model_of():
    torch.manual_seed(0)
    return CausalWanModel(SHAPE).requires_grad_(False)


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a checkpoint with one value of a tensor changed."""

    def write(value, name=NAME):
        weights = {key: each.clone() for key, each in model_of().state_dict().items()}
        weights[name].flatten()[3] = value
        save_file(weights, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return write


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [NAME, "time_embedding.0.weight", "patch_embedding.weight"])
def test_a_file_with_such_a_value_is_named(checkpoint, value, name):
    path = checkpoint(value, name)
    with pytest.raises(InputError) as caught:
        load_model(path, SHAPE, "bfloat16")
    message = str(caught.value)
    assert message.startswith(f"{path}: tensor {name} holds 1 NaN or infinite values of ")
    assert "in the file" in message
    assert "--allow-non-finite" in message
    loaded = load_model(path, SHAPE, "bfloat16", allow_non_finite=True)
    assert not is_finite(loaded.state_dict()[name])


def test_a_value_that_the_dtype_cannot_hold_is_named_with_its_size(checkpoint):
    path = checkpoint(1e6)
    with pytest.raises(InputError, match=r"as float16, which ends at 65504, for they reach 1e\+06"):
        load_model(path, SHAPE, "float16")
    assert is_finite(load_model(path, SHAPE, "bfloat16").state_dict()[NAME])
    # Wan's float32 islands are not cast.
    path = checkpoint(1e6, "blocks.0.modulation")
    assert is_finite(load_model(path, SHAPE, "float16").state_dict()["blocks.0.modulation"])


def test_an_adapter_that_makes_them_is_named(checkpoint, tmp_path):
    path = checkpoint(0.0)
    down, up = torch.ones(2, 32), torch.full((48, 2), 3e38)
    save_file(peft_file({NAME.removesuffix(".weight"): (down, up)}), tmp_path / "lora.safetensors")
    source = CheckpointSource(path, adapters=adapter_files(tmp_path / "lora.safetensors"))
    told = rf"tensor {NAME} holds 1536 .* once .*lora\.safetensors is merged"
    with pytest.raises(InputError, match=told):
        load_model(source, SHAPE)


def test_the_first_by_name_is_told_and_how_many_there_are():
    check = FiniteCheck("here")
    for name in (SECOND, NAME, "z"):
        check.look(name, torch.tensor([1.0, float("nan")]))
    check.look("a", torch.ones(3))
    with pytest.raises(InputError, match=rf"here: tensor {NAME} holds .*, and 2 other tensors"):
        check.refuse()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "float8_e5m2"])
@pytest.mark.parametrize("place", [0, 70, 99])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_is_found_in_every_dtype(dtype, place, value):
    tensor = torch.randn(100).to(getattr(torch, dtype))
    assert is_finite(tensor)
    tensor[place] = value
    assert not is_finite(tensor)
    assert is_finite(torch.zeros(0))
    assert is_finite(torch.ones(2, dtype=torch.int64))


def export(model, folder, dtype, **options):
    partition = HeadPartition(2, ((0,), (1,)))
    policy = CachePolicy(num_segments=3)
    config = RolloutConfig(SHAPE, ChunkShape(3, 4, 6), policy, partition, dtype=dtype)
    return export_bundle(model, config, folder / "bundle", BundleLabels("made here"), **options)


def test_a_model_made_in_memory_is_looked_at_too(tmp_path):
    model = model_of()
    model.get_parameter(NAME).data[0, 0] = 1e6
    with pytest.raises(InputError, match=rf"made here: tensor {NAME} holds 1 .* as float16"):
        export(model, tmp_path, "float16")
    assert list(tmp_path.iterdir()) == []


def test_fp8_products_that_the_dtype_cannot_hold_are_refused(tmp_path):
    """65504 is a float16; the nearest E4M3 value times its power of two is not."""
    model = model_of()
    weight = model.get_submodule("blocks.0.ffn.0").weight
    weight.data[0, 0] = 65504.0
    amax = {linear.name: 1.0 for linear in block_linears(model)}
    scales = scales_for(model, amax)
    with pytest.raises(InputError, match=r"blocks\.0\.ffn\.0\.weight holds 1 .* as float16"):
        export(model, tmp_path, "float16", fp8=scales)
    weight.data[0, 0] = 1.0
    large = {**scales.linears, "blocks.1.ffn.2": LinearScales(2.0**17, 1.0)}
    with pytest.raises(InputError, match=r"blocks\.1\.ffn\.2\.input_scale holds 1 .* as float16"):
        export(model, tmp_path, "float16", fp8=Fp8Scales(large))
    check = FiniteCheck("")
    check.look_at(quantize_(model_of().cast_(torch.bfloat16), replace(scales, linears=large)))
    check.refuse()


def test_fp8_has_no_scale_for_weights_that_are_not_finite():
    model = model_of()
    model.get_parameter(NAME).data[0, 0] = float("nan")
    with pytest.raises(InputError, match=rf"1 layers are NaN or infinite, such as {NAME}"):
        scales_for(model, {})
