"""One rule for alpha: option > file > the preset's own adapter > rank; and it is always said."""

import itertools
import json
import math

import pytest
import torch
from stand_ins import peft_file
from tiny_wan import (
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

from forcing_kv.export.checkpoint.adapter.alpha import AlphaRule, PublishedAlpha
from forcing_kv.export.checkpoint.adapter.file import adapter_file
from forcing_kv.export.checkpoint.adapter.names import ModelNames
from forcing_kv.export.checkpoint.adapter.read import read_adapter, read_adapters
from forcing_kv.runtime_trt.errors import InputError

LAYERS = ("blocks.0.self_attn.q", "blocks.1.ffn.2")
NAMES = ModelNames.of(SHAPE)


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture(scope="module")
def factors(weights):
    return random_factors(weights, LAYERS)


def config_of(folder, **entries):
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, **entries}))


def in_tensors(folder, factors, alpha):
    own = {f"base_model.model.{layer}.alpha": torch.tensor(alpha) for layer in factors}
    return save(folder, peft_file(factors) | own, "style.safetensors")


def in_ss_metadata(folder, factors, alpha):
    entries = {"ss_network_alpha": str(alpha), "ss_network_dim": str(RANK)}
    return save(folder, peft_file(factors), "style.safetensors", **entries)


def in_plain_metadata(folder, factors, alpha):
    return save(folder, peft_file(factors), "style.safetensors", lora_alpha=str(alpha))


def in_diffusers_metadata(folder, factors, alpha):
    content = {"transformer.r": RANK, "transformer.lora_alpha": alpha, "text_encoder.lora_alpha": 1}
    entries = {"format": "pt", "lora_adapter_metadata": json.dumps(content)}
    return save(folder, peft_file(factors), "style.safetensors", **entries)


def in_config(folder, factors, alpha):
    config_of(folder, peft_type="LORA", lora_alpha=alpha)
    return save(folder, peft_file(factors), "style.safetensors")


def in_config_of_a_folder(folder, factors, alpha):
    config_of(folder, peft_type="LORA", lora_alpha=alpha)
    save(folder, peft_file(factors), "adapter_model.safetensors")
    return folder


def beside_tensors_of_pt(folder, factors, alpha):
    torch.save({"state_dict": peft_file(factors), "lora_alpha": alpha}, folder / "style.pt")
    return folder / "style.pt"


def in_config_of_pt(folder, factors, alpha):
    content = {"lora": peft_file(factors), "lora_config": {"r": RANK, "lora_alpha": alpha}}
    torch.save(content, folder / "style.pt")
    return folder / "style.pt"


def as_loose_tensor(folder, factors, alpha):
    tensors = peft_file(factors) | {"alpha": torch.tensor(float(alpha))}
    return save(folder, tensors, "style.safetensors")


PLACES = [in_tensors, in_ss_metadata, in_plain_metadata, in_diffusers_metadata, in_config]
PLACES += [in_config_of_a_folder, beside_tensors_of_pt, in_config_of_pt, as_loose_tensor]


def scales(path, rule=AlphaRule()):
    adapter = read_adapter(adapter_file(path), rule, NAMES)
    return {name: update.scale.value for name, update in adapter.updates.items()}


def everywhere(scale):
    return {f"{layer}.weight": scale for layer in LAYERS}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_the_file_states_alpha_and_the_option_wins(tmp_path, weights, factors, place):
    file = place(tmp_path, factors, 2 * RANK)
    published = PublishedAlpha(64.0 * RANK, ("style.safetensors", "style.pt", tmp_path.name))
    assert scales(file, AlphaRule(None, published)) == everywhere(2.0)
    assert scales(file, AlphaRule(RANK / 2, published)) == everywhere(0.5)
    base = save(tmp_path.parent, weights, "base.safetensors")
    found = merged(base, file, rule=AlphaRule(None, published))
    assert_close(found, expected(weights, products(factors, 2.0)))
    found = merged(base, file, rule=AlphaRule(RANK / 2, published))
    assert_close(found, expected(weights, products(factors, 0.5)))


