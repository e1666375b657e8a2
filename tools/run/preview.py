"""A picture of the latest frames, replaced while a video is being generated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.bundle.atomic.files import replaced_file
from forcing_kv.runtime_trt.errors import require
from forcing_kv.tools.run.video import check_output

COLUMNS = 4
"""Frames side by side."""


class Preview:
    """Writes every chunk's frames as one PNG, whole at any moment: look at it with any viewer.

    Args:
        path: `.png` file.
        scale: whole factor by which pixels are enlarged.
    """

    def __init__(self, path: Path, scale: int = 1) -> None:
        self._path, self._scale = path, scale
        self._image = require("PIL.Image")

    def show(self, frames: NDArray[np.uint8]) -> None:
        """Replace the picture by frames [F, height, width, 3], left to right, top to bottom."""
        sheet = contact_sheet(frames).repeat(self._scale, axis=0).repeat(self._scale, axis=1)
        with replaced_file(self._path) as file:
            self._image.fromarray(sheet).save(file, format="png")


def check_preview(path: Path, *, force: bool) -> None:
    """Refuse a preview that cannot be written, or an earlier one."""
    check_output(path, [".png"], "--live", force=force)


def contact_sheet(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames [F, height, width, 3] as one picture, `COLUMNS` in a row."""
    columns = min(COLUMNS, len(frames))
    missing = -len(frames) % columns
    padded = np.concatenate([frames, np.zeros((missing, *frames.shape[1:]), np.uint8)])
    rows = padded.reshape(-1, columns, *frames.shape[1:])
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
