"""The known models, and what `fkv export` makes of its options, before any weight is read."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import fkv
from stand_ins import peft_file

from forcing_kv.export.checkpoint.files import checkpoint_sha256
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.request.presets import PRESETS, load_preset
from forcing_kv.export.request.request import ExportRequest, resolve
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import (
    ChunkShape,
    HeadPartition,
    pool_layouts,
    pool_nbytes,
)
from forcing_kv.runtime_trt.rollout.policy import CachePolicy

TINY = {"dim": 24, "ffn_dim": 16, "num_heads": 2, "num_layers": 2, "in_dim": 4, "freq_dim": 8}
TINY |= {"text_dim": 8, "text_len": 6}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A preset file, its checkpoint and a head partition."""
    preset = {"model": TINY, "latent_size": [8, 12], "policy": {"num_segments": 4}, "fps": 8}
    (tmp_path / "tiny.json").write_text(json.dumps(preset))
    shape = load_preset(str(tmp_path / "tiny.json")).model
    torch.save({"generator": CausalWanModel(shape).state_dict()}, tmp_path / "tiny.pt")
    layers = [{"static_head": [0], "dynamic_head": [1]}] * 2
    (tmp_path / "heads.json").write_text(json.dumps({"layers": layers}))
    return tmp_path


def request(tiny: Path, **changes) -> ExportRequest:
    options = {"model": str(tiny / "tiny.json"), "checkpoint": tiny / "tiny.pt"}
    return ExportRequest(**{**options, "heads": tiny / "heads.json", **changes})


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("self-forcing-1.3b", 1_418_996_800), ("krea-14b", 14_288_491_584)],
)
def test_architectures_have_the_published_size(name, parameters):
    with torch.device("meta"):
        model = CausalWanModel(PRESETS[name].model)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("name", PRESETS)
def test_presets_run_at_every_resolution(name):
    preset = PRESETS[name]
    for size in ((60, 104), (90, 160), (136, 240)):
        chunk = ChunkShape(preset.chunk_frames, *size)
        assert chunk.tokens_per_frame % preset.policy.num_segments == 0
    assert CachePolicy.dense(preset.dense_window, preset.chunk_frames, preset.dense_sink)


def test_schedules_are_the_published_ones():
    krea = PRESETS["krea-14b"].schedule
    assert krea.timesteps.tolist() == [1000, 937, 833, 625, 0]
    np.testing.assert_allclose(krea.sigmas[[1, 4]], [0.936874, 0.004980], atol=5e-7)
    raven = PRESETS["raven-1.3b"].schedule
    np.testing.assert_allclose(raven.sigmas, [1, 0.938, 0.833, 0.625], rtol=1e-7)
    forcing = PRESETS["self-forcing-1.3b"].schedule
    np.testing.assert_allclose(forcing.timesteps, [1000, 937.5, 833.3333, 625], rtol=1e-6)


@pytest.mark.parametrize(("warmup", "gigabytes"), [("exact", 3.83), ("steady", 2.56)])
def test_krea_allocates_what_its_policy_needs(warmup, gigabytes):
    """800 static and 800 dynamic heads: the cost of an exact warm-up at 480p."""
    from dataclasses import replace

    policy = replace(PRESETS["krea-14b"].policy, warmup=warmup)
    partition = HeadPartition(40, (tuple(range(20)),) * 40)
    layouts = pool_layouts(policy, partition, ChunkShape(3, 60, 104))
    assert pool_nbytes(layouts, 128, 2) == pytest.approx(gigabytes * 1e9, rel=2e-3)


def test_preset_file_gives_every_value(tiny):
    resolved = resolve(request(tiny))
    assert resolved.name == "tiny"
    assert resolved.config.chunk == ChunkShape(3, 8, 12)
    assert resolved.config.policy == CachePolicy(num_segments=4)
    assert resolved.labels.provenance["checkpoint_sha256"] == checkpoint_sha256(tiny / "tiny.pt")
    assert resolved.load().shape == resolved.config.model


