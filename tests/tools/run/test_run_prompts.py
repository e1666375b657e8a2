"""Prompts of `fkv run`: files of them, several videos, prompt switches at chunk boundaries."""

import json
import re

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.session import Session
from forcing_kv.tools.digits.text import encode_prompt
from forcing_kv.tools.run.encode_prompt import EncoderOptions, encode_texts, read_lines

THREE, FIVE = "a digit 3 moving left .", "a digit 5 moving up ."


def run(run_fkv, bundle, out, *options):
    return run_fkv("run", bundle, "--out", out, "--num-threads", 1, "--num-chunks", 3, *options)


def test_encoded_prompts_give_the_same_video_as_text(run_fkv, digits_bundle, tmp_path):
    file = tmp_path / "p.safetensors"
    assert run_fkv("encode-prompt", THREE, "--out", file).code == 0
    np.save(tmp_path / "p.npy", encode_prompt(THREE))
    made = []
    for options in (("--prompt", THREE), ("--prompt-file", file),
                    ("--prompt-file", tmp_path / "p.npy")):  # fmt: skip
        done = run(run_fkv, digits_bundle, tmp_path / "v.npz", "--force", *options)
        assert done.code == 0, done.err
        with np.load(tmp_path / "v.npz") as data:
            made.append(data["latents"])
    assert np.array_equal(made[0], made[1])
    assert np.array_equal(made[0], made[2])


def test_several_prompts_give_numbered_videos(run_fkv, digits_bundle, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{THREE}\n\n{FIVE}\n")
    done = run(run_fkv, digits_bundle, tmp_path / "v.npz",
               "--prompts", tmp_path / "prompts.txt", "--json")  # fmt: skip
    assert done.code == 0, done.err
    videos = json.loads(done.out)["videos"]
    assert [video["prompt"] for video in videos] == [THREE, FIVE]
    alone = tmp_path / "alone.npz"
    assert run(run_fkv, digits_bundle, alone, "--prompt", FIVE).code == 0
    with np.load(tmp_path / "v-001.npz") as second, np.load(alone) as wanted:
        assert np.array_equal(second["latents"], wanted["latents"])
    assert not (tmp_path / "v.npz").exists()


def test_script_switches_where_the_session_does(run_fkv, digits_bundle, tmp_path):
    """Frame 4 is inside chunk 1, so the switch waits for chunk 2, at frame 6."""
    assert run_fkv("encode-prompt", THREE, FIVE, "--out", tmp_path / "p.safetensors").code == 0
    entries = [{"frame": 0, "prompt": THREE},
               {"frame": 4, "prompt_file": "p.safetensors", "index": 1}]  # fmt: skip
    script = tmp_path / "script.jsonl"
    script.write_text("\n".join(json.dumps(entry) for entry in entries))
    done = run(run_fkv, digits_bundle, tmp_path / "v.npz", "--script", script, "--json")
    assert done.code == 0, done.err
    (switch,) = json.loads(done.out)["switches"]
    assert (switch["frame"], switch["prompt"]) == (6, FIVE)
    assert switch["latency_ms"] > 0
    assert "prompt switch at frame 6 took" in done.err
    with Session.open(digits_bundle, num_threads=1) as session:
        session.set_prompt(encode_prompt(THREE))
        wanted = [session.generate_chunk().latents for _ in range(2)]
        session.switch_prompt(encode_prompt(FIVE))
        wanted.append(session.generate_chunk().latents)
    with np.load(tmp_path / "v.npz") as data:
        assert np.array_equal(data["latents"], np.concatenate(wanted))


def test_live_preview_and_speeds_by_definition(run_fkv, digits_bundle, tmp_path):
    done = run(run_fkv, digits_bundle, tmp_path / "v.mp4", "--prompt", THREE,
               "--live", tmp_path / "live.png", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["live.png", "v.mp4"]
    record = json.loads(done.out)
    assert record["num_pixel_frames"] == 9
    assert record["fps_denoiser"] == pytest.approx(3e3 / np.median(record["denoiser_chunk_ms"]))
    assert record["fps_end_to_end"] == pytest.approx(9 / record["total_s"])
    assert "FPS denoiser only" in done.err
    with av.open(str(tmp_path / "v.mp4")) as video:
        assert video.streams.video[0].average_rate == 8


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"\xef\xbb\xbfa cat\r\n\r\na dog", ["a cat", "a dog"]),
        ("a cat\n\ufeffa dog\n \ufeff \n".encode(), ["a cat", "a dog"]),
        (
            "one\u2028two\u2029three\x0bfour\x0cfive\x85six\rseven\x1ceight\nnext".encode(),
            ["one\u2028two\u2029three\x0bfour\x0cfive\x85six\rseven\x1ceight", "next"],
        ),
        ("  ein Löwe läuft \t\n猫が走る".encode(), ["ein Löwe läuft", "猫が走る"]),
        (b"a " * 100_000, [("a " * 100_000).strip()]),
    ],
)
def test_lines_end_at_newlines_alone(tmp_path, content, lines):
    (tmp_path / "p.txt").write_bytes(content)
    assert read_lines(tmp_path / "p.txt") == lines


