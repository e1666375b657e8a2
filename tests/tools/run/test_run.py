"""`fkv run` and `fkv inspect` on a small bundle: files that appear, and mistakes that are named."""

import json
import os

import av
import numpy as np
import pytest

from forcing_kv.runtime_trt.bundle.atomic.locks import claimed

PROMPT = "a digit 3 moving left ."


def run(run_fkv, bundle, out, *options, prompt=PROMPT):
    return run_fkv(
        "run", bundle, "--out", out, "--prompt", prompt, "--num-chunks", 2, "--num-threads", 1,
        *options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["v.mp4", "v.gif"])
def test_a_video_holds_every_frame_at_the_asked_size(run_fkv, digits_bundle, tmp_path, name):
    done = run(run_fkv, digits_bundle, tmp_path / name, "--scale", 4, "--fps", 6)
    assert done.code == 0, done.err
    with av.open(str(tmp_path / name)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 6
    assert frames[0].shape == (128, 128, 3)
    assert not np.array_equal(frames[0], frames[-1])


def test_latents_and_frames_land_in_an_npz_and_follow_the_seed(run_fkv, digits_bundle, tmp_path):
    made = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / f"{name}.npz"
        assert run(run_fkv, digits_bundle, out, "--seed", seed).code == 0
        with np.load(out) as data:
            made.append(data["latents"])
            assert data["frames"].shape == (6, 32, 32, 3)
    assert made[0].shape == (6, 16, 8, 8)
    assert np.array_equal(made[0], made[1])
    assert not np.allclose(made[0], made[2])


def test_json_reports_a_time_for_every_chunk(run_fkv, digits_bundle, tmp_path):
    done = run(run_fkv, digits_bundle, tmp_path / "v.npz", "--decode", "none", "--json")
    record = json.loads(done.out)
    assert len(record["denoiser_chunk_ms"]) == 2
    assert record["backend"] == "onnxruntime"
    with np.load(tmp_path / "v.npz") as data:
        assert data.files == ["latents"]


@pytest.mark.parametrize(
    ("options", "prompt", "name", "told"),
    [
        ((), "a cat .", "v.mp4", "knows"),
        (("--fps", 0), PROMPT, "v.mp4", "--fps is '0'; give 0.1 to 1000"),
        (("--fps", "3e9"), PROMPT, "v.mp4", "--fps is '3e9'"),
        (("--fps", "nan"), PROMPT, "v.mp4", "--fps is 'nan'"),
        (("--fps", 60), PROMPT, "v.gif", "at most 50 frames per second"),
        (("--fps", "-3"), PROMPT, "v.mp4", "--fps is '-3'"),
        (("--scale", 600), PROMPT, "v.mp4", "64"),
        (("--scale", 0), PROMPT, "v.mp4", "--scale"),
        (("--scale", "1.5"), PROMPT, "v.mp4", "whole number"),
        (("--scale", "nan"), PROMPT, "v.mp4", "whole number"),
        (("--num-threads", 100000), PROMPT, "v.mp4", "for each CPU of this machine"),
        (("--seed", "-1"), PROMPT, "v.mp4", "2**64 - 1"),
        (("--seed", 2**64), PROMPT, "v.mp4", "2**64 - 1"),
        (("--seed", "1.5"), PROMPT, "v.mp4", "whole number"),
        ((), PROMPT, "v.avi", ".mp4"),
        ((), PROMPT, "missing/v.mp4", "missing is no folder; make it first"),
        (("--decode", "none"), PROMPT, "v.mp4", ".npz"),
        (("--decode", "magic"), PROMPT, "v.mp4", "magic"),
        (("--backend", "magic"), PROMPT, "v.mp4", "onnxruntime"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(
    run_fkv, digits_bundle, tmp_path, options, prompt, name, told
):
    done = run(run_fkv, digits_bundle, tmp_path / name, *options, prompt=prompt)
    assert done.code == 2
    assert told in done.err
    assert list(tmp_path.iterdir()) == []


def test_inspect_shows_the_cache_of_every_layer(run_fkv, digits_bundle):
    done = run_fkv("inspect", digits_bundle, "--json")
    assert done.code == 0, done.err
    manifest = json.loads(done.out)
    assert set(manifest["graphs"]) == {"prompt", "step", "step_steady", "evict"}
    # Layer 0: 5 heads of 4 frames; then (static 4 + dynamic 5 frames), all static, all dynamic.
    frames = 5 * 4 + (2 * 4 + 3 * 5) + 5 * 4 + 5 * 5
    assert manifest["nbytes_kv"] == 2 * frames * 16 * 32 * 4
    assert run_fkv("inspect", digits_bundle).code == 0


def test_inspect_finds_an_altered_file(run_fkv, digits_bundle, tmp_path):
    import shutil

    copy = tmp_path / "bundle"
    shutil.copytree(digits_bundle, copy)
    with (copy / "graphs" / "step.onnx").open("ab") as file:
        file.write(b"x")
    done = run_fkv("inspect", copy)
    assert done.code == 2
    assert "step.onnx" in done.err
    assert "fkv export" in done.err


def test_a_second_run_to_the_same_file_is_refused_at_once(run_fkv, digits_bundle, tmp_path):
    out = tmp_path / "v.npz"
    with claimed(out):
        done = run(run_fkv, tmp_path / "not read yet", out, "--force")
    assert done.code == 2
    assert f"v.npz: process {os.getpid()} (`" in done.err
    out.write_text("there")
    done = run(run_fkv, digits_bundle, out)
    assert done.code == 2
    assert "exists already" in done.err
    assert os.listdir(tmp_path) == ["v.npz"]  # noqa: PTH208


def test_a_video_that_is_not_finite_is_not_written_unless_asked_for(
    run_fkv, digits_bundle, tmp_path
):
    from forcing_kv.tools.digits.text import encode_prompt

    np.save(tmp_path / "p.npy", np.copysign(np.float32(3e38), encode_prompt(PROMPT)))
    words = ("run", digits_bundle, "--prompt-file", tmp_path / "p.npy", "--num-chunks", 1,
             "--num-threads", 1, "--out", tmp_path / "v.npz")  # fmt: skip
    done = run_fkv(*words)
    assert done.code == 2
    assert "Error: chunk 0: 3072 of 3072 latent values are NaN or infinite" in done.err
    assert [file.name for file in tmp_path.iterdir()] == ["p.npy"]
    assert run_fkv(*words, "--allow-non-finite").code == 0
    with np.load(tmp_path / "v.npz") as data:
        assert np.isnan(data["latents"]).all()
