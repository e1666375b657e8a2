"""Picture of a policy search: quality against cache size, coloured by predicted speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forcing_kv.runtime_trt.errors import require

_MB = 1e6


def best_by_size(candidates: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Candidates closer to dense than every smaller or equal one, smallest first.

    Args:
        candidates: entries of `policy.json` with a finite PSNR.
    """
    best: list[Mapping[str, Any]] = []
    for one in sorted(candidates, key=lambda one: (one["nbytes_kv"], -one["psnr_db"])):
        if not best or one["psnr_db"] > best[-1]["psnr_db"]:
            best.append(one)
    return best


def draw_policies(path: Path, record: Mapping[str, Any]) -> None:
    """Draw the Pareto front of a search to a PNG.

    The policies that are best at their size are joined and numbered, with a list beside; those that
    are on the front for their speed alone are ringed.

    Args:
        path: file to write.
        record: content of `policy.json`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    drawn = [one for one in record["candidates"] if one["psnr_db"] is not None]
    best = best_by_size(drawn)
    figure = Figure(figsize=(11, 5.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    points = axes.scatter(
        *_places(drawn),
        c=[one["fps_bound"] for one in drawn],
        s=28,
        cmap="viridis",
        edgecolors=["black" if one["pareto"] else "none" for one in drawn],
        zorder=2,
    )
    axes.step(*_places(best), where="post", color="0.6", linewidth=1, zorder=1)
    # Above and left of a rising curve there are no other points.
    for number, place in enumerate(zip(*_places(best), strict=True), start=1):
        axes.annotate(
            str(number), place, xytext=(-7, 7), textcoords="offset points", ha="center",
            va="center", fontsize=8, fontweight="bold",
        )  # fmt: skip
    axes.axvline(record["dense"]["nbytes_kv"] / _MB, color="firebrick", linestyle="--")
    axes.set_xlabel("K/V cache, MB (dashed: dense)")
    axes.set_ylabel("latent PSNR against dense, dB")
    axes.set_title(
        f"{record['model']['name']}: {len(record['prompts'])} prompts x {len(record['seeds'])} "
        f"seeds, {record['num_chunks']} chunks; black ring: not beaten in quality, size and speed"
    )
    rows = [
        Line2D([], [], linestyle="", label=f"{number}: {one['label']}")
        for number, one in enumerate(best, start=1)
    ]
    figure.legend(
        handles=rows, loc="outside right upper", fontsize=8, title="best at its size",
        title_fontsize=8, handlelength=0, handletextpad=0,
    )  # fmt: skip
    bar = figure.colorbar(points)
    bar.set_label(f"predicted bound on {record['device']}, FPS (denoiser only)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _places(candidates: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Sizes in MB, and PSNR."""
    sizes = [one["nbytes_kv"] / _MB for one in candidates]
    return sizes, [one["psnr_db"] for one in candidates]
