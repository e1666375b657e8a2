"""Clips of moving handwritten digits, made from scikit-learn's `load_digits`.

A clip shows one 16x16 digit that moves 2 pixels a frame along one axis of a 32x32 frame and bounces
off the walls. Everything random about a clip is a function of six standard normal numbers (its
*style*), so that training can couple a clip with the noise it is generated from.

Legend: F frames, M digit instances of one class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import erf, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.errors import require

FRAME_SIZE = 32
DIGIT_SIZE = 16
TRAVEL = FRAME_SIZE - DIGIT_SIZE
"""Positions of the digit's corner run from 0 to TRAVEL, both included."""
SPEED = 2
"""Pixels per frame."""
NUM_STARTS = 4
"""Start offsets along the motion: 0..3 pixels from the wall behind."""
NUM_LANES = 5
"""Start offsets across the motion: centre -2..+2 pixels."""
NUM_COORDINATES = 4
"""Principal coordinates of a digit's shape that are part of the style."""
STYLE_DIM = 2 + NUM_COORDINATES
HELDOUT_STRIDE = 5
"""Every fifth instance is kept away from training, of the model and of the digit reader."""
LEGIBLE_SHARE = 0.8
"""Share of the training instances shown to the model: the ones a reader is surest about."""
VELOCITY = {"left": (-SPEED, 0), "right": (SPEED, 0), "up": (0, -SPEED), "down": (0, SPEED)}
"""Direction -> (x, y) pixels per frame; y points down."""

Float32 = NDArray[np.float32]


def upsample_matrix(size: int, factor: int) -> NDArray[np.float64]:
    """Bicubic (Catmull-Rom) interpolation matrix [size * factor, size], edges repeated."""
    matrix = np.zeros((size * factor, size))
    for row in range(size * factor):
        centre = (row + 0.5) / factor - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            x = abs(centre - tap)
            near = 1.5 * x**3 - 2.5 * x**2 + 1
            far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
            matrix[row, min(max(tap, 0), size - 1)] += near if x <= 1 else far if x < 2 else 0.0
    return matrix


@dataclass(frozen=True)
class DigitSplit:
    """Images of a split and what they show."""

    images: Float32
    """[M, 16, 16] in 0..1."""
    labels: NDArray[np.int64]
    """[M] digit shown."""


@cache
def load_split(heldout: bool) -> DigitSplit:
    """The train or the held-out instances of `load_digits`, upsampled to 16x16."""
    raw = require("sklearn.datasets").load_digits()
    chosen = (np.arange(len(raw.target)) % HELDOUT_STRIDE == HELDOUT_STRIDE - 1) == heldout
    matrix = upsample_matrix(8, DIGIT_SIZE // 8)
    images = np.clip(matrix @ (raw.images[chosen] / 16.0) @ matrix.T, 0.0, 1.0)
    return DigitSplit(images.astype(np.float32), raw.target[chosen].astype(np.int64))


@dataclass(frozen=True)
class DigitShapes:
    """Instances of one digit and their whitened principal coordinates."""

    images: Float32
    """[M, 16, 16]."""
    coordinates: NDArray[np.float64]
    """[M, NUM_COORDINATES], each with mean 0 and variance 1."""

    def nearest(self, coordinates: NDArray[np.float64]) -> Float32:
        """The instance [16, 16] whose coordinates are nearest."""
        distance = ((self.coordinates - coordinates) ** 2).sum(1)
        return self.images[distance.argmin()]


def _margins(split: DigitSplit) -> NDArray[np.float64]:
    """How surely each instance is read by a reader that has not seen it, [M]."""
    selection = require("sklearn.model_selection")
    svc = require("sklearn.svm").SVC(C=10.0, gamma=0.02)
    flat = split.images.reshape(len(split.images), -1)
    votes = selection.cross_val_predict(
        svc, flat, split.labels, cv=selection.KFold(5), method="decision_function"
    )
    own = votes[np.arange(len(votes)), split.labels]
    votes[np.arange(len(votes)), split.labels] = -np.inf
    return np.asarray(own - votes.max(1))


def _shapes_of(images: Float32) -> DigitShapes:
    flat = images.reshape(len(images), -1).astype(np.float64)
    centred = flat - flat.mean(0)
    u, _, vt = np.linalg.svd(centred, full_matrices=False)
    u, vt = u[:, :NUM_COORDINATES], vt[:NUM_COORDINATES]
    signs = np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(1)])
    return DigitShapes(images, u * signs * sqrt(len(images)))


