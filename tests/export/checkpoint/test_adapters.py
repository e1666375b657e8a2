"""Adapters as every trainer names and writes them merge exactly, against sums in numpy."""

import itertools
import json

import numpy as np
import pytest
import torch
from stand_ins import diffusers_name, peft_file, prefixed
from tiny_wan import (
    LAYERS,
    RANK,
    SHAPE,
    assert_close,
    expected,
    merged,
    products,
    random_factors,
    random_weights,
    save,
)

from forcing_kv.export.checkpoint.adapter.alpha import AlphaRule
from forcing_kv.export.checkpoint.adapter.file import adapter_file, read_raw
from forcing_kv.export.checkpoint.adapter.names import ModelNames
from forcing_kv.export.checkpoint.adapter.read import read_adapters
from forcing_kv.export.checkpoint.load import CheckpointSource, load_model
from forcing_kv.runtime_trt.errors import InputError


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture(scope="module")
def factors(weights):
    return random_factors(weights)


@pytest.fixture(scope="module")
def base(weights, tmp_path_factory):
    return save(tmp_path_factory.mktemp("base"), weights, "base.safetensors")


def pairs(factors, down, up, rename=lambda layer: layer):
    named = {}
    for layer, (a, b) in factors.items():
        named[rename(layer) + down] = a
        named[rename(layer) + up] = b
    return named


def alphas(factors, alpha, rename=lambda layer: layer):
    return {f"{rename(layer)}.alpha": torch.tensor(alpha) for layer in factors}


def theirs(layer):
    return diffusers_name(f"{layer}.weight").removesuffix(".weight")


def flat(layer):
    return layer.replace(".", "_")


