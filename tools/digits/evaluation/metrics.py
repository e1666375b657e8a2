"""What a generated clip shows, measured on its pixels: digit, direction, motion, shape.

Everything works on videos [F, 32, 32] in 0..1. A digit is located by its centre of brightness,
read from a crop around it, and its path is compared with a *bouncing line*: the legal path (see
`data.py`) that fits the first frames best, continued over the whole clip. Fitting early and
measuring late is what shows a cache: after a bounce, only it knows the motion.

Legend: F frames, M crops.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.errors import require
from forcing_kv.tools.digits import data, text

CROP = 20
"""Side of the crop that is read: a 16x16 digit whose centre of brightness is off its middle."""
FLOOR = 0.12
"""Brightness below which a pixel counts as background."""
BLANK = 6.0
"""Total brightness above FLOOR of a frame that shows nothing (real digits: over 20)."""
FIT_FRAMES = 12
"""Frames that the bouncing line is fitted on: up to and past the first bounce, at frame 6-8."""
FIT_OFFSET = 2.5
"""Largest distance, pixels, of a digit's centre of brightness from the middle of its box."""

Float = NDArray[np.float64]
Float32 = NDArray[np.float32]


def centres(video: Float32) -> Float:
    """Centre of brightness (x, y) of every frame, [F, 2] pixels; NaN where a frame is blank."""
    bright = np.clip(video.astype(np.float64) - FLOOR, 0.0, None)
    total = bright.sum((1, 2))
    total[total < BLANK] = np.nan
    axis = np.arange(video.shape[-1])
    x, y = (bright.sum(1) * axis).sum(1) / total, (bright.sum(2) * axis).sum(1) / total
    return np.stack([x, y], axis=1)


def crops(video: Float32) -> Float32:
    """A crop [F, CROP, CROP] of every frame around its centre; zeros where a frame is blank."""
    middle = np.nan_to_num(centres(video), nan=-float(CROP))
    padded = np.pad(video, ((0, 0), (CROP, CROP), (CROP, CROP)))
    corner = np.floor(middle + 0.5).astype(int) + CROP - CROP // 2
    out = np.zeros((len(video), CROP, CROP), np.float32)
    for index, (x, y) in enumerate(np.maximum(corner, 0)):
        out[index] = padded[index, y : y + CROP, x : x + CROP]
    return out


def _features(crop: Float32) -> Float32:
    """Crops [M, CROP, CROP] at the resolution of `load_digits`, [M, CROP * CROP / 4]."""
    halves = crop.reshape(len(crop), CROP // 2, 2, CROP // 2, 2).mean((2, 4))
    return np.asarray(halves.reshape(len(crop), -1), np.float32)


@cache
def digit_reader() -> Any:
    """A support vector classifier trained on the training split, shifted by up to one pixel."""
    split = data.load_split(heldout=False)
    frames = np.pad(split.images, ((0, 0), (8, 8), (8, 8)))
    shown = crops(frames)
    shifts = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]
    shifted = np.concatenate([np.roll(shown, shift, axis=(1, 2)) for shift in shifts])
    svc = require("sklearn.svm").SVC(C=10.0, gamma=0.15)
    return svc.fit(_features(shifted), np.tile(split.labels, len(shifts)))


def read_digits(video: Float32) -> NDArray[np.int64]:
    """The digit that each frame shows, [F]; -1 where a frame is blank."""
    read = digit_reader().predict(_features(crops(video))).astype(np.int64)
    return np.where(np.isnan(centres(video)[:, 0]), -1, read)


@dataclass(frozen=True)
class BouncingLine:
    """A legal path of a digit's centre."""

    motion: data.Motion
    offset: tuple[float, float]
    """Centre minus the box's corner, pixels."""

    def positions(self, frames: Float) -> Float:
        """Centres [F, 2] at frame indices that need not be whole."""
        return self.motion.positions(frames) + np.asarray(self.offset)


