"""Tables and charts from benchmark rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forcing_kv.tools.bench.rows import Row

if TYPE_CHECKING:
    from rich.table import Table

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
        _group(row): row.metrics["denoiser_ms"]["median"]
        for row in rows
        if row.kind == "chunk" and row.subject == BASELINE and row.status == "ok"
    }
    for row in rows:
        if row.status != "ok":
            yield [_label(row), row.subject, row.status, *[""] * (len(_HEADER) - 3)]
            continue
        if row.kind != "chunk":
            continue
        metrics, gate = row.metrics, row.gate or {}
        median = metrics["denoiser_ms"]["median"]
        base, rollout = baselines.get(_group(row)), rollouts.get(row.key[1:])
        share = metrics.get("share_of_bound")
        yield [
            _label(row),
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
            labels[_group(row)] = _label(row)
            times.setdefault(_group(row), {})[row.subject] = row.metrics["denoiser_ms"]["median"]
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


def table(rows: Sequence[Row]) -> Table:
    """Rows for a terminal: denoiser numbers where there are any, else the metrics themselves."""
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
    made = Table("workload", "subject", "kind", "metrics")
    for row in rows:
        shown = {k: v for k, v in row.metrics.items() if not isinstance(v, list)}
        made.add_row(_label(row), row.subject, row.kind, ", ".join(_flat(shown)))
    return made


def write_report(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write `report.md` and its charts; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    charts = list(_charts(rows, folder))
    lines = _markdown([list(_HEADER), *cells(rows)])
    failed = [f"- {row.subject} ({_label(row)}): {(row.error or '').splitlines()[0]}"
              for row in latest(rows) if row.status != "ok"]  # fmt: skip
    text = ["# Benchmark report", "", *_environments(rows), "", *lines, ""]
    text += [_SPEED_UP, ""]
    for found in ratios(rows):
        text += [*_markdown(found), ""]
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


def _charts(rows: Sequence[Row], folder: Path) -> Iterable[Path]:
    """A bar chart of denoiser FPS and a line chart of latency, for each workload and device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [row for row in latest(rows) if row.status == "ok"]
    groups = dict.fromkeys(_group(row) for row in good if row.kind == "chunk")
    for group in groups:
        own = [row for row in good if _group(row) == group]
        chunks = [row for row in own if row.kind == "chunk"]
        name = "-".join(group).replace("/", "_").replace(" ", "_")
        figure, axes = pyplot.subplots(figsize=(7, 0.5 + 0.4 * len(chunks)))
        axes.barh([row.subject for row in chunks], [r.metrics["denoiser_fps"] for r in chunks])
        axes.invert_yaxis()
        axes.set_xlabel("denoiser FPS (steps + clean pass + eviction + commit)")
        axes.set_title(_label(chunks[0]))
        for place, row in enumerate(chunks):
            axes.text(row.metrics["denoiser_fps"], place, f" {row.metrics['denoiser_fps']:.1f}",
                      va="center")  # fmt: skip
        yield _save(pyplot, figure, folder / f"fps-{name}.png")
        figure, axes = pyplot.subplots(figsize=(7, 3.5))
        for row in own:
            if row.kind == "rollout":
                axes.plot(row.metrics["chunk_ms"], label=row.subject, linewidth=1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("measured chunk")
        axes.set_ylabel("ms a chunk, denoiser")
        axes.set_title(_label(chunks[0]))
        axes.legend(fontsize=7)
        yield _save(pyplot, figure, folder / f"latency-{name}.png")


def _save(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _group(row: Row) -> tuple[str, ...]:
    work = row.workload
    values = [work.get(key) for key in ("model", "size", "dtype")]
    return tuple(str(value) for value in (*values, row.machine))


def _label(row: Row) -> str:
    model, size, dtype, device = _group(row)
    return " ".join(part for part in (model, size, dtype, device) if part not in ("native", "None"))


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _flat(metrics: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in metrics.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key} {value:g}" if isinstance(value, int | float) else f"{key} {value}"
