"""Adapters that cannot be merged are refused by file and tensor; idle ones are told of."""

import json
import math

import pytest
import torch
from stand_ins import peft_file, prefixed
from tiny_wan import RANK, assert_close, expected, merged, products, random_factors, random_weights
from tiny_wan import save as save_file

from forcing_kv.export.checkpoint.adapter.alpha import AlphaRule
from forcing_kv.runtime_trt.errors import InputError

Q, FFN, DOWN = "blocks.0.self_attn.q", "blocks.1.ffn.0", "blocks.1.ffn.2"


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture(scope="module")
def factors(weights):
    return random_factors(weights, [Q, FFN])


@pytest.fixture(scope="module")
def base(weights, tmp_path_factory):
    return save_file(tmp_path_factory.mktemp("base"), weights, "base.safetensors")


def zeros(*shape):
    return torch.zeros(shape)


def pair(layer, down, up):
    return {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}


BROKEN = {
    "rank 0": (pair(Q, zeros(0, 24), zeros(24, 0)), rf"{Q}\.lora_A\.weight has rank 0"),
    "transposed": (pair(DOWN, zeros(4, 24), zeros(40, 4)), rf"{DOWN}.*\[40, 24\].*\[24, 40\]"),
    "another width": (pair(Q, zeros(4, 48), zeros(48, 4)), r"\[48, 48\] weight, the model has"),
    "ranks differ": (pair(Q, zeros(4, 24), zeros(24, 8)), rf"{Q}.*differ in rank"),
    "one half": ({f"{Q}.lora_A.weight": zeros(4, 24)}, rf"without their partner.*{Q}\.lora_A"),
    "alpha alone": ({f"{Q}.alpha": torch.tensor(1.0)}, rf"without their partner.*{Q}\.alpha"),
    "one axis": (pair(Q, zeros(24), zeros(24)), "two axes"),
    "no axis": ({f"{Q}.lora_A": torch.tensor(1.0), f"{Q}.lora_B": torch.tensor(1.0)}, "two axes"),
    "kernel in the upper": (pair(Q, zeros(4, 24), zeros(24, 4, 3)), "upper factor has a kernel"),
    "kernel turned": (
        pair("patch_embedding", zeros(4, 2, 2, 4), zeros(24, 4, 1, 1)), "makes a .* weight"
    ),
    "no such block": (pair("blocks.9.self_attn.q", zeros(4, 24), zeros(24, 4)), "blocks.9"),
    "image to video": (
        pair("diffusion_model.blocks.0.cross_attn.k_img", zeros(4, 24), zeros(24, 4)),
        "k_img, which the model does not have; use an adapter made for this base model",
    ),
    "second denoiser": (
        pair("transformer_2.blocks.0.attn1.to_q", zeros(4, 24), zeros(24, 4)), "transformer_2"
    ),
    "flat and unknown": (
        pair("lora_unet_blocks_0_self_attn_qq", zeros(4, 24), zeros(24, 4)), "self_attn_qq"
    ),
    "unknown": ({f"{Q}.lora_C.weight": zeros(4)}, r"lora_C\.weight is no tensor of an adapter"),
    "oft": ({f"{Q}.oft_blocks": zeros(4, 4, 4)}, "oft_blocks is no tensor of an adapter"),
    "integers": (pair(Q, zeros(4, 24).to(torch.int8), zeros(24, 4)), rf"{Q}\.lora_A.*torch\.int8"),
    "whole weight": ({f"{Q}.weight": zeros(24, 24)}, rf"{Q}\.weight is a whole parameter"),
    "magnitude": (
        pair(Q, zeros(4, 24), zeros(24, 4)) | {f"{Q}.dora_scale": zeros(7)}, "has magnitudes"
    ),
    "two kinds": (
        pair(Q, zeros(4, 24), zeros(24, 4)) | {f"{Q}.diff": zeros(24, 24)}, "of two kinds"
    ),
    "difference": ({f"{Q}.diff": zeros(24, 25)}, rf"{Q}\.diff.*\[24, 25\]"),
    "bias of no LoRA": ({f"{Q}.lora_B.bias": zeros(24)}, "without their partner"),
    "huge kron": (
        {f"{Q}.lokr_w1": zeros(1000, 1000), f"{Q}.lokr_w2": zeros(2000, 2000)}, "makes a"
    ),
    "kron axes": ({f"{Q}.lokr_w1": zeros(4), f"{Q}.lokr_w2": zeros(6, 6)}, "two axes"),
    "core ranks": (
        {f"{Q}.lokr_w1": zeros(4, 4), f"{Q}.lokr_t2": zeros(1, 3), f"{Q}.lokr_w2_a": zeros(3, 6),
         f"{Q}.lokr_w2_b": zeros(3, 6)}, "in rank",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BROKEN)
def test_broken_adapters_are_named(tmp_path, base, factors, mistake):
    tensors, message = BROKEN[mistake]
    good = {k: v for k, v in peft_file(factors).items() if Q not in k}
    file = save_file(tmp_path, good | tensors, "broken.safetensors")
    with pytest.raises(InputError, match=message) as refused:
        merged(base, file)
    assert "broken.safetensors" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_is_no_adapter(base):
    with pytest.raises(InputError, match=r"is a whole parameter"):
        merged(base, base)


def test_one_layer_under_two_names(tmp_path, base, factors):
    tensors = peft_file(factors) | pair(
        "transformer.blocks.0.attn1.to_q", *(factor.clone() for factor in factors[Q])
    )
    file = save_file(tmp_path, tensors, "twice.safetensors")
    with pytest.raises(InputError, match=rf"{Q}.* and .*to_q.* are the same tensor"):
        merged(base, file)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("half", [0, 1])
def test_tensors_that_are_not_finite_are_named(tmp_path, base, factors, value, half):
    broken = [part.clone() for part in factors[Q]]
    broken[half][1, 2] = value
    file = save_file(tmp_path, pair(Q, *broken), "nan.safetensors")
    with pytest.raises(InputError, match=rf"nan\.safetensors: tensor {Q}\.lora_{'AB'[half]}"):
        merged(base, file)


@pytest.mark.parametrize(
    "key",
    [
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te1_encoder_block_0.alpha",
        "text_encoder.text_model.encoder.layers.0.q_proj.lora_A.weight",
    ],
)
def test_tensors_of_text_encoders_are_left_out_and_told_of(
    tmp_path, base, weights, factors, key, told
):
    file = save_file(tmp_path, peft_file(factors) | {key: zeros(1, 4)}, "style.safetensors")
    assert_close(merged(base, file), expected(weights, products(factors)))
    assert f"1 tensors are of a text encoder, such as {key}, and are left out" in told(file)
    only = save_file(tmp_path, {key: zeros(1, 4)}, "only.safetensors")
    with pytest.raises(InputError, match="holds no LoRA factors"):
        merged(base, only)


@pytest.fixture
def told():
    from tiny_wan import SHAPE

    from forcing_kv.export.checkpoint.adapter.file import adapter_file
    from forcing_kv.export.checkpoint.adapter.names import ModelNames
    from forcing_kv.export.checkpoint.adapter.read import read_adapter

    def lines(file):
        adapter = read_adapter(adapter_file(file), AlphaRule(), ModelNames.of(SHAPE))
        return " ".join(adapter.describe())

    return lines


def test_an_adapter_that_changes_nothing_is_told_of(tmp_path, base, weights, factors, caplog):
    idle = {layer: (a, torch.zeros_like(b)) for layer, (a, b) in factors.items()}
    file = save_file(tmp_path, peft_file(idle), "idle.safetensors")
    assert_close(merged(base, file), expected(weights, {}))
    assert f"{file}: changes nothing" in caplog.text
    caplog.clear()
    works = save_file(tmp_path, peft_file(factors), "works.safetensors")
    merged(base, works)
    assert not caplog.records
    for given, rule in ((f"{works}:0", AlphaRule()), (works, AlphaRule(0.0))):
        merged(base, given, rule=rule)
        assert f"{works}: changes nothing" in caplog.text
        caplog.clear()


def test_two_adapters_do_not_replace_one_parameter(tmp_path, base, factors):
    tensors = peft_file(factors) | prefixed({f"{Q}.bias": zeros(24)}, "base_model.model.")
    files = [save_file(tmp_path, tensors, f"{name}.safetensors") for name in "ab"]
    with pytest.raises(InputError, match=rf"several adapters replace {Q}\.bias"):
        merged(base, *files)


def test_an_alpha_without_an_adapter_is_refused(tmp_path, base, factors):
    with pytest.raises(InputError, match="--lora-alpha is of an adapter, but"):
        merged(base, rule=AlphaRule(2.0))
    diff = save_file(tmp_path, {f"{Q}.diff": torch.ones(24, 24)}, "diff.safetensors")
    with pytest.raises(InputError, match="has no layer with an alpha"):
        merged(base, diff, rule=AlphaRule(2.0))


def test_dora_without_its_magnitudes_is_refused(tmp_path, base, factors):
    tensors = peft_file(factors) | {f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(24)}
    save_file(tmp_path, tensors, "adapter_model.safetensors")
    config = {"r": RANK, "lora_alpha": RANK, "use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"use_dora is set, but {FFN} has no magnitudes"):
        merged(base, tmp_path)