AB = (".lora_A.weight", ".lora_B.weight")
DOWN_UP = (".lora_down.weight", ".lora_up.weight")
NAMINGS = {
    "peft": lambda f: peft_file(f),
    "peft, adapter named": lambda f: peft_file(f, "default."),
    "peft, another name": lambda f: peft_file(f, "my-style."),
    "peft on diffusers": lambda f: prefixed(pairs(f, *AB, theirs), "base_model.model."),
    "diffusers": lambda f: prefixed(pairs(f, *AB, theirs), "transformer."),
    "diffusers, bare": lambda f: pairs(f, *AB, theirs),
    "comfy": lambda f: prefixed(pairs(f, *AB), "diffusion_model."),
    "comfy, down and up": lambda f: prefixed(pairs(f, *DOWN_UP), "diffusion_model."),
    "diffsynth": lambda f: prefixed(
        pairs(f, ".lora_A.default.weight", ".lora_B.default.weight"), "pipe.dit."
    ),
    "without .weight": lambda f: pairs(f, ".lora_A", ".lora_B"),
    "dotted": lambda f: pairs(f, ".lora.down.weight", ".lora.up.weight"),
    "older diffusers": lambda f: pairs(f, "_lora.down.weight", "_lora.up.weight"),
    "transformers": lambda f: pairs(
        f, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"
    ),
    "fsdp": lambda f: prefixed(pairs(f, *AB), "module._fsdp_wrapped_module."),
    "musubi": lambda f: prefixed(pairs(f, *DOWN_UP, flat), "lora_unet_"),
    "wan-fun": lambda f: prefixed(pairs(f, *DOWN_UP, flat), "lora_unet__"),
    "kohya on diffusers": lambda f: prefixed(
        pairs(f, *DOWN_UP, lambda layer: flat(theirs(layer))), "lora_transformer_"
    ),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_merges_exactly(tmp_path, base, weights, factors, naming):
    file = save(tmp_path, NAMINGS[naming](factors), "style.safetensors")
    assert_close(merged(base, file), expected(weights, products(factors)))


def test_a_single_product_is_what_float32_gives(tmp_path, base, weights, factors):
    """To the bit what PEFT merges, so that models exported before stay what they are."""
    file = save(tmp_path, peft_file(factors), "style.safetensors")
    found = merged(base, file)
    for layer, (a, b) in factors.items():
        wanted = weights[f"{layer}.weight"] + 1.0 * (b @ a)
        assert np.array_equal(found[f"{layer}.weight"], wanted.numpy()), layer


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", "base_model.model.", ""])
def test_alpha_tensors_scale_their_own_layer(tmp_path, base, weights, factors, prefix):
    rename = flat if prefix.startswith("lora") else lambda layer: layer
    tensors = pairs(factors, *DOWN_UP, rename) | alphas(factors, 2.0 * RANK, rename)
    tensors[f"{rename(LAYERS[0])}.alpha"] = torch.tensor(RANK / 2, dtype=torch.bfloat16)
    changes = products(factors, 2.0)
    changes[f"{LAYERS[0]}.weight"] /= 4
    file = save(tmp_path, prefixed(tensors, prefix), "style.safetensors")
    assert_close(merged(base, file), expected(weights, changes))


def test_lightx2v_differences_of_weights_biases_norms_and_modulation(tmp_path, base, weights):
    """`wan2.1_t2v_14b_lora_rank64_lightx2v_4step`: factors and everything else as differences."""
    torch.manual_seed(2)
    named = {
        "blocks.0.self_attn.q.diff_b": "blocks.0.self_attn.q.bias",
        "blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
        "blocks.1.norm3.diff": "blocks.1.norm3.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm3.bias",
        "blocks.1.diff_m": "blocks.1.modulation",
        "head.diff_m": "head.modulation",
        "patch_embedding.diff": "patch_embedding.weight",
        "patch_embedding.diff_b": "patch_embedding.bias",
        "head.head.diff": "head.head.weight",
    }
    other = {
        "blocks.0.modulation.diff": "blocks.0.modulation",
        "blocks.0.self_attn.k.bias.diff": "blocks.0.self_attn.k.bias",
        "blocks.0.norm3.w_norm": "blocks.0.norm3.weight",
        "blocks.0.norm3.b_norm": "blocks.0.norm3.bias",
    }
    differences = {key: torch.randn(weights[name].shape) for key, name in (named | other).items()}
    factors = random_factors(weights, ["blocks.0.self_attn.q"])
    tensors = prefixed(pairs(factors, *DOWN_UP) | differences, "diffusion_model.")
    file = save(tmp_path, tensors, "lightx2v.safetensors")
    changes = {name: differences[key].numpy() for key, name in (named | other).items()}
    assert_close(merged(base, file), expected(weights, changes | products(factors)))
    # A strength holds for differences too.
    halved = {k: v / 2 for k, v in (changes | products(factors)).items()}
    assert_close(merged(base, f"{file}:0.5"), expected(weights, halved))


def test_biases_of_lora_are_scaled_as_its_product_is(tmp_path, base, weights, factors):
    """PEFT's `lora_bias=True`: W x + b + scale (B (A x) + b')."""
    biases = {layer: torch.randn(b.shape[0]) for layer, (_, b) in factors.items()}
    tensors = peft_file(factors) | {
        f"base_model.model.{layer}.lora_B.bias": bias for layer, bias in biases.items()
    }
    save(tmp_path, tensors, "adapter_model.safetensors")
    write_config(tmp_path, lora_alpha=2 * RANK, lora_bias=True)
    changes = {f"{layer}.bias": 2 * bias.numpy() for layer, bias in biases.items()}
    assert_close(merged(base, tmp_path), expected(weights, changes | products(factors, 2.0)))


def write_config(folder, **entries):
    content = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, **entries}
    (folder / "adapter_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_and_saved_modules_take_the_place_of_the_base(
    tmp_path, base, weights, factors, bias
):
    values = {
        "blocks.0.self_attn.q.bias": torch.randn(24),
        "patch_embedding.weight": 1e-20 * torch.randn(24, 4, 1, 2, 2),
    }
    tensors = peft_file(factors) | {
        f"base_model.model.{name.replace('.bias', '.base_layer.bias')}": value
        for name, value in values.items()
    }
    save(tmp_path, tensors, "adapter_model.safetensors")
    write_config(tmp_path, bias=bias, modules_to_save=["patch_embedding"])
    found = merged(base, tmp_path)
    for name, value in values.items():
        assert np.array_equal(found[name], value.numpy()), name
    half = merged(base, f"{tmp_path}:0.5")
    for name, value in values.items():
        wanted = (weights[name].double() + value.double()) / 2
        np.testing.assert_allclose(half[name], wanted, rtol=1e-6)
    write_config(tmp_path)
    with pytest.raises(InputError, match=r"patch_embedding\.weight is a whole parameter|bias is a"):
        merged(base, tmp_path)


