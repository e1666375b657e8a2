"""Charts from benchmark rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from forcing_kv.tools.bench.report.rows import Row


def draw_charts(rows: Sequence[Row], folder: Path) -> Iterator[Path]:
    """For each workload and machine a bar chart of denoiser FPS, and line charts of latency.

    Args:
        rows: the last of every key.
        folder: existing directory that receives the charts.
    """
    good = [row for row in rows if row.status == "ok"]
    groups = dict.fromkeys(row.group for row in good if row.kind == "chunk")
    for group in groups:
        own = [row for row in good if row.group == group]
        name = "-".join(group).replace("/", "_").replace(" ", "_")
        yield _fps_chart(own, folder / f"fps-{name}.png")
        for kind, title in (("rollout", "latency"), ("growth", "growth")):
            lines = [row for row in own if row.kind == kind]
            if lines:
                yield _latency_chart(lines, folder / f"{title}-{name}.png")


def _fps_chart(rows: Sequence[Row], path: Path) -> Path:
    chunks = [row for row in rows if row.kind == "chunk"]
    figure, axes = new_figure(7, 0.9 + 0.4 * len(chunks))
    axes.barh([row.subject for row in chunks], [r.metrics["denoiser_fps"] for r in chunks])
    axes.invert_yaxis()
    axes.set_xlabel("denoiser FPS (steps + clean pass + eviction + commit)")
    axes.set_title(chunks[0].label)
    for place, row in enumerate(chunks):
        metrics = row.metrics
        fps, share = metrics["denoiser_fps"], metrics.get("share_of_bound")
        label = f" {fps:.1f}" + ("" if share is None else f", {share:.0%} of bound")
        axes.text(fps, place, label, va="center")
    # Room for the longest bar's label.
    axes.set_xlim(right=1.35 * max(row.metrics["denoiser_fps"] for row in chunks))
    return save_figure(figure, path)


def _latency_chart(rows: Sequence[Row], path: Path) -> Path:
    from matplotlib import colormaps

    figure, axes = new_figure(9, 3.5)
    colours: Any = colormaps["tab20"]
    axes.set_prop_cycle(color=colours.colors)
    for row in rows:
        axes.plot(row.metrics["chunk_ms"], label=row.subject, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("measured chunk")
    axes.set_ylabel("ms a chunk, denoiser")
    axes.set_title(rows[0].label)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return save_figure(figure, path)


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches, and its only axes."""
    # A figure made without pyplot needs no display and leaves no global state behind.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as PNG; returns its path."""
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path