def test_a_preset_speaks_of_the_adapter_that_it_names(tmp_path, factors):
    """256 for rank 4 would be 64 times too strong for any other one."""
    published = AlphaRule(None, PublishedAlpha(256, ("models/lora.pt",)))
    (tmp_path / "models").mkdir()
    for file, scale in (("models/lora.pt", 64.0), ("lora.pt", 1.0), ("models/other.pt", 1.0)):
        torch.save({"generator_lora": peft_file(factors)}, tmp_path / file)
        assert scales(tmp_path / file, published) == everywhere(scale), file
    adapter = read_adapter(adapter_file(tmp_path / "lora.pt"), published, NAMES)
    assert "the preset's alpha, 256, is of models/lora.pt" in " ".join(adapter.describe())


def test_nothing_stated_is_a_scale_of_one(tmp_path, factors):
    file = save(tmp_path, peft_file(factors), "style.safetensors", ss_network_alpha="Dynamic")
    assert scales(file) == everywhere(1.0)


def test_a_layers_own_tensor_counts_before_what_is_said_of_all(tmp_path, factors):
    first, second = LAYERS
    tensors = peft_file(factors) | {f"{first}.alpha": torch.tensor(RANK / 2)}
    file = save(tmp_path, tensors, "style.safetensors", ss_network_alpha=str(3 * RANK))
    assert scales(file) == {f"{first}.weight": 0.5, f"{second}.weight": 3.0}
    (line, *notes) = read_adapter(adapter_file(file), AlphaRule(), NAMES).describe()
    assert "its tensors" in line
    assert "ss_network_alpha" in line
    assert "ss_network_alpha states alpha 12, but none of" in " ".join(notes)


@pytest.mark.parametrize(
    ("one", "two"),
    list(itertools.combinations((in_ss_metadata, in_diffusers_metadata, in_config), 2)),
)
def test_statements_of_one_standing_have_to_agree(tmp_path, factors, one, two):
    metadata = {}
    for place, alpha in ((one, 8), (two, 16)):
        if place is in_config:
            config_of(tmp_path, lora_alpha=alpha)
        elif place is in_ss_metadata:
            metadata["ss_network_alpha"] = str(alpha)
        else:
            metadata["lora_adapter_metadata"] = json.dumps({"transformer.lora_alpha": alpha})
    file = save(tmp_path, peft_file(factors), "style.safetensors", **metadata)
    with pytest.raises(InputError, match=r"style\.safetensors: alpha of .*8.*16.*--lora-alpha"):
        scales(file)
    assert scales(file, AlphaRule(RANK)) == everywhere(1.0)


def test_patterns_and_rank_stabilisation_of_peft(tmp_path, factors):
    first, second = LAYERS
    entries = {"lora_alpha": 8, "alpha_pattern": {"self_attn.q": 2, r"blocks\.\d+\.ffn.0": 3}}
    config_of(tmp_path, **entries)
    file = save(tmp_path, peft_file(factors), "adapter_model.safetensors")
    assert scales(file) == {f"{first}.weight": 0.5, f"{second}.weight": 2.0}
    config_of(tmp_path, use_rslora=True, **entries)
    assert scales(file) == {f"{first}.weight": 1.0, f"{second}.weight": 4.0}
    config_of(tmp_path, r=8, lora_alpha=8, rank_pattern={"q": RANK, ".*ffn.2": RANK})
    assert scales(file) == everywhere(2.0)
    # `q` is a name of its own, not the end of one.
    config_of(tmp_path, lora_alpha=8, alpha_pattern={"attn.q": 2, "fn.2": 2})
    assert scales(file) == everywhere(2.0)


def test_patterns_match_the_names_of_the_file(tmp_path, factors):
    """diffusers' own names, where the adapter was made of its model."""
    first, _ = LAYERS
    tensors = {
        "transformer.blocks.0.attn1.to_q.lora_A.weight": factors[first][0],
        "transformer.blocks.0.attn1.to_q.lora_B.weight": factors[first][1],
    }
    content = {"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"attn1.to_q": 8}}
    metadata = {"lora_adapter_metadata": json.dumps(content)}
    file = save(tmp_path, tensors, "style.safetensors", **metadata)
    assert scales(file) == {f"{first}.weight": 2.0}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"r": 8}, "rank 8, but .* rank 4; it is of another adapter"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "the base weights were changed"),
        ({"init_lora_weights": "olora"}, "the base weights were changed"),
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'"),
        ({"use_dora": True}, "has no magnitudes"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is set"),
        ({"use_rslora": True, "lora_alpha": None}, "no alpha is stated"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"alpha_pattern": {"(": 1}}, "is wrong"),
        ({"alpha_pattern": {"(a*)*b": 1}}, "too intricate"),
        ({"alpha_pattern": {"a*b*c*d*": 1}}, "too intricate"),
    ],
)
def test_a_configuration_that_merging_would_get_wrong_is_refused(
    tmp_path, factors, entries, message
):
    config_of(tmp_path, **{"lora_alpha": 8, **entries})
    save(tmp_path, peft_file(factors), "adapter_model.safetensors")
    with pytest.raises(InputError, match=message) as refused:
        scales(tmp_path)
    assert "adapter_config.json" in str(refused.value) or "use_rslora" in str(refused.value)