@cache
def training_shapes() -> tuple[DigitShapes, ...]:
    """Per digit, the legible instances of the training split."""
    split = load_split(heldout=False)
    margins = _margins(split)
    shapes = []
    for digit in range(10):
        own = np.flatnonzero(split.labels == digit)
        surest = own[np.argsort(-margins[own], kind="stable")][: int(len(own) * LEGIBLE_SHARE)]
        shapes.append(_shapes_of(split.images[np.sort(surest)]))
    return tuple(shapes)


def _quantile_index(z: float, count: int) -> int:
    """Map a standard normal number to 0..count-1, all equally likely."""
    return min(int(0.5 * (1 + erf(z / sqrt(2))) * count), count - 1)


@dataclass(frozen=True)
class Motion:
    """A bouncing line: where the digit's corner is at every frame."""

    start: tuple[int, int]
    """(x, y) corner at frame 0, pixels."""
    velocity: tuple[int, int]
    """(x, y) pixels per frame before the first bounce."""

    @classmethod
    def along(cls, direction: str, offset: int, lane: int) -> Motion:
        """`offset` pixels from the wall behind, `lane` pixels across."""
        velocity, start = VELOCITY[direction], [lane, lane]
        axis = 0 if velocity[0] else 1
        start[axis] = offset if velocity[axis] > 0 else TRAVEL - offset
        return cls((start[0], start[1]), velocity)

    def positions(self, frames: NDArray[Any]) -> NDArray[Any]:
        """Corners [F, 2] as (x, y) at the given frame indices, which need not be whole."""
        free = np.asarray(self.start) + np.asarray(frames)[:, None] * np.asarray(self.velocity)
        return bounce(free)


def bounce(free: NDArray[Any]) -> NDArray[Any]:
    """Fold positions of free motion into 0..TRAVEL by reflection at both walls."""
    phase = np.mod(free, 2 * TRAVEL)
    return np.where(phase > TRAVEL, 2 * TRAVEL - phase, phase)


def motion_of(direction: str, style: NDArray[np.float64]) -> Motion:
    """The motion that a direction and the first two numbers of a style stand for."""
    lane = TRAVEL // 2 + _quantile_index(style[1], NUM_LANES) - NUM_LANES // 2
    return Motion.along(direction, _quantile_index(style[0], NUM_STARTS), lane)


def render(image: Float32, positions: NDArray[np.int64]) -> Float32:
    """Draw a digit [16, 16] at corners [F, 2] -> video [F, 32, 32] in 0..1."""
    video = np.zeros((len(positions), FRAME_SIZE, FRAME_SIZE), np.float32)
    for frame, (x, y) in zip(video, positions, strict=True):
        frame[y : y + DIGIT_SIZE, x : x + DIGIT_SIZE] = image
    return video


def make_clip(
    digit: int, direction: str, style: NDArray[np.float64], frames: NDArray[np.int64]
) -> Float32:
    """The training clip of a caption and a style, at the given frame indices.

    Args:
        digit: 0-9.
        direction: one of `text.DIRECTIONS`.
        style: [STYLE_DIM] standard normal numbers: start, lane, shape coordinates.
        frames: absolute frame indices [F].

    Returns:
        Video [F, 32, 32] float32 in 0..1.
    """
    image = training_shapes()[digit].nearest(style[2:])
    return render(image, motion_of(direction, style).positions(frames))