def test_dense_export_takes_the_models_window(tiny):
    config = resolve(request(tiny, dense=True)).config
    assert config.policy == CachePolicy.dense(21, 3)
    assert resolve(request(tiny, dense_window=6)).config.policy == CachePolicy.dense(6, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "self-forcing"}, "'self-forcing' is unknown; did you mean self-forcing-1.3b"),
        ({"model": "krea-14b", "checkpoint": None}, "needs --checkpoint.*hf download krea"),
        ({"model": "digits"}, "--checkpoint needs --model, one of"),
        ({"checkpoint": Path("nothing.pt")}, "no such checkpoint file"),
        ({"lora": Path("nothing.pt")}, "no such adapter file"),
        ({"heads": None}, "needs --heads.*--dense"),
        ({"latent_size": (9, 12)}, "nearest sizes are 8x12"),
        ({"latent_size": (6, 10)}, "multiple of the 4 segments"),
        ({"model": "self-forcing-1.3b"}, "partition"),
        ({"dense": True, "policy_changes": {"num_segments": 2}}, "cannot be set"),
        ({"dtype": "int8"}, "allowed are"),
    ],
)
def test_contradictions_are_refused(tiny, changes, message):
    with pytest.raises(InputError, match=message):
        resolve(request(tiny, **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as a JSON model description"),
        (json.dumps({"model": TINY, "fps": "16"}), r"fps is '16'; it must be an integer"),
        (json.dumps({"model": {**TINY, "dim": 24.0}}), r"model: dim is 24\.0; .* an integer"),
        ("[]", "entry 'model'"),
        (json.dumps({"model": TINY, "speed": 1}), "unknown keys"),
        (json.dumps({"model": TINY, "policy": {"segments": 1}}), "unknown keys"),
        (json.dumps({"model": {**TINY, "model_type": "i2v"}}), "model_type is 'i2v'"),
    ],
)
def test_broken_preset_files_are_refused(tmp_path, content, message):
    (tmp_path / "broken.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_preset(str(tmp_path / "broken.json"))


def test_export_of_a_preset_writes_a_bundle_and_a_failure_writes_nothing(tiny):
    options = ["export", "--model", tiny / "tiny.json", "--checkpoint", tiny / "tiny.pt"]
    options += ["--heads", tiny / "heads.json", "--out", tiny / "bundle"]
    assert fkv(*options).exit_code == 0
    manifest = json.loads((tiny / "bundle" / "manifest.json").read_text())
    assert manifest["text_encoder"] == "umt5-xxl"
    assert manifest["decoder"] == "wan-vae"

    (tiny / "tiny.pt").write_bytes((tiny / "tiny.pt").read_bytes()[:-999])
    before = {file.name for file in tiny.iterdir()}
    with pytest.raises(InputError):
        fkv(*options[:-1], tiny / "second")
    assert {file.name for file in tiny.iterdir()} == before


def test_adapters_are_said_before_anything_is_written_and_recorded(tiny):
    """Several at once; the preset's alpha is of another file than either."""
    preset = json.loads((tiny / "tiny.json").read_text()) | {"lora": ["own.pt"], "lora_alpha": 8}
    (tiny / "tiny.json").write_text(json.dumps(preset))
    for rank, name in ((2, "own.pt"), (4, "style.pt")):
        factors = {"blocks.0.self_attn.q": (torch.randn(rank, 24), torch.randn(24, rank))}
        torch.save(peft_file(factors), tiny / name)
    words = ["export", "--model", tiny / "tiny.json", "--checkpoint", tiny / "tiny.pt", "--dense"]
    words += ["--out", tiny / "bundle", "--dry-run"]
    words += ["--lora", tiny / "own.pt", "--lora", f"{tiny / 'style.pt'}:0.5"]
    said = fkv(*words).stderr
    assert "own.pt: 1 x LoRA, alpha 8 (the preset), rank 2, scale 4; strength 1" in said
    assert "style.pt: 1 x LoRA, alpha 4 (the rank" in said
    assert "scale 1; strength 0.5" in said
    with pytest.raises(InputError, match="--lora-alpha is of one adapter"):
        fkv(*words, "--lora-alpha", 2)


def test_weights_that_are_not_finite_are_refused_unless_asked_for(tiny, monkeypatch):
    weights = torch.load(tiny / "tiny.pt", weights_only=True)
    weights["generator"]["head.head.bias"][0] = torch.inf
    torch.save(weights, tiny / "tiny.pt")
    options = ["export", "--model", tiny / "tiny.json", "--checkpoint", tiny / "tiny.pt"]
    options += ["--heads", tiny / "heads.json", "--out", tiny / "bundle"]
    with pytest.raises(InputError, match=r"tiny\.pt: tensor head\.head\.bias holds 1 NaN or"):
        fkv(*options)
    assert not (tiny / "bundle").exists()
    asked = []

    def export_bundle(model, *_, **options):
        asked.append((options["allow_non_finite"], model.head.head.bias[0].item()))
        return SimpleNamespace(digest="sha256:0")

    monkeypatch.setattr("forcing_kv.export.bundle.write.export_bundle", export_bundle)
    assert fkv(*options, "--allow-non-finite").exit_code == 0
    assert asked == [(True, torch.inf)]