@pytest.mark.parametrize("content", ["", "[", "null", "[]", "3", '{"r": 4, "r": 4}', "[" * 2000])
def test_broken_configurations_are_named(tmp_path, factors, content):
    (tmp_path / "adapter_config.json").write_text(content)
    save(tmp_path, peft_file(factors), "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        scales(tmp_path)


def test_a_configuration_of_another_file_is_not_taken(tmp_path, factors):
    config_of(tmp_path, lora_alpha=8)
    save(tmp_path, peft_file(factors), "adapter_model.safetensors")
    other = save(tmp_path, peft_file(factors), "other.safetensors")
    assert scales(tmp_path) == everywhere(2.0)
    assert scales(other) == everywhere(1.0)


@pytest.mark.parametrize("alpha", ["nan", "inf", "eight", "1e400", "[1]"])
def test_alphas_that_are_no_number_are_refused(tmp_path, factors, alpha):
    file = save(tmp_path, peft_file(factors), "a.safetensors", ss_network_alpha=alpha)
    with pytest.raises(InputError, match=r"a\.safetensors: ss_network_alpha is .* finite number"):
        scales(file)
    for value in (torch.tensor(math.nan), torch.ones(2)):
        tensors = peft_file(factors) | {f"{LAYERS[0]}.alpha": value}
        with pytest.raises(InputError, match=rf"{LAYERS[0]}\.alpha"):
            scales(save(tmp_path, tensors, "a.safetensors"))
    with pytest.raises(InputError, match="--lora-alpha is nan"):
        read_adapters((adapter_file(file),), AlphaRule(math.nan), NAMES)


def test_one_option_is_of_one_adapter(tmp_path, factors):
    files = [save(tmp_path, peft_file(factors), f"{name}.safetensors") for name in "ab"]
    given = [adapter_file(file) for file in files]
    with pytest.raises(InputError, match=r"--lora-alpha is of one adapter, but --lora names 2"):
        read_adapters(given, AlphaRule(1.0), NAMES)
    with pytest.raises(InputError, match="names this file twice"):
        read_adapters([given[0], adapter_file(f"{files[0]}:0.5")], AlphaRule(), NAMES)


def test_the_scale_is_said_and_one_far_from_one_pointed_out(tmp_path, factors):
    def said(alpha):
        file = in_ss_metadata(tmp_path, factors, alpha)
        return read_adapter(adapter_file(f"{file}:0.5"), AlphaRule(), NAMES).describe()

    (line,) = said(2 * RANK)
    for part in ("style.safetensors", "2 x LoRA", "alpha 8", "(ss_network_alpha)", "rank 4",
                 "scale 2", "strength 0.5"):  # fmt: skip
        assert part in line
    for alpha in (17 * RANK, RANK / 16, 0, -5 * RANK):
        assert "far from 1" in said(alpha)[1]
    assert len(said(4 * RANK)) == len(said(-RANK)) == 1


def test_what_the_manifest_says(tmp_path, factors):
    file = in_ss_metadata(tmp_path, factors, 2 * RANK)
    record = read_adapter(adapter_file(f"{file}:0.5"), AlphaRule(), NAMES).record
    assert len(record.pop("sha256")) == 64
    assert record == {
        "file": "style.safetensors",
        "strength": 0.5,
        "changes": [
            {
                "kind": "LoRA",
                "number": 2,
                "alpha_from": "ss_network_alpha",
                "alpha": [8, 8],
                "rank": [4, 4],
                "scale": [2, 2],
            }
        ],
    }
