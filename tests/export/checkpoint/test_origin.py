"""Heads and FP8 scales of another checkpoint: heads are warned of, scales refused."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from command_line import fkv
from safetensors.torch import load_file, save_file
from stand_ins import write_sharded

from forcing_kv.calibration.model_source import load_source
from forcing_kv.calibration.options import SourceOptions
from forcing_kv.export.checkpoint.files import checkpoint_sha256
from forcing_kv.export.checkpoint.fp8_file import FP8_FORMAT, FP8_SCHEMA_VERSION
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.request.presets import load_preset
from forcing_kv.export.request.request import ExportRequest, resolve
from forcing_kv.export.request.shipped import shipped_model
from forcing_kv.runtime_trt.bundle.heads import HEADS_FORMAT, HEADS_SCHEMA_VERSION
from forcing_kv.runtime_trt.errors import InputError

CONFIG = {
    "dim": 32, "ffn_dim": 32, "num_heads": 2, "num_layers": 2, "in_dim": 4, "freq_dim": 8,
    "text_len": 4, "text_dim": 8,
}  # fmt: skip
LAYERS = [{"static_head": [0], "dynamic_head": [1]}] * 2
LINEARS = {"blocks.0.ffn.0": {"amax": 1.0}}


@pytest.fixture
def model(tmp_path):
    """A preset, its weights in a file and in shards, and an adapter."""
    preset = {"model": CONFIG, "latent_size": [4, 4], "policy": {"num_segments": 2}}
    (tmp_path / "tiny.json").write_text(json.dumps(preset))
    torch.manual_seed(0)
    weights = CausalWanModel(load_preset(str(tmp_path / "tiny.json")).model).state_dict()
    save_file(weights, tmp_path / "tiny.safetensors")
    write_sharded(tmp_path / "shards", weights, "tiny")
    save_file(
        {
            "blocks.0.self_attn.q.lora_A.weight": torch.randn(2, 32),
            "blocks.0.self_attn.q.lora_B.weight": torch.randn(32, 2),
        },
        tmp_path / "lora.safetensors",
    )
    return tmp_path


def calibrated(folder, sha256):
    """Heads and scales that say so of the checkpoint with this hash."""
    shape = load_preset(str(folder / "tiny.json")).model
    source = {"sha256": sha256, "shape": asdict(shape)}
    heads = {"format": HEADS_FORMAT, "schema_version": HEADS_SCHEMA_VERSION, "model": source}
    fp8 = {"format": FP8_FORMAT, "schema_version": FP8_SCHEMA_VERSION, "model": source}
    (folder / "heads.json").write_text(json.dumps({**heads, "layers": LAYERS}))
    (folder / "fp8.json").write_text(json.dumps({**fp8, "linears": LINEARS}))
    return {"heads": folder / "heads.json", "fp8": folder / "fp8.json"}


def request(folder, checkpoint="tiny.safetensors", **changes):
    return ExportRequest(model=str(folder / "tiny.json"), checkpoint=folder / checkpoint, **changes)


@pytest.mark.parametrize("checkpoint", ["tiny.safetensors", "shards"])
def test_files_of_the_same_checkpoint_are_taken_in_silence(model, caplog, checkpoint):
    files = calibrated(model, checkpoint_sha256(model / checkpoint))
    assert resolve(request(model, checkpoint, **files)).heads == files["heads"]
    assert not caplog.records


ADAPTED = (
    {"lora": "lora.safetensors"},
    {"lora": "lora.safetensors:0.5"},
    {"lora": "lora.safetensors", "lora_alpha": 4.0},
    {"lora": "other.safetensors"},
    {"lora": ("lora.safetensors", "other.safetensors")},
    {},
)
"""Adapters, of which none makes the model that another makes."""


def adapted(folder, changes, **files):
    """A request with paths in the folder."""
    names = changes.get("lora", ())
    names = (names,) if isinstance(names, str) else names
    lora = tuple(str(folder / name) for name in names)
    return request(folder, **{**changes, "lora": lora}, **files)


@pytest.mark.parametrize("made", range(len(ADAPTED)))
def test_an_adapter_its_strength_and_its_alpha_are_part_of_the_model(model, caplog, made):
    """Calibrating with one and exporting with another, or without, is noticed."""
    content = load_file(model / "lora.safetensors")
    save_file({key: value + 1 for key, value in content.items()}, model / "other.safetensors")
    sha256 = resolve(adapted(model, ADAPTED[made], dense=True)).model_sha256
    files = calibrated(model, sha256)
    assert (sha256 == checkpoint_sha256(model / "tiny.safetensors")) == (ADAPTED[made] == {})
    for used, changes in enumerate(ADAPTED):
        caplog.clear()
        resolve(adapted(model, changes, heads=files["heads"]))
        assert bool(caplog.records) == (used != made), changes
        asked = adapted(model, changes, dense=True, fp8=files["fp8"])
        if used == made:
            resolve(asked)
        else:
            with pytest.raises(InputError, match="with other adapters, strengths or alphas"):
                resolve(asked)


def test_the_order_of_adapters_makes_no_other_model(model):
    save_file({"blocks.0.norm3.diff": torch.ones(32)}, model / "other.safetensors")
    names = ("lora.safetensors", "other.safetensors")
    one, two = (resolve(adapted(model, {"lora": order}, dense=True)) for order in
                (names, names[::-1]))  # fmt: skip
    assert one.model_sha256 == two.model_sha256
    assert [entry["file"] for entry in one.labels.provenance["adapters"]] == list(names)


def test_calibrations_record_the_model_with_its_adapters(model):
    prompts = {"embeds": np.zeros((1, 4, 8), np.float32)}
    np.savez(model / "prompts.npz", **prompts)
    asked = adapted(model, ADAPTED[1], dense=True)
    options = SourceOptions(
        model=asked.model, checkpoint=asked.checkpoint, lora=asked.lora,
        prompt_embeds=model / "prompts.npz",
    )  # fmt: skip
    assert load_source(options).sha256 == resolve(asked).model_sha256


def test_shards_are_one_checkpoint_however_they_are_named(model, caplog):
    (index,) = (model / "shards").glob("*.index.json")
    files = calibrated(model, checkpoint_sha256(index))
    resolve(request(model, "shards", **files))
    assert not caplog.records


def test_heads_of_another_checkpoint_are_warned_of(model, caplog):
    files = calibrated(model, "ab" * 32)
    asked = request(model, heads=files["heads"])
    resolved = resolve(asked)
    (record,) = caplog.records
    found = checkpoint_sha256(model / "tiny.safetensors")
    for part in (files["heads"], "ab" * 32, model / "tiny.safetensors", found, "calibrate heads"):
        assert str(part) in record.getMessage()
    assert resolved.config.partition.static_heads == ((0,), (0,))
    caplog.clear()
    assert resolve(replace(asked, allow_other_checkpoint=True)) == resolved
    assert not caplog.records


def test_scales_of_another_checkpoint_are_refused(model):
    files = calibrated(model, "ab" * 32)
    asked = request(model, dense=True, fp8=files["fp8"])
    with pytest.raises(InputError) as caught:
        resolve(asked)
    found = checkpoint_sha256(model / "tiny.safetensors")
    for part in (files["fp8"], "ab" * 32, found, "calibrate fp8", "--allow-other-checkpoint"):
        assert str(part) in str(caught.value)
    assert resolve(replace(asked, allow_other_checkpoint=True)).fp8 == files["fp8"]


def test_scales_must_fit_the_model_whatever_is_allowed(model):
    files = calibrated(model, "ab" * 32)
    content = json.loads(files["fp8"].read_text())
    files["fp8"].write_text(json.dumps({**content, "linears": {"blocks.9.ffn.0": {"amax": 1.0}}}))
    with pytest.raises(InputError, match="unknown layers"):
        resolve(request(model, dense=True, fp8=files["fp8"], allow_other_checkpoint=True))


def test_the_command_takes_them_when_told_to(model):
    files = calibrated(model, "ab" * 32)
    words = ["export", "--model", model / "tiny.json", "--checkpoint", model / "tiny.safetensors"]
    words += ["--dense", "--fp8", files["fp8"], "--out", model / "bundle", "--dry-run"]
    with pytest.raises(InputError, match="--allow-other-checkpoint"):
        fkv(*words)
    assert fkv(*words, "--allow-other-checkpoint").exit_code == 0


def test_a_published_partition_names_no_checkpoint(model, caplog):
    (model / "published.json").write_text(json.dumps({"layers": LAYERS}))
    resolve(request(model, heads=model / "published.json"))
    assert not caplog.records


def test_shipped_files_belong_to_the_shipped_checkpoint(caplog):
    resolve(ExportRequest(fp8=shipped_model("digits").CHECKPOINT.with_name("fp8.json")))
    assert not caplog.records