@given(st.lists(st.text(st.characters(exclude_characters="\n\ufeff", codec="utf-8"))))
def test_any_text_is_as_many_prompts_as_lines(tmp_path_factory, texts):
    file = tmp_path_factory.mktemp("prompts") / "p.txt"
    file.write_bytes("\n".join(texts).encode())
    wanted = [text.strip() for text in texts if text.strip()]
    if wanted:
        assert read_lines(file) == wanted
    else:
        with pytest.raises(InputError, match="holds no prompt"):
            read_lines(file)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "holds no prompt"),
        (b"\xef\xbb\xbf", "holds no prompt"),
        (b" \r\n\t\n", "holds no prompt"),
        ("a cat".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("a cat\nein Löwe".encode("latin-1"), "line 2 is not UTF-8"),
        (b"a" * ((16 << 20) + 1), "longer than 16 MB"),
    ],
)
def test_files_that_are_no_text_are_refused(tmp_path, content, told):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(InputError, match=told):
        read_lines(tmp_path / "p.txt")
    for other in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="cannot be read as text"):
            read_lines(other)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a\0cat", "U+0000 at character 2"),
        ("a cat".encode("utf-16-le").decode(), "U+0000"),
        ("\x1b[31ma cat", "U+001B"),
        ("a cat\x7f", "U+007F"),
        ("a \udcff cat", "U+DCFF"),
        ("a " * (1 << 16), "at most 65536"),
    ],
)
def test_a_prompt_that_is_no_text_is_refused_before_it_is_encoded(tmp_path, text, told):
    with pytest.raises(InputError, match=re.escape(told)) as error:
        encode_texts([THREE, text], EncoderOptions(text_encoder="nowhere"))
    assert len(str(error.value)) < 250
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompt"),
        ("[" * 100_000, "entry 1 is not JSON"),
        ('{"frame": 0, "frame": 3, "prompt": "x"}', "stands twice"),
        ('{"frame": 0, "prompt": "a \\u0000 digit"}', "U+0000"),
        ('{"frame": ' + "9" * 5000 + ', "prompt": "x"}', "beyond 64 bits"),
        ("{", "entry 1 is not JSON"),
        ('{"frame": 3, "prompt": "a digit 3 moving left ."}', "must begin with 0"),
        ('{"frame": 0, "text": "x"}', "write"),
        ('{"frame": 0}', "one of prompt and prompt_file"),
        ('{"frame": -1, "prompt": "x"}', "integers from 0 on"),
        ('{"frame": 0, "prompt_file": "no.safetensors"}', "cannot be read"),
        (f'{{"frame": 0, "prompt": "{THREE}"}}\n{{"frame": 7, "prompt": "{FIVE}"}}',
         "generate more with --num-chunks"),
    ],
)  # fmt: skip
def test_broken_scripts_are_named_and_leave_nothing(
    run_fkv, digits_bundle, tmp_path, content, message
):
    script = tmp_path / "script.jsonl"
    script.write_text(content)
    done = run(run_fkv, digits_bundle, tmp_path / "v.mp4", "--script", script)
    assert done.code == 2
    assert message in done.err
    assert list(tmp_path.iterdir()) == [script]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give one of --prompt"),
        (("--prompt", THREE, "--prompts", "x.txt"), "give one of --prompt"),
        (("--prompts", "absent.txt"), "cannot be read as text"),
        (("--prompt-file", "absent.safetensors"), "fkv encode-prompt"),
        (("--prompt-file", "absent.npz"), "no such encoded prompts; encode the prompts again"),
        (("--prompt", THREE, "--live", "x.jpg"), "--live x.jpg"),
        (("--prompt", THREE, "--decode", "vae"), "fkv add-decoder"),
        (("--prompt", THREE, "--fps", -1), "--fps is '-1'"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(run_fkv, digits_bundle, tmp_path, options, message):
    done = run(run_fkv, digits_bundle, tmp_path / "v.mp4", *options)
    assert done.code == 2
    assert message in done.err
    assert list(tmp_path.iterdir()) == []


def test_prompts_of_another_model_are_named(run_fkv, digits_bundle, tmp_path):
    np.save(tmp_path / "other.npy", np.zeros((512, 16), np.float32))
    script = tmp_path / "script.jsonl"
    script.write_text('{"frame": 0, "prompt_file": "other.npy"}')
    for options in (("--prompt-file", tmp_path / "other.npy"), ("--script", script)):
        done = run(run_fkv, digits_bundle, tmp_path / "v.npz", *options)
        assert done.code == 2
        assert "other.npy: embeddings of 512x16, but this bundle takes 8x32" in done.err
        assert not (tmp_path / "v.npz").exists()
