"""The measures must praise real clips and condemn broken ones."""

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from forcing_kv.tools.digits import data, text
from forcing_kv.tools.digits.evaluation import metrics

pytest.importorskip("sklearn", reason="needs scikit-learn (extra `train`)")

NUM_CLIPS = 16
FRAMES = 21


def _real_clips() -> list[tuple[str, np.ndarray]]:
    """Captions and videos [F, 32, 32] of held-out instances."""
    split, clips = data.load_split(heldout=True), []
    for index in range(NUM_CLIPS):
        direction = text.DIRECTIONS[index % 4]
        style = np.random.Generator(np.random.Philox(key=index)).standard_normal(data.STYLE_DIM)
        positions = data.motion_of(direction, style).positions(np.arange(FRAMES))
        which = 11 * index % len(split.labels)
        name = text.caption_of(int(split.labels[which]), direction)
        clips.append((name, data.render(split.images[which], positions)))
    return clips


def _measure(clips: list[tuple[str, np.ndarray]]) -> SimpleNamespace:
    """The mean of every measure."""
    rows = [asdict(metrics.measure_clip(video, name)) for name, video in clips]
    return SimpleNamespace(**{key: np.mean([row[key] for row in rows]) for key in rows[0]})


def test_real_clips_are_near_perfect() -> None:
    real = _measure(_real_clips())
    assert real.digit > 0.9
    assert real.direction == 1
    assert real.heading == 1
    assert real.shape > 0.999
    assert real.position_error < 1e-6
    assert real.step_error_inside < 1e-6
    assert real.step_error_across < 1e-6
    assert real.phase_error == 0
    assert 1.7 < real.displacement <= 2


def test_heldout_digits_are_read() -> None:
    split = data.load_split(heldout=True)
    frames = np.pad(split.images, ((0, 0), (8, 8), (8, 8)))
    assert (metrics.read_digits(frames) == split.labels).mean() > 0.97


def test_frozen_clips_do_not_move() -> None:
    frozen = _measure([(name, np.repeat(video[:1], FRAMES, 0)) for name, video in _real_clips()])
    assert frozen.displacement == 0
    assert frozen.direction == 0
    assert frozen.heading == 0
    assert frozen.step_error_inside > 1.5
    assert frozen.position_error > 3


def test_shuffled_clips_lose_the_line() -> None:
    order = np.random.Generator(np.random.Philox(key=0)).permutation(FRAMES)
    shuffled = _measure([(name, video[order]) for name, video in _real_clips()])
    assert shuffled.position_error > 1.5
    assert shuffled.heading < 0.8
    assert shuffled.step_error_across > 2


def test_a_jump_at_a_chunk_boundary_is_told_from_one_inside() -> None:
    name, video = _real_clips()[0]
    jumped = video.copy()
    jumped[15:] = np.roll(video[15:], 3, axis=1)
    measures = metrics.measure_clip(jumped, name)
    assert measures.step_error_inside < 1e-6
    assert measures.step_error_across > 0.3


def test_a_missed_bounce_shows_late() -> None:
    style = np.zeros(data.STYLE_DIM)
    frames = np.r_[np.arange(14), np.arange(12, 5, -1)]  # turns round in mid-air at frame 13
    video = data.make_clip(1, "left", style, frames)
    measures = metrics.measure_clip(video, text.caption_of(1, "left"))
    assert measures.position_error_late > 2
    assert measures.heading < 0.9
    assert measures.phase_error > 0.4


def test_a_clip_one_frame_late_has_that_phase_error() -> None:
    style = np.zeros(data.STYLE_DIM)
    frames = np.r_[np.arange(13), np.arange(12, 20)]  # one frame shown twice
    video = data.make_clip(0, "down", style, frames)
    measures = metrics.measure_clip(video, text.caption_of(0, "down"))
    assert measures.phase_error == pytest.approx(1.0, abs=0.3)


def test_another_shape_half_way_lowers_consistency() -> None:
    style, frames = np.zeros(data.STYLE_DIM), np.arange(FRAMES)
    mixed = data.make_clip(0, "up", style, frames)
    mixed[10:] = data.make_clip(1, "up", style, frames)[10:]
    assert metrics.shape_consistency(mixed) < 0.8
    assert 0.4 < metrics.measure_clip(mixed, "a digit 0 moving up .").digit < 0.6


def test_blank_frames_count_as_lost() -> None:
    blank = metrics.measure_clip(np.zeros((FRAMES, 32, 32), np.float32), "a digit 0 moving up .")
    assert blank.digit == 0
    assert blank.direction == 0
    assert blank.position_error == data.TRAVEL
