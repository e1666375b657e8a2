"""Writers: a growing file can be watched, the finished one is whole, a failed one is not there."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.tools.run.frame_rate import LEAST, MOST, parse_rate, rate_text
from forcing_kv.tools.run.preview import Preview, check_preview, contact_sheet
from forcing_kv.tools.run.video import open_writer

LATENTS = np.zeros((3, 16, 2, 2), np.float32)


def frames(count, value=0):
    made = np.full((count, 32, 48, 3), value, np.uint8)
    made[:, :, : 24 + value % 8] = 255 - value
    return made


def count_frames(path):
    with av.open(str(path)) as video:
        return sum(1 for _ in video.decode(video=0))


def test_frames_can_be_watched_while_they_are_written(tmp_path):
    out = tmp_path / "v.mp4"
    with open_writer(out, fps=16) as writer:
        writer.write(LATENTS, frames(12))
        writer.write(LATENTS, frames(12, 40))
        writer.write(LATENTS, frames(12, 80))
        assert not out.exists()
        assert count_frames(writer.growing) >= 12
    assert [file.name for file in tmp_path.iterdir()] == ["v.mp4"]
    assert count_frames(out) == 36
    with av.open(str(out)) as video:
        assert float(video.duration / av.time_base) == pytest.approx(36 / 16, abs=0.1)


@pytest.mark.parametrize(
    "rate", ["24", "23.976", "30000/1001", "31/2", "1000", "0.1", "999983/99991"]
)
def test_an_mp4_holds_its_rate_exactly(tmp_path, rate):
    wanted = parse_rate("--fps", rate)
    with open_writer(tmp_path / "v.mp4", wanted) as writer:
        for value in range(4):  # More than a fragment, which is joined afterwards.
            writer.write(LATENTS, frames(12, value))
    with av.open(str(tmp_path / "v.mp4")) as video:
        assert video.streams.video[0].average_rate == wanted
        times = [frame.pts * frame.time_base for frame in video.decode(video=0)]
    assert times == [place / wanted for place in range(48)]


@pytest.mark.parametrize(
    ("text", "rate", "shown"),
    [
        ("24", Fraction(24), "24"),
        (" 24/1 ", Fraction(24), "24"),
        ("25.00", Fraction(25), "25"),
        ("23.976", Fraction(24000, 1001), "23.976 (24000/1001)"),
        ("23.98", Fraction(24000, 1001), "23.976 (24000/1001)"),
        ("23.976024", Fraction(24000, 1001), "23.976 (24000/1001)"),
        ("29.97", Fraction(30000, 1001), "29.97 (30000/1001)"),
        ("59.94", Fraction(60000, 1001), "59.94 (60000/1001)"),
        ("119.88", Fraction(120000, 1001), "119.88 (120000/1001)"),
        ("12.5", Fraction(25, 2), "12.5 (25/2)"),
        ("16.6667", Fraction(50, 3), "16.667 (50/3)"),
        ("29.9", Fraction(299, 10), "29.9 (299/10)"),
        (".5", Fraction(1, 2), "0.5 (1/2)"),
    ],
)
def test_rates_are_read_and_shown_as_people_write_them(text, rate, shown):
    assert parse_rate("--fps", text) == rate
    assert rate_text(rate) == shown
    assert parse_rate("--fps", str(rate)) == rate


@pytest.mark.parametrize(
    "text",
    [
        "0", "-1", "-24", "nan", "inf", "3e9", "1e1", "3000000000", "1001", "0.01", "1/0", "0/1",
        "9999999/999999", "24/", "24fps", "", "٢٤", "9" * 5000, "24\x00", "0x18",
    ],
)  # fmt: skip
def test_other_rates_are_refused_with_the_range(text):
    with pytest.raises(
        InputError, match=r"--fps is .*; give 0\.1 to 1000 frames .*30000/1001"
    ) as e:
        parse_rate("--fps", text)
    assert len(str(e.value)) < 200
    assert str(e.value).isprintable()


@given(st.fractions(LEAST, MOST, max_denominator=1001).filter(lambda rate: rate.numerator < 10**6))
def test_a_rate_that_is_written_out_is_itself(rate):
    assert parse_rate("--fps", str(rate)) == rate
    if round(rate, 1) == rate:
        assert parse_rate("--fps", str(float(rate))) == rate


def test_a_gif_is_not_made_faster_than_it_plays(tmp_path):
    with (
        pytest.raises(InputError, match=r"at most 50 frames per second.*mp4"),
        open_writer(tmp_path / "v.gif", Fraction(60)),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a:b.mp4", "%d.gif", "-x.mp4", os.fsdecode(b"\xff.mp4")])
def test_every_name_is_a_file_here(tmp_path, monkeypatch, name):
    """And neither a URL nor a pattern to FFmpeg."""
    monkeypatch.chdir(tmp_path)
    with open_writer(Path(name), fps=16) as writer:
        writer.write(LATENTS, frames(3))
    assert os.listdir() == [name]  # noqa: PTH208
    with Path(name).open("rb") as file, av.open(file) as video:
        assert sum(1 for _ in video.decode(video=0)) == 3


def test_what_is_there_is_left_or_replaced_as_asked(tmp_path):
    out, others = tmp_path / "v.mp4", tmp_path / "v.partial.mp4"
    others.write_text("a user's file")
    out.write_text("an earlier one")
    with pytest.raises(InputError, match="exists already"), open_writer(out, fps=16):
        pass
    assert out.read_text() == "an earlier one"
    with open_writer(out, fps=16, force=True) as writer:
        writer.write(LATENTS, frames(3))
    assert count_frames(out) == 3
    assert others.read_text() == "a user's file"


def test_frames_larger_than_a_video_are_refused(tmp_path):
    with (
        pytest.raises(InputError, match="--scale 600 makes frames of 28800x19200 pixels"),
        open_writer(tmp_path / "v.mp4", fps=16, scale=600) as writer,
    ):
        writer.write(LATENTS, frames(3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v.npz"])
def test_a_failure_leaves_nothing(tmp_path, name):
    def fail():
        with open_writer(tmp_path / name, fps=16) as writer:
            writer.write(LATENTS, frames(3))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_preview_is_replaced_whole(tmp_path):
    from PIL import Image

    preview = Preview(tmp_path / "live.png", scale=2)
    for value in (0, 60):
        preview.show(frames(5, value))
        with Image.open(tmp_path / "live.png") as image:
            assert image.size == (4 * 48 * 2, 2 * 32 * 2)
    assert [file.name for file in tmp_path.iterdir()] == ["live.png"]
    sheet = contact_sheet(frames(5, 60))
    assert np.array_equal(sheet[32:, :48], frames(1, 60)[0])
    assert not sheet[32:, 48:].any()


def test_preview_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "there.png").touch()
    for path in (tmp_path / "there.png", tmp_path / "live.jpg", tmp_path / "no" / "live.png"):
        with pytest.raises(InputError, match="--live"):
            check_preview(path, force=False)
