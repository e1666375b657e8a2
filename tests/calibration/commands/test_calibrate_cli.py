"""`fkv calibrate heads` on the golden weights."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import fkv

from forcing_kv.runtime_trt.bundle.heads import read_heads
from forcing_kv.runtime_trt.errors import InputError

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture
def model_options(tmp_path):
    embeds = np.load(GOLDEN / "inputs.npz")["prompt_embeds"]
    np.savez(tmp_path / "prompts.npz", first=embeds[0], second=embeds[1])
    return [
        *("--checkpoint", str(GOLDEN / "weights.safetensors")),
        *("--config", str(GOLDEN / "dense_selfforcing" / "config.json")),
        *("--prompt-embeds", str(tmp_path / "prompts.npz")),
        *("--latent-size", "8x8", "--denoise-steps", "1000,500"),
    ]


def run(*options):
    return fkv("calibrate", "heads", *options)


def test_writes_partition_and_picture(tmp_path, model_options):
    out = tmp_path / "out"
    result = run(*model_options, "--out", out, "--num-chunks", 3, "--seeds", "0,5", "--json")
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert record == json.loads((out / "heads.json").read_text())
    assert record["rollouts"]["prompts"] == ["first", "second"]
    assert record["rollouts"]["seeds"] == [0, 5]
    assert record["rollouts"]["chunks"] == [2]
    assert record["rollouts"]["steps"] == [0, 1, 2]
    assert record["stability"]["num_samples"] == 12
    assert "stability over 12 passes" in result.stderr
    assert read_heads(out / "heads.json").partition.num_heads == 4
    assert (out / "heads.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="--force"):
        run(*model_options, "--out", out)


def test_the_threshold_decides(tmp_path, model_options):
    def static_heads(threshold):
        options = ("--num-chunks", 2, "--seeds", 0, "--threshold", threshold, "--json", "--force")
        return json.loads(run(*model_options, "--out", tmp_path / "out", *options).stdout)

    assert static_heads(0)["num_dynamic"] == 0
    assert static_heads(1.01)["num_static"] == 0


def test_dry_run_writes_nothing(tmp_path, model_options):
    result = run(*model_options, "--out", tmp_path / "out", "--dry-run")
    assert "2 prompts x 2 seeds, 7 chunks each; recording chunks [6]" in result.stderr
    assert "18 past frames, whose K and V take 1.2 MB" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--seeds", "a"), "--seeds is 'a'; give integers"),
        (("--seeds", "-1"), "seed is -1"),
        (("--profile-chunks", "9"), "chunks .9. to profile"),
        (("--profile-steps", "x"), "--profile-steps is 'x'"),
        (("--denoise-steps", "1000,x"), "--denoise-steps is"),
        (("--latent-size", "8"), "give latent rows x columns such as 60x104"),
        (("--num-chunks", 1), "every head counts as static"),
        (("--window-frames", 2), "cannot hold 0 sink frames and a chunk of 3"),
        (("--dtype", "int8"), "Choose from"),
        (("--threshold", "nan"), "threshold"),
        (("--prompt", "text"), "takes no --prompt"),
        (("--prompt-embeds", GOLDEN / "inputs.npz"), "needed are finite floats of shape .16, 64."),
        (("--prompt-embeds", GOLDEN / "weights.safetensors"), "not a file of encoded prompts"),
        (("--prompt-embeds", "absent.npz"), "no such encoded prompts"),
        (("--checkpoint", "absent.pt"), "no such checkpoint"),
    ],
)
def test_bad_use_is_explained(tmp_path, model_options, options, words):
    with pytest.raises(InputError, match=words):
        run(*model_options, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, model_options):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError, match="file is not a writable folder; choose another"):
            run(*model_options, "--out", out, "--dry-run")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "nonesuch"), "there is .'digits'"),
        (("--config", "x.json"), "belong to --checkpoint"),
        (("--checkpoint", "x.pt"), "needs --prompt-embeds"),
    ],
)
def test_half_a_model_is_refused(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        run("--out", tmp_path / "out", *options)


@pytest.mark.parametrize("command", ["heads", "fp8", "policy"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--chunk-frames", 2),
        ("--latent-size", "4x4"),
        ("--weights", "ema"),
        ("--lora-alpha", 2),
        ("--lora", "x.safetensors"),
    ],
)
def test_the_shipped_model_keeps_its_own_size_and_weights(tmp_path, command, option, value):
    with pytest.raises(InputError, match=f"{option} belong to --checkpoint"):
        fkv("calibrate", command, "--out", tmp_path / "out", option, value)
    assert not (tmp_path / "out").exists()


def test_the_shipped_model_keeps_its_own_schedule(tmp_path):
    with pytest.raises(InputError, match="--chunk-frames, --denoise-steps belong to --checkpoint"):
        run("--out", tmp_path / "out", "--denoise-steps", "1000,500", "--chunk-frames", 2)
