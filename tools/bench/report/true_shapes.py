"""Tables and a chart of what was measured at true shapes on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, get_args

from forcing_kv.tools.bench.report.charts import new_figure, save_figure
from forcing_kv.tools.bench.report.rows import Row
from forcing_kv.tools.bench.workloads import CLIP_CHUNKS, Case, case_flop, workload

if TYPE_CHECKING:
    from rich.table import Table

CASES: Mapping[str, str] = {
    "clip": f"the first {CLIP_CHUNKS} chunks",
    "steady-chunk": "a steady chunk",
    "steady-step": "a steady denoise step",
}
"""What each case is called."""
PAPER: Mapping[tuple[str, str], float] = {("480p", "clip"): 1.50, ("1080p", "steady-step"): 2.82}
"""Published speed-ups on a GPU, means of a clip of 5 s, where they stand in the chart."""
DENSE, RESEARCH = "eager-dense", "eager-forcing-kv"
NOTE = (
    "Ratios measured on one core of a CPU, with few layers at the model's true width, heads, "
    "tokens and lengths: not a GPU's FPS. Times are CPU times, medians of the rounds. A steady "
    f"chunk is one of a long video; the first {CLIP_CHUNKS} chunks are a clip of 5 s, whose window "
    "is still filling. `inductor` ends the clean pass at the last layer's keys and values, which "
    "saves more of a model of few layers than of the whole one: the denoise steps alone are "
    "without it. The bound is the work that a subject does at the rate of a large matrix product "
    "in its dtype, on the same core in the same process. The FLOP limit is that of all layers."
)

HEADER = (
    "subject", "CPU s (low–high)", "wall s", "rounds", "over eager-dense", "…denoise steps alone",
    "over the research code's way", "TFLOP", "GFLOP/s", "of the product rate", "peak GB",
    "gate error / bound",
)  # fmt: skip


@dataclass
class Group:
    """Rows of one workload and case on one machine."""

    size: str
    dtype: str
    case: Case
    label: str
    subjects: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    """Metrics of every round."""
    gates: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def time(self, subject: str, name: str = "cpu_time_ms") -> float | None:
        """Median over the rounds; None where there is no number."""
        rounds = self.subjects.get(subject)
        return median(each[name] for each in rounds) if rounds else None

    def ratio(self, subject: str, base: str, name: str = "cpu_time_ms") -> float | None:
        """How many times faster a subject is than another."""
        own, other = self.time(subject, name), self.time(base, name)
        return None if own is None or other is None else other / own

    @property
    def flop_limit(self) -> float:
        """Work of the dense model over that of the compressed one, all layers."""
        dense, compressed = (
            case_flop(workload("wan-1.3b", self.size, policy, "float32").config, self.case)
            for policy in ("dense", "forcing-kv")
        )
        return dense / compressed


def is_case(row: Row) -> bool:
    """Whether a row is of a case at true shapes."""
    return row.kind in get_args(Case)


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """Good rows at true shapes by workload, case and CPU; a repeated round replaces the earlier."""
    found: dict[tuple[str, ...], dict[tuple[str, int], Row]] = {}
    for row in rows:
        if is_case(row) and row.status == "ok":
            cpu = str(row.environment.get("cpu"))
            key = (
                row.workload["model"],
                row.workload["size"],
                row.workload["dtype"],
                row.kind,
                cpu,
            )
            found.setdefault(key, {})[row.subject, row.run.get("round", 0)] = row
    groups = []
    for (model, size, dtype, case, cpu), own in found.items():
        label = f"{model} {size} {dtype}, {CASES[case]} on one core of {cpu}"
        group = Group(size, dtype, case, label)  # type: ignore[arg-type]
        for (subject, _), row in own.items():
            group.subjects.setdefault(subject, []).append(row.metrics)
            group.gates[subject] = row.gate or {}
        groups.append(group)
    return groups


def case_cells(group: Group) -> Iterator[list[str]]:
    """A line under `HEADER` for each subject."""
    for subject, rounds in group.subjects.items():
        times = sorted(each["cpu_time_ms"] / 1e3 for each in rounds)
        gate, last = group.gates[subject], rounds[-1]
        yield [
            subject,
            f"{median(times):.1f} ({times[0]:.1f}–{times[-1]:.1f})",
            f"{median(each['wall_ms'] for each in rounds) / 1e3:.1f}",
            str(len(rounds)),
            _times(group.ratio(subject, DENSE)),
            _times(group.ratio(subject, DENSE, "steps_cpu_ms")),
            _times(group.ratio(subject, RESEARCH)),
            f"{last['tflop']:.2f}",
            f"{median(each['gflops'] for each in rounds):.1f}",
            f"{median(each['share_of_bound'] for each in rounds):.0%}",
            f"{min(each['memory']['process_peak_nbytes'] for each in rounds) / 1e9:.2f}",
            f"{gate.get('error', 0):.1e} / {gate.get('bound', 0):.1e}",
        ]


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def case_tables(rows: Sequence[Row]) -> Iterator[tuple[str, list[list[str]]]]:
    """A title and a table, header first, for each group."""
    for group in groups_of(rows):
        paper = PAPER.get((group.size, group.case))
        published = "" if paper is None else f", published on a GPU {paper:.2f}x"
        title = f"{group.label} (FLOP limit {group.flop_limit:.2f}x{published})"
        yield title, [list(HEADER), *case_cells(group)]


_SHOWN = (0, 1, 3, 4, 5, 6, 9, 10)
"""Columns that a terminal has room for."""


def terminal_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """The tables for a terminal."""
    from rich.table import Table

    for title, (header, *lines) in case_tables(rows):
        made = Table(*(header[i] for i in _SHOWN), title=title, title_justify="left")
        for line in lines:
            made.add_row(*(line[i] for i in _SHOWN))
        yield made


_DRAWN = ("eager-forcing-kv", "operators", "onnxruntime", "inductor")


def draw_speed_ups(rows: Sequence[Row], folder: Path) -> Iterator[Path]:
    """A chart for each dtype: speed-up over eager-dense by size and case, beside its limits."""
    groups = [group for group in groups_of(rows) if group.time(DENSE) is not None]
    for dtype in dict.fromkeys(group.dtype for group in groups):
        own = [group for group in groups if group.dtype == dtype]
        own.sort(
            key=lambda group: (int(group.size.partition("p")[0].partition("x")[0]), group.case)
        )
        yield _chart(own, folder / f"true-shapes-{dtype}.png", dtype)


def _chart(groups: Sequence[Group], path: Path, dtype: str) -> Path:
    figure, axes = new_figure(5 + 1.8 * len(groups), 4.5)
    width = 0.8 / len(_DRAWN)
    for place, subject in enumerate(_DRAWN):
        ratios = [(i, group.ratio(subject, DENSE)) for i, group in enumerate(groups)]
        known = [(i - 0.4 + (place + 0.5) * width, ratio) for i, ratio in ratios if ratio]
        if known:
            bars = axes.bar(*zip(*known, strict=True), 0.9 * width, label=subject)
            axes.bar_label(bars, [_times(ratio) for _, ratio in known], fontsize=7)
    for i, group in enumerate(groups):
        limit, name = group.flop_limit, "FLOP ratio, all layers" if i == 0 else None
        axes.plot([i - 0.45, i + 0.45], [limit, limit], "k--", linewidth=1, label=name)
        axes.text(i + 0.46, limit, f"{limit:.2f}", fontsize=7, va="center")
    places = [(i, PAPER.get((group.size, group.case))) for i, group in enumerate(groups)]
    published = [(i, ratio) for i, ratio in places if ratio]
    if published:
        axes.plot(*zip(*published, strict=True), "r*", markersize=11, label="published, on a GPU")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(groups)), [f"{g.size}\n{CASES[g.case]}" for g in groups])
    axes.set_ylabel("times faster than eager-dense")
    axes.set_title(f"{dtype}: ratios of CPU time on one core, not a GPU's FPS", fontsize=10)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return save_figure(figure, path)
