"""The result of `fkv eval` for people: a table on the terminal and curves in a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forcing_kv.runtime_trt.console import console
from forcing_kv.runtime_trt.errors import require

COLUMNS = (
    ("digit", "digit %", 100.0),
    ("direction", "start %", 100.0),
    ("displacement", "px/frame", 1.0),
    ("step_error_inside", "step err in", 1.0),
    ("step_error_across", "step err across", 1.0),
    ("position_error", "pos err", 1.0),
    ("position_error_late", "pos err late", 1.0),
    ("heading", "heading %", 100.0),
    ("phase_error", "phase err", 1.0),
    ("shape", "shape", 1.0),
    ("latent_distance", "to dense", 1.0),
)
"""(measure, heading, factor) of the table's columns."""
LOG_WIDTH = 220
"""Columns of a table that goes to a file, where nothing is to be abbreviated."""


def print_table(record: Mapping[str, Any]) -> None:
    """Print one table a length, and the goals, to stderr."""
    from rich.table import Table

    screen = console()
    if not screen.is_terminal:
        screen.width = max(screen.width, LOG_WIDTH)
    for length in ("short", "long"):
        part = record[length]
        title = f"{part['num_clips']} clips of {part['num_frames']} frames, mean ± standard error"
        table = Table(title=title)
        table.add_column("cache")
        table.add_column("KV bytes", justify="right")
        for _, heading, _ in COLUMNS:
            table.add_column(heading, justify="right")
        for row in part["rows"]:
            table.add_row(row["name"], f"{row['nbytes_kv']:,}", *_cells(row["measures"]))
        screen.print(table)
    for goal in record["goals"]:
        sign, verdict = ("≥" if goal["at_least"] else "≤"), ("met" if goal["met"] else "MISSED")
        value = f"{goal['value']:.3f} ± {goal['sem']:.3f}"
        screen.print(f"{goal['goal']}: {value} ({sign} {goal['bound']}) {verdict}")


def _cells(measures: Mapping[str, Mapping[str, float]]) -> list[str]:
    cells = []
    for name, _, factor in COLUMNS:
        digits = 1 if factor == 100 else 2
        mean, error = measures[name]["mean"] * factor, measures[name]["sem"] * factor
        cells.append(f"{mean:.{digits}f} ± {error:.{digits}f}")
    return cells


def _chunk_means(values: Sequence[float], chunk: int = 3) -> list[float]:
    return [sum(values[i : i + chunk]) / chunk for i in range(0, len(values), chunk)]


def draw_curves(record: Mapping[str, Any], path: Path) -> None:
    """Draw digits and position error over 60 frames, and latent distance over 21, as a PNG."""
    require("matplotlib").use("Agg")
    plot = require("matplotlib.pyplot")
    panels = (
        ("long", "digit_by_frame", "frames read right", 1.0),
        ("long", "position_error_by_frame", "distance from the line, pixels", None),
        ("short", "latent_distance_by_frame", "latent RMS distance to dense", None),
    )
    figure, axes = plot.subplots(1, len(panels), figsize=(15, 4), layout="constrained")
    for axis, (length, key, label, top) in zip(axes, panels, strict=True):
        for row in record[length]["rows"]:
            means = _chunk_means(row[key])
            kibibytes = row["nbytes_kv"] / 1024
            axis.plot(range(len(means)), means, label=f"{row['name']}, {kibibytes:.0f} KiB")
        axis.set(xlabel="chunk", ylabel=label, ylim=(0, top))
    axes[0].legend(fontsize=8, title="cache, K and V")
    figure.savefig(path, dpi=110)
    plot.close(figure)