@pytest.mark.parametrize("axes", [5, 4, 2])
def test_convolutions_of_the_patch_embedding(tmp_path, base, weights, axes):
    """A LoCon pair, its kernel written as Conv3d, Conv2d or a matrix."""
    torch.manual_seed(3)
    down, up = torch.randn(RANK, 4, 1, 2, 2), torch.randn(24, RANK, 1, 1, 1)
    shapes = {5: (down.shape, up.shape), 4: ((RANK, 4, 2, 2), (24, RANK, 1, 1)),
              2: ((RANK, 16), (24, RANK))}[axes]  # fmt: skip
    tensors = {
        "lora_unet_patch_embedding.lora_down.weight": down.reshape(shapes[0]),
        "lora_unet_patch_embedding.lora_up.weight": up.reshape(shapes[1]),
    }
    file = save(tmp_path, tensors, "conv.safetensors")
    change = np.einsum("or,rcthw->octhw", up.numpy()[:, :, 0, 0, 0].astype(float), down.numpy())
    assert_close(merged(base, file), expected(weights, {"patch_embedding.weight": change}))
    core = torch.randn(RANK, RANK, 1, 2, 2)
    pointwise = torch.randn(RANK, 4, 1, 1, 1)
    tensors = {
        "lora_unet_patch_embedding.lora_down.weight": pointwise,
        "lora_unet_patch_embedding.lora_mid.weight": core,
        "lora_unet_patch_embedding.lora_up.weight": up,
    }
    file = save(tmp_path, tensors, "tucker.safetensors")
    change = np.einsum(
        "om,mnthw,nc->octhw",
        up.numpy()[..., 0, 0, 0],
        core.numpy(),
        pointwise.numpy()[..., 0, 0, 0],
    )
    assert_close(merged(base, file), expected(weights, {"patch_embedding.weight": change}))


LAYER = "blocks.1.ffn.0"
"""[40, 24]: neither square nor a prime."""


@pytest.mark.parametrize("whole", [(), ("w1",), ("w1", "w2"), ("w2",)])
def test_lokr(tmp_path, base, weights, whole):
    """[5 x 8, 4 x 6]; the rank is of the larger side that is of two factors, if one is."""
    torch.manual_seed(4)
    sides = {"w1": (5, 3, 4), "w2": (8, 2, 6)}
    tensors, parts = {}, {}
    for side, (rows, rank, columns) in sides.items():
        a, b = torch.randn(rows, rank), torch.randn(rank, columns)
        parts[side] = (a @ b).numpy().astype(float)
        split = {f"{side}_a": a, f"{side}_b": b}
        tensors |= {side: a @ b} if side in whole else split
    named = {f"lora_unet_blocks_1_ffn_0.lokr_{name}": value for name, value in tensors.items()}
    named["lora_unet_blocks_1_ffn_0.alpha"] = torch.tensor(3.0)
    scale = {("w1", "w2"): 1.0, ("w2",): 1.0}.get(whole, 1.5)
    change = {f"{LAYER}.weight": scale * np.kron(parts["w1"], parts["w2"])}
    file = save(tmp_path, named, "lokr.safetensors")
    assert_close(merged(base, file), expected(weights, change))


def test_peft_scales_whole_lokr_too(tmp_path, base, weights):
    w1, w2 = torch.randn(5, 4), torch.randn(8, 6)
    start = f"base_model.model.{LAYER}.lokr_"
    save(tmp_path, {f"{start}w1": w1, f"{start}w2": w2}, "adapter_model.safetensors")
    config = {"peft_type": "LOKR", "r": 8, "alpha": 16}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    change = {f"{LAYER}.weight": 2 * np.kron(w1.numpy(), w2.numpy())}
    assert_close(merged(base, tmp_path), expected(weights, change))


def test_loha(tmp_path, base, weights):
    torch.manual_seed(5)
    w = {name: torch.randn(size) for name, size in
         {"w1_a": (40, 3), "w1_b": (3, 24), "w2_a": (40, 3), "w2_b": (3, 24)}.items()}  # fmt: skip
    tensors = {f"lycoris_blocks_1_ffn_net_0_proj.hada_{name}": value for name, value in w.items()}
    tensors["lycoris_blocks_1_ffn_net_0_proj.alpha"] = torch.tensor(1.5)
    file = save(tmp_path, tensors, "loha.safetensors")
    n = {name: value.numpy().astype(float) for name, value in w.items()}
    change = 0.5 * (n["w1_a"] @ n["w1_b"]) * (n["w2_a"] @ n["w2_b"])
    assert_close(merged(base, file), expected(weights, {f"{LAYER}.weight": change}))


