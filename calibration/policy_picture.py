"""Picture of a policy search: quality against cache size, coloured by predicted speed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forcing_kv.runtime_trt.errors import require

_MB = 1e6


def draw_policies(path: Path, record: Mapping[str, Any]) -> None:
    """Draw the Pareto front of a search to a PNG.

    Args:
        path: file to write.
        record: content of `policy.json`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    drawn = [one for one in record["candidates"] if one["psnr_db"] is not None]
    front = sorted((one for one in drawn if one["pareto"]), key=lambda one: one["nbytes_kv"])
    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    points = axes.scatter(
        [one["nbytes_kv"] / _MB for one in drawn],
        [one["psnr_db"] for one in drawn],
        c=[one["fps_bound"] for one in drawn],
        s=[60 if one["pareto"] else 24 for one in drawn],
        cmap="viridis",
        zorder=3,
    )
    axes.plot(
        [one["nbytes_kv"] / _MB for one in front],
        [one["psnr_db"] for one in front],
        color="0.6",
        linewidth=1,
        label="not beaten in quality, size and speed",
    )
    for one in front:
        place = (one["nbytes_kv"] / _MB, one["psnr_db"])
        axes.annotate(one["label"], place, xytext=(5, 5), textcoords="offset points", fontsize=7)
    axes.axvline(
        record["dense"]["nbytes_kv"] / _MB, color="firebrick", linestyle="--", label="dense"
    )
    axes.set_xlabel("K/V cache, MB")
    axes.set_ylabel("latent PSNR against dense, dB")
    axes.set_title(
        f"{record['model']['name']}: {len(record['prompts'])} prompts x {len(record['seeds'])} "
        f"seeds, {record['num_chunks']} chunks"
    )
    axes.legend(loc="lower right", fontsize=8)
    bar = figure.colorbar(points)
    bar.set_label(f"predicted bound on {record['device']}, FPS (denoiser only)")
    figure.savefig(path, format="png")