def fit_line(path: Float, direction: str) -> BouncingLine:
    """The bouncing line in `direction` nearest (mean absolute distance) to a path [F, 2].

    Only the first FIT_FRAMES frames count. A line is one of the start offsets of the clips plus a
    constant: where the digit's centre of brightness is in its box, and which lane it runs in.
    """
    early, lowest, best = path[:FIT_FRAMES], np.inf, None
    frames = np.arange(len(early), dtype=np.float64)
    shown = ~np.isnan(early[:, 0])
    axis = 0 if data.VELOCITY[direction][0] else 1
    middle = (data.DIGIT_SIZE - 1) / 2
    for offset in range(data.NUM_STARTS):
        motion = data.Motion.along(direction, offset, data.TRAVEL // 2)
        line = BouncingLine(motion, (0.0, 0.0)).positions(frames)
        shift = np.median((early - line)[shown], axis=0) if shown.any() else np.full(2, middle)
        shift[axis] = np.clip(shift[axis], middle - FIT_OFFSET, middle + FIT_OFFSET)
        error = float(np.nan_to_num(np.abs(early - line - shift), nan=data.TRAVEL).mean())
        if best is None or error < lowest:
            lowest, best = error, BouncingLine(motion, (float(shift[0]), float(shift[1])))
    assert best is not None
    return best


def phase_error(path: Float, line: BouncingLine) -> float:
    """Frames by which a path runs ahead of or behind its line after FIT_FRAMES, at most 4."""
    late = np.arange(min(FIT_FRAMES, len(path) - 1), len(path))
    lags = np.arange(-4.0, 4.01, 0.25)
    seen = np.nan_to_num(path[late], nan=0.0)
    errors = [np.abs(seen - line.positions(late + lag)).mean() for lag in lags]
    ties = np.flatnonzero(np.isclose(errors, min(errors)))
    return float(np.abs(lags[ties]).min())


def shape_consistency(video: Float32) -> float:
    """Mean correlation of each later frame's digit with the first frame's, best of 3x3 shifts."""
    shown = crops(video).reshape(len(video), CROP, CROP).astype(np.float64)
    first = shown[0] - shown[0].mean()
    best = np.full(len(video) - 1, -1.0)
    for shift in ((x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)):
        later = np.roll(shown[1:], shift, axis=(1, 2))
        later = later - later.mean((1, 2), keepdims=True)
        scale = np.sqrt((later**2).sum((1, 2)) * (first**2).sum()) + 1e-9
        best = np.maximum(best, (later * first).sum((1, 2)) / scale)
    return float(best.mean())


@dataclass(frozen=True)
class ClipMeasures:
    """Measures of one clip."""

    digit: float
    """Share of frames read as the asked digit."""
    direction: float
    """1 if the first chunk moves as asked, else 0."""
    displacement: float
    """Mean distance moved per frame along the asked axis, pixels; real clips: near 2."""
    step_error_inside: float
    """Mean distance between a frame-to-frame step and the line's, inside chunks, pixels."""
    step_error_across: float
    """The same from a chunk's last frame to the next one's first."""
    position_error: float
    """Mean distance from the bouncing line, pixels."""
    position_error_late: float
    """The same over the last third of the clip."""
    heading: float
    """Share of steps that go the line's way: whether bounces happen when they should."""
    phase_error: float
    """Frames by which the later bounces come early or late, at most 4."""
    shape: float
    """Correlation of the digit's shape with the first frame's, 1 is equal."""
    digit_right: NDArray[np.bool_]
    """Whether each frame is read as the asked digit, [F]."""
    distance: Float
    """Of each frame from the bouncing line, pixels, [F]."""


def _direction_right(path: Float, direction: str) -> float:
    moved = np.nan_to_num(path[min(2, len(path) - 1)] - path[0])
    velocity = np.asarray(data.VELOCITY[direction], np.float64)
    return float(np.argmax(np.abs(moved)) == np.argmax(np.abs(velocity)) and moved @ velocity > 0)


def measure_clip(video: Float32, caption: str, chunk_frames: int = 3) -> ClipMeasures:
    """Measure a video [F, 32, 32] in 0..1 that a caption asked for.

    A blank frame counts as a wrong digit and as a distance of half the frame.
    """
    digit, direction = text.parse_caption(caption)
    axis, path = 0 if data.VELOCITY[direction][0] else 1, centres(video)
    line = fit_line(path, direction)
    wanted = line.positions(np.arange(len(video), dtype=np.float64))
    lost, right = float(data.TRAVEL), read_digits(video) == digit
    error = np.nan_to_num(np.linalg.norm(path - wanted, axis=1), nan=lost)
    steps, wanted_steps = np.diff(path, axis=0), np.diff(wanted, axis=0)
    step_error = np.nan_to_num(np.linalg.norm(steps - wanted_steps, axis=1), nan=lost)
    across = np.arange(1, len(video)) % chunk_frames == 0
    moving = np.abs(wanted_steps[:, axis]) > 0.5
    agree = steps[moving, axis] * wanted_steps[moving, axis] > 0
    return ClipMeasures(
        digit=float(right.mean()),
        direction=_direction_right(path, direction),
        displacement=float(np.nan_to_num(np.abs(steps[:, axis]), nan=lost).mean()),
        step_error_inside=float(step_error[~across].mean()),
        step_error_across=float(step_error[across].mean()),
        position_error=float(error.mean()),
        position_error_late=float(error[-(len(video) // 3) :].mean()),
        heading=float(agree.mean()),
        phase_error=phase_error(path, line),
        shape=shape_consistency(video),
        digit_right=right,
        distance=error,
    )