@pytest.mark.parametrize(
    ("suffix", "axis"),
    [
        ("lora_magnitude_vector", 1),
        ("lora_magnitude_vector.default.weight", 1),
        ("dora_scale", 1),
        ("dora_scale", 0),
    ],
)
def test_dora_keeps_lengths_of_rows_or_of_columns(tmp_path, base, weights, suffix, axis):
    """m (W + scale B A) / |W + scale B A|: PEFT by rows, LyCORIS by either as the shape says."""
    factors = random_factors(weights, [LAYER])
    lengths = torch.rand([40, 24][1 - axis]) + 0.5
    tensors = pairs(factors, *AB)
    if suffix == "dora_scale":
        lengths = lengths[:, None] if axis else lengths[None]
    tensors[f"{LAYER}.{suffix}"] = lengths
    tensors[f"{LAYER}.alpha"] = torch.tensor(2.0)
    file = save(tmp_path, tensors, "dora.safetensors")
    weight = weights[f"{LAYER}.weight"].numpy().astype(float)
    turned = weight + products(factors, 2 / RANK)[f"{LAYER}.weight"]
    lengths = lengths.numpy().reshape((-1, 1) if axis else (1, -1))
    wanted = lengths * turned / np.linalg.norm(turned, axis=axis, keepdims=True)
    change = {f"{LAYER}.weight": wanted - weight}
    assert_close(merged(base, file), expected(weights, change))
    half = {f"{LAYER}.weight": (wanted - weight) / 2}
    assert_close(merged(base, f"{file}:0.5"), expected(weights, half))


# Several, and where they stand -----------------------------------------------------------------


def test_several_adapters_add_up_in_any_order(tmp_path, base, weights, factors):
    one = save(tmp_path, peft_file(factors), "one.safetensors")
    other = random_factors(weights, LAYERS[:2], rank=2)
    two = save(tmp_path, prefixed(pairs(other, *DOWN_UP), "diffusion_model."), "two.safetensors")
    dora = peft_file(random_factors(weights, [LAYER])) | {
        f"base_model.model.{LAYER}.lora_magnitude_vector": torch.ones(40)
    }
    three = save(tmp_path, dora, "three.safetensors")
    found = merged(base, f"{one}:0.5", f"{two}:-2", three)
    for order in ((three, f"{two}:-2", f"{one}:0.5"), (f"{two}:-2", three, f"{one}:0.5")):
        again = merged(base, *order)
        assert all(np.array_equal(found[name], again[name]) for name in found)
    change = products(factors, 0.5)
    for name, value in products(other, -2.0).items():
        change[name] = change[name] + value
    alone = merged(base, three)[f"{LAYER}.weight"] - weights[f"{LAYER}.weight"].numpy()
    change[f"{LAYER}.weight"] = change[f"{LAYER}.weight"] + alone
    assert_close(found, expected(weights, change))


def test_sums_that_lose_digits_do_not_depend_on_the_order(tmp_path, base):
    name = "blocks.0.norm3"
    files = [save(tmp_path, {f"{name}.diff": torch.ones(24)}, f"{i}.safetensors") for i in range(3)]
    given = [f"{file}:{strength}" for file, strength in zip(files, (1e17, -1e17, 1), strict=True)]
    found = [merged(base, *order)[f"{name}.weight"] for order in itertools.permutations(given)]
    assert all(np.array_equal(found[0], other) for other in found)


def test_a_float64_base_is_rounded_once(tmp_path, weights, factors):
    precise = {name: value.double() * (1 + 1e-8) for name, value in weights.items()}
    base = save(tmp_path, precise, "precise.safetensors")
    found = merged(base, save(tmp_path, peft_file(factors), "style.safetensors"))
    for layer, (a, b) in factors.items():
        wanted = (precise[f"{layer}.weight"] + (b @ a).double()).float()
        assert np.array_equal(found[f"{layer}.weight"], wanted.numpy()), layer


