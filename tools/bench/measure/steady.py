"""Chunks in steady state: their times, the parts of them, memory and energy, as rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from time import monotonic, perf_counter, process_time
from typing import Any

from forcing_kv.tools.bench.measure.chunks import Chunks, timings
from forcing_kv.tools.bench.measure.device_counters import EnergyMeter, kv_nbytes, memory
from forcing_kv.tools.bench.measure.options import MIN_CHUNKS, MeasureOptions
from forcing_kv.tools.bench.measure.pixels import end_to_end
from forcing_kv.tools.bench.measure.summary import latency, summary
from forcing_kv.tools.bench.report.rows import Row
from forcing_kv.tools.bench.workloads import Workload, step_work

PART_WARMUP = 2
"""Untimed chunks after captured graphs are put aside to time the parts of a chunk."""


@dataclass
class SteadyChunks:
    """What chunk after chunk took."""

    memory_before: Mapping[str, int]
    memory_after: Mapping[str, int]
    parts: list[Mapping[str, float]]
    """Device times of each chunk, by part, and of the whole (`chunk`)."""
    walls: list[float]
    """Host times."""
    cpu_times: list[float]
    joules: float | None
    """Energy of all; None where the device does not tell."""

    @property
    def denoiser(self) -> list[float]:
        """Device times of whole chunks."""
        return [times["chunk"] for times in self.parts]

    @property
    def memory_growth(self) -> dict[str, int]:
        """Bytes that came to be in use from the first to the last chunk."""
        after = self.memory_after
        return {key: after[key] - self.memory_before[key] for key in after}


def run_steady(chunks: Chunks, workload: Workload, options: MeasureOptions) -> SteadyChunks:
    """Warm up to the steady state, then measure chunk after chunk."""
    chunks.session.set_prompt(workload.prompt())
    for i in range(options.warmup_chunks):
        chunks.generate(i)
    at_start = memory(options.device)
    energy, start = EnergyMeter(options.device), perf_counter()
    parts: list[Mapping[str, float]] = []
    walls: list[float] = []
    cpu_times: list[float] = []
    for i in range(options.num_chunks):
        late = perf_counter() - start > options.budget_s or monotonic() > options.deadline
        if i >= MIN_CHUNKS and late:
            break
        begin, cpu_begin = perf_counter(), process_time()
        chunk = chunks.generate(i)
        walls.append(1e3 * (perf_counter() - begin))
        cpu_times.append(1e3 * (process_time() - cpu_begin))
        parts.append(timings(chunk))
    joules = energy.joules()
    return SteadyChunks(at_start, memory(options.device), parts, walls, cpu_times, joules)


def steady_rows(
    steady: SteadyChunks,
    chunks: Chunks,
    workload: Workload,
    blank: Row,
    memory_before_open: Mapping[str, int],
) -> Iterator[Row]:
    """Rows of kind chunk, step where its parts are known, and rollout."""
    num_chunks = len(steady.parts)
    blank = replace(blank, run={**blank.run, "num_chunks": num_chunks})
    parts = _parts(chunks)
    metrics = _chunk_metrics(workload, blank, steady, parts or steady.parts)
    if parts:
        metrics["parts_from"] = f"{len(parts)} chunks more, call by call"
    joules = steady.joules
    metrics |= {
        "cpu_time_ms": summary(steady.cpu_times),
        **kv_nbytes(chunks.session),
        "memory": steady.memory_after,
        "memory_before_open": dict(memory_before_open),
        "joules_per_chunk": None if joules is None else round(joules / num_chunks, 3),
    }
    yield replace(blank, metrics=metrics)
    if "steps_only_ms" in metrics:
        yield replace(blank, kind="step", metrics=_step_metrics(workload, blank, metrics))
    wall_ms = summary(steady.walls)["median"]
    yield replace(
        blank,
        kind="rollout",
        metrics={
            **latency(steady.denoiser),
            "wall": latency(steady.walls),
            "memory_growth_nbytes": steady.memory_growth,
            "end_to_end": end_to_end(chunks.session, workload, wall_ms),
            "chunk_ms": [round(value, 3) for value in steady.denoiser],
        },
    )


def _parts(chunks: Chunks) -> list[Mapping[str, float]]:
    """Times of the parts of a few chunks more, enqueued call by call.

    A chunk that is one captured graph tells its whole time alone. Empty where none is.
    """
    backend: Any = chunks.session.backend
    if not getattr(backend, "use_graphs", False):
        return []
    backend.use_graphs = False
    try:
        made = [chunks.generate(i) for i in range(PART_WARMUP + MIN_CHUNKS)]
    finally:
        backend.use_graphs = True
    return [timings(chunk) for chunk in made[PART_WARMUP:]]


def _chunk_metrics(
    workload: Workload,
    blank: Row,
    steady: SteadyChunks,
    parts: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    """Time of a chunk, of its parts, and its bound; `parts` are the times to take those from."""
    whole = summary(steady.denoiser)
    frames, steps = workload.pixel_frames, workload.config.schedule.num_steps
    metrics: dict[str, Any] = {
        "denoiser_ms": whole,
        "denoiser_fps": round(1e3 * frames / whole["median"], 3),
        "wall_ms": summary(steady.walls),
    }
    for part in ("steps", "clean", "evict", "commit"):
        if all(part in times for times in parts):
            name = "steps_only_ms" if part == "steps" else f"{part}_ms"
            metrics[name] = summary([times[part] for times in parts])
    ideal = step_work(workload.config, fp8=workload.fp8).ideal_ms(str(blank.environment.get("gpu")))
    if ideal is not None and workload.config.dtype != "float32":
        bound = (steps + 1) * ideal
        metrics["bound_ms"] = round(bound, 3)
        metrics["share_of_bound"] = round(bound / whole["median"], 4)
    return metrics


def _step_metrics(workload: Workload, blank: Row, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """One denoise step: the mean of a chunk's steps."""
    steps = workload.config.schedule.num_steps
    work = step_work(workload.config, fp8=workload.fp8)
    times = {key: value / steps for key, value in metrics["steps_only_ms"].items()}
    ideal = work.ideal_ms(str(blank.environment.get("gpu")))
    return {
        "step_ms": {key: round(value, 4) for key, value in times.items()},
        "tflop": {key: round(value / 1e12, 6) for key, value in asdict(work).items()},
        "tflops_per_s": round(work.total_flop / times["median"] / 1e9, 4),
        "bound_ms": None if workload.config.dtype == "float32" else ideal,
    }


def growth_row(chunks: Chunks, options: MeasureOptions, blank: Row) -> Row:
    """Latency and memory from the first to the last of many chunks."""
    at_start = memory(options.device)
    denoiser: list[float] = []
    for i in range(options.growth_chunks):
        if i >= MIN_CHUNKS and monotonic() > options.deadline:
            break
        denoiser.append(timings(chunks.generate(i))["chunk"])
    at_end = memory(options.device)
    metrics = {
        **latency(denoiser),
        "memory_growth_nbytes": {key: at_end[key] - at_start[key] for key in at_end},
        "chunk_ms": [round(value, 3) for value in denoiser],
    }
    run = {**blank.run, "asked_chunks": options.growth_chunks, "num_chunks": len(denoiser)}
    return replace(blank, kind="growth", metrics=metrics, run=run)
