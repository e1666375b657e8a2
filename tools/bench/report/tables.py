"""Tables from benchmark rows, with charts beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forcing_kv.tools.bench.report.charts import draw_charts
from forcing_kv.tools.bench.report.rows import Row
from forcing_kv.tools.bench.report.true_shapes import (
    NOTE,
    case_tables,
    draw_speed_ups,
    is_case,
    terminal_tables,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

BASELINE = "eager-dense"
"""The table's speed-up is against this subject on the same workload size and machine."""

RATIO_BASELINES = (
    "eager-dense", "eager-forcing-kv", "eager-grouped", "compile-dense", "compile-dense-graph",
    "compile-forcing-kv", "compile-forcing-kv-graph",
)  # fmt: skip
"""What every other subject is compared with, pair by pair."""

MIN_P99_CHUNKS = 50
"""Fewer measured chunks have no 99th percentile to speak of."""

_SPEED_UP = "Speed-up: against eager-dense on the same machine. Definitions: docs/performance.md."

Cells = list[str]
_HEADER = (
    "workload", "subject", "denoiser ms", "denoiser FPS", "steps only ms", "p99 ms",
    "CPU time ms", "KV MB", "speed-up", "gate error / bound", "of bound", "with TAE, VAE FPS",
    "growth",
)  # fmt: skip


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of every key, in order of first appearance."""
    kept: dict[tuple[str, ...], Row] = {}
    for row in rows:
        kept[row.key] = row
    return list(kept.values())


def cells(rows: Sequence[Row]) -> Iterable[Cells]:
    """One line of the table for each chunk row, and for each row without a number."""
    rows = latest(rows)
    rollouts = {row.key[1:]: row for row in rows if row.kind == "rollout"}
    decoders = {row.key[1:]: row.metrics for row in rows if row.kind == "decode"}
    growth = {row.key[1:-1]: row for row in rows if row.kind == "growth"}
    baselines = {
        row.group: row.metrics["denoiser_ms"]["median"]
        for row in rows
        if row.kind == "chunk" and row.subject == BASELINE and row.status == "ok"
    }
    for row in rows:
        if row.kind == "ops" or is_case(row):
            continue
        if row.status != "ok":
            yield [row.label, row.subject, row.status, *[""] * (len(_HEADER) - 3)]
            continue
        if row.kind != "chunk":
            continue
        metrics, gate = row.metrics, row.gate or {}
        median = metrics["denoiser_ms"]["median"]
        base, rollout = baselines.get(row.group), rollouts.get(row.key[1:])
        share = metrics.get("share_of_bound")
        yield [
            row.label,
            row.subject,
            f"{median:.2f}",
            f"{metrics['denoiser_fps']:.2f}",
            _number(metrics.get("steps_only_ms", {}).get("median"), ".2f"),
            _number(_p99(rollout), ".2f"),
            _number(metrics.get("cpu_time_ms", {}).get("median"), ".2f"),
            _number(metrics["kv_nbytes"] / 1e6, ".2f"),
            _number(None if base is None else base / median, ".2f", "x"),
            f"{gate.get('error', 0):.1e} / {gate.get('bound', 0):.1e}",
            _number(None if share is None else 100 * share, ".0f", "%"),
            _with_decoders(decoders.get(row.key[1:], {})),
            _growth(growth.get(row.key[1:-1])),
        ]


_MORE_HEADER = (
    "workload", "subject", "jitter ms", "end to end FPS", "to first latents ms", "memory GB",
    "joules a chunk", "weights s", "build s", "open s",
)  # fmt: skip


def more_cells(rows: Sequence[Row]) -> Iterator[Cells]:
    """What `cells` has no room for: one line for each subject with a number."""
    rows = latest(rows)
    found = {(row.kind, *row.key[1:]): row.metrics for row in rows if row.status == "ok"}
    for row in rows:
        if row.kind != "chunk" or row.status != "ok":
            continue
        rollout, load = (found.get((kind, *row.key[1:]), {}) for kind in ("rollout", "load"))
        memory = row.metrics.get("memory", {})
        nbytes = memory.get("device_used_nbytes", memory.get("process_peak_nbytes"))
        seconds = (load.get(f"{part}_ms") for part in ("weights", "build", "open"))
        yield [
            row.label,
            row.subject,
            _number(rollout.get("jitter_ms"), ".2f"),
            _number(rollout.get("end_to_end", {}).get("latents_fps"), ".2f"),
            _number(load.get("time_to_first_latents_ms"), ".1f"),
            _number(None if nbytes is None else nbytes / 1e9, ".2f"),
            _number(row.metrics.get("joules_per_chunk"), ".1f"),
            *(_number(None if ms is None else ms / 1e3, ".1f") for ms in seconds),
        ]


OP_HEADER = (
    "operator: implementation", "ms (p20-p80)", "TFLOP/s", "GB/s", "of bound", "correct"
)  # fmt: skip


def op_cells(row: Row) -> Cells:
    """The line of a row of kind ops under `OP_HEADER`."""
    verdict = "" if row.gate is None else "yes" if row.status == "ok" else "NO"
    metrics = row.metrics
    if not metrics:
        return [row.subject, _reason(row), "", "", "", verdict]
    time = metrics["time_ms"]
    times = f"{time['median']:.4f} ({time['p20']:.4f}-{time['p80']:.4f})"
    rates = (f"{metrics[key]:.0f}" if key in metrics else "" for key in ("tflops", "gbs"))
    share = f"{metrics['fraction_of_bound']:.0%} {metrics['bound']}" if "bound" in metrics else ""
    return [row.subject, times, *rates, share, verdict]


def _reason(row: Row) -> str:
    """Why a row has no number, in a line."""
    lines = (row.error or "").splitlines()
    return lines[0] if lines else "outside its tolerance, not timed"


def op_tables(rows: Sequence[Row]) -> Iterator[list[Cells]]:
    """A table of the operators for each workload and machine."""
    ops = [row for row in latest(rows) if row.kind == "ops"]
    for group in dict.fromkeys(row.group for row in ops):
        own = [row for row in ops if row.group == group]
        yield [[f"{own[0].label}: {OP_HEADER[0]}", *OP_HEADER[1:]], *map(op_cells, own)]


def _with_decoders(metrics: Mapping[str, Any]) -> str:
    found = [metrics.get(f"with_{name}_fps") for name in ("tae", "vae")]
    return ", ".join(_number(fps, ".2f") or "–" for fps in found) if any(found) else ""


def _p99(rollout: Row | None) -> float | None:
    if rollout is None or rollout.run.get("num_chunks", 0) < MIN_P99_CHUNKS:
        return None
    p99: float = rollout.metrics["p99_ms"]
    return p99


def ratios(rows: Sequence[Row]) -> Iterator[list[Cells]]:
    """A table for each workload: how many times faster each subject is than each baseline."""
    times: dict[tuple[str, ...], dict[str, float]] = {}
    labels = {}
    for row in latest(rows):
        if row.kind == "chunk" and row.status == "ok":
            labels[row.group] = row.label
            times.setdefault(row.group, {})[row.subject] = row.metrics["denoiser_ms"]["median"]
    for group, own in times.items():
        bases = [name for name in RATIO_BASELINES if name in own]
        if bases and len(own) > 1:
            yield [
                [f"{labels[group]}: faster than", *bases],
                *(
                    [name, *(f"{own[base] / ms:.2f}x" for base in bases)]
                    for name, ms in own.items()
                ),
            ]


def _growth(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row.metrics['growth']:.3f}x over {row.run['num_chunks']} chunks"


def table(rows: Sequence[Row]) -> RenderableType:
    """Rows for a terminal: denoiser numbers where there are any, else the metrics themselves."""
    from rich.console import Group
    from rich.table import Column, Table

    chosen = (1, 2, 3, 4, 5, 7, 8, 9, 11, 12)
    lines = list(cells(rows))
    if lines and any(row.kind == "chunk" for row in rows):
        made = Table(*(Column(_HEADER[i], no_wrap=True) for i in chosen))
        for label in dict.fromkeys(line[0] for line in lines):
            made.add_section()
            made.add_row(label, style="bold")
            for line in (line for line in lines if line[0] == label):
                made.add_row(*(line[i] for i in chosen))
        return made
    if any(is_case(row) for row in rows):
        return Group(*terminal_tables(rows))
    made = Table("workload", "subject", "kind", "metrics")
    for row in rows:
        shown = {k: v for k, v in row.metrics.items() if not isinstance(v, list)}
        made.add_row(row.label, row.subject, row.kind, ", ".join(_flat(shown)))
    return made


def write_report(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write `report.md` and its charts; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    charts = list(draw_charts(latest(rows), folder))
    charts += draw_speed_ups(rows, folder)
    failed = [f"- {row.subject} ({row.label}): {_reason(row)}"
              for row in latest(rows) if row.status != "ok"]  # fmt: skip
    text = ["# Benchmark report", "", *_environments(rows), ""]
    lines = list(cells(rows))
    if lines:
        text += [*_markdown([list(_HEADER), *lines]), "", _SPEED_UP, ""]
        text += [*_markdown([list(_MORE_HEADER), *more_cells(rows)]), ""]
    for found in (*ratios(rows), *op_tables(rows)):
        text += [*_markdown(found), ""]
    if any(is_case(row) for row in rows):
        text += ["## At true shapes on a CPU", "", NOTE, ""]
    for title, found in case_tables(rows):
        text += [f"**{title}**", "", *_markdown(found), ""]
    text += [f"![{chart.stem}]({chart.name})" for chart in charts]
    if failed:
        text += ["", "## Without a number", "", *failed]
    report = folder / "report.md"
    report.write_text("\n".join(text) + "\n")
    return [report, *charts]


def _markdown(lines: Sequence[Cells]) -> list[str]:
    """A table; the first line is its header."""
    made = ["| " + " | ".join(line) + " |" for line in lines]
    return [made[0], "|" + " --- |" * len(lines[0]), *made[1:]]


def _environments(rows: Sequence[Row]) -> list[str]:
    seen: dict[str, None] = {}
    for row in rows:
        env = row.environment
        machine = env.get("gpu") or f"{env.get('cpu')}, {env.get('threads')} thread(s)"
        versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items())
        driver = f", driver {env['driver']}" if env.get("driver") else ""
        seen[f"- {machine}{driver}; {versions}; commit {env['commit']}"] = None
    return list(seen)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _flat(metrics: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in metrics.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key} {value:g}" if isinstance(value, int | float) else f"{key} {value}"