def test_folders_of_peft_and_diffusers(tmp_path, base, weights, factors):
    wanted = expected(weights, products(factors))
    for name in (
        "adapter_model.safetensors",
        "pytorch_lora_weights.safetensors",
        "mine.safetensors",
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        save(folder, NAMINGS["diffusers"](factors), name)
        assert_close(merged(base, folder), wanted)
    torch.save(peft_file(factors), tmp_path / "adapter_model.bin")
    assert_close(merged(base, tmp_path), wanted)
    save(tmp_path, peft_file(factors), "adapter_model.safetensors")
    assert adapter_file(tmp_path).weights.name == "adapter_model.safetensors"
    save(tmp_path, peft_file(factors), "pytorch_lora_weights.safetensors")
    with pytest.raises(InputError, match="name the file"):
        adapter_file(tmp_path)
    with pytest.raises(InputError, match="no such adapter file"):
        adapter_file(tmp_path / "nothing")


@pytest.mark.parametrize(
    "nest",
    [
        lambda t: {"generator_lora": t, "critic_lora": {}, "step": torch.tensor(7)},
        lambda t: {"generator_lora": t, "critic_lora": {"x.lora_A.weight": torch.ones(1)}},
        lambda t: {"state_dict": t, "epoch": 3},
        lambda t: {"model": {"lora": t}, "optimizer": {}},
        lambda t: {"module": {"state_dict": t}},
        lambda t: {"anything": t},
        lambda t: t,
    ],
)
def test_nested_adapters_are_found(tmp_path, base, weights, factors, nest):
    torch.save(nest(peft_file(factors)), tmp_path / "lora.pt")
    assert_close(merged(base, tmp_path / "lora.pt"), expected(weights, products(factors)))


def test_adapters_in_several_places_are_not_guessed_at(tmp_path, base, factors):
    tensors = peft_file(factors)
    for content in ({"a": tensors, "b": tensors}, {"lora": tensors, **tensors}):
        torch.save(content, tmp_path / "lora.pt")
        with pytest.raises(InputError, match="several places"):
            read_raw(tmp_path / "lora.pt")
    loop = {}
    loop["state_dict"] = loop
    torch.save(loop, tmp_path / "loop.pt")
    with pytest.raises(InputError, match="holds no LoRA factors"):
        merged(base, tmp_path / "loop.pt")


def test_a_colon_in_a_name_that_exists_wins(tmp_path, factors):
    file = save(tmp_path, peft_file(factors), "style:0.5")
    assert adapter_file(f"{file}").strength == 1
    assert adapter_file(f"{file}:0.25").strength == 0.25
    for strength in ("nan", "inf", "", "half", "1e999"):
        with pytest.raises(InputError, match="no finite strength"):
            adapter_file(f"{file}:{strength}")


def test_peft_checkpoints_with_an_adapter_inside(tmp_path, base, weights, factors):
    """`cmgrpo_raven_full.pt`: the base under `base_layer`, the adapter beside it."""
    full = {}
    for name, value in weights.items():
        layer, _, kind = name.rpartition(".")
        full[f"{layer}.base_layer.{kind}" if layer in factors else name] = value
    torch.save(
        prefixed(full, "base_model.model.") | peft_file(factors, "default."), tmp_path / "f.pt"
    )
    assert_close(merged(tmp_path / "f.pt"), expected(weights, products(factors)))
    file = save(tmp_path, peft_file(factors), "style.safetensors")
    with pytest.raises(InputError, match="holds an adapter already"):
        merged(tmp_path / "f.pt", file)
    with pytest.raises(InputError, match="is an adapter; give its base"):
        merged(file)


def test_flat_names_are_unambiguous():
    names = ModelNames.of(SHAPE)
    assert all(len(modules) == 1 for modules in names._flattened.values())


def test_low_precision_factors_are_multiplied_in_float32(tmp_path, weights, factors):
    """And land in a bfloat16 model as its nearest numbers."""
    base = save(tmp_path, {k: v.bfloat16() for k, v in weights.items()}, "b.safetensors")
    low = {layer: (a.bfloat16(), b.bfloat16()) for layer, (a, b) in factors.items()}
    file = save(tmp_path, peft_file(low), "low.safetensors")
    source = CheckpointSource(base, adapters=(adapter_file(file),))
    found = load_model(source, SHAPE, "bfloat16").state_dict()
    for layer, (a, b) in low.items():
        name = f"{layer}.weight"
        wanted = weights[name].bfloat16().float() + b.float() @ a.float()
        assert torch.equal(found[name], wanted.to(found[name].dtype)), name


def test_reading_looks_at_shapes_alone(tmp_path, factors, monkeypatch):
    file = save(tmp_path, peft_file(factors), "style.safetensors")
    monkeypatch.setattr(torch.Tensor, "float", None)
    (adapter,) = read_adapters([adapter_file(file)], AlphaRule(), ModelNames.of(SHAPE))
    assert set(adapter.updates) == {f"{layer}.weight" for layer in LAYERS}
