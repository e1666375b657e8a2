"""Pictures of calibrations: one cell per layer and head, or per layer and linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.errors import require

_CELL_INCHES = 0.34
_MIN_CELLS = 14
_MAX_VALUE_CELLS = 60


def draw_heads(path: Path, scores_LH: NDArray[np.float64], threshold: float, title: str) -> None:
    """Draw the scores [layers, heads] to a PNG; static heads carry a dot.

    Args:
        path: file to write.
        scores_LH: score of each head; colours stop at 0 and 1.
        threshold: lowest score of a static head.
        title: first line of the title; the counts follow.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib")
    # A figure made without pyplot needs no display and leaves no global state behind.
    from matplotlib.figure import Figure

    num_layers, num_heads = scores_LH.shape
    static = scores_LH >= threshold
    width = max(num_heads, _MIN_CELLS) * _CELL_INCHES + 1.6
    height = max(num_layers, _MIN_CELLS // 2) * _CELL_INCHES + 1.5
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(scores_LH, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    layers, heads = np.nonzero(static)
    axes.scatter(heads, layers, s=26, c="white", edgecolors="black", linewidths=0.9)
    if scores_LH.size <= _MAX_VALUE_CELLS:
        _write_values(axes, scores_LH)
    axes.set(xlabel="head", ylabel="layer")
    axes.set_xticks(range(0, num_heads, _tick_step(num_heads)))
    axes.set_yticks(range(0, num_layers, _tick_step(num_layers)))
    axes.set_title(
        f"{title}\n{static.sum()} static (dot), {(~static).sum()} dynamic of {static.size} heads",
        fontsize=10 if num_heads <= 20 else 16,
    )
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("share of the mass on the last key frames")
    bar.ax.axhline(min(threshold, 1), color="red", linewidth=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def draw_linears(
    path: Path, errors_LC: NDArray[np.float64], columns: Sequence[str], title: str
) -> None:
    """Draw what rounding costs each linear layer to a PNG.

    Args:
        path: file to write.
        errors_LC: relative error [layers, linear layers of a block]; NaN where nothing is rounded.
        columns: names of a block's linear layers.
        title: of the picture.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    num_layers = len(errors_LC)
    height = max(num_layers, _MIN_CELLS // 2) * _CELL_INCHES + 1.8
    figure = Figure(figsize=(7, height), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(100 * errors_LC, cmap="cividis", aspect="auto")
    for (layer, column), error in np.ndenumerate(errors_LC):
        text = "kept" if np.isnan(error) else f"{100 * error:.1f}"
        axes.text(
            column, layer, text, fontsize=8, ha="center", va="center",
            color="black" if error > np.nanmean(errors_LC) else "white" if error > 0 else "gray",
        )  # fmt: skip
    axes.set(ylabel="layer", title=title)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(0, num_layers, _tick_step(num_layers)))
    figure.colorbar(image, ax=axes).set_label("error of the output, % (root mean square)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _tick_step(count: int) -> int:
    return 1 if count <= 20 else 5


def _write_values(axes: object, scores_LH: NDArray[np.float64]) -> None:
    """Write each score into its cell, below the dot."""
    for (layer, head), score in np.ndenumerate(scores_LH):
        axes.text(  # type: ignore[attr-defined]
            head, layer + 0.32, f"{score:.2f}", fontsize=7, ha="center", va="center",
            color="white" if score < 0.6 else "black",
        )  # fmt: skip
