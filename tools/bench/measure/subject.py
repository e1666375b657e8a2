"""Opens a subject, passes the gate and measures; every result and every failure is a row."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from time import monotonic, perf_counter, process_time
from typing import Any

import numpy as np

from forcing_kv.plugins import tuning
from forcing_kv.runtime_trt.noise import draw_noise
from forcing_kv.runtime_trt.session import Chunk, Session
from forcing_kv.tools.bench.measure.device_counters import (
    EnergyMeter,
    kv_nbytes,
    memory,
    reset_peak_memory,
)
from forcing_kv.tools.bench.measure.gate import References, check, roll_out
from forcing_kv.tools.bench.measure.summary import latency, summary
from forcing_kv.tools.bench.report.rows import (
    Row,
    describe_environment,
    describe_workload,
    failed_kind,
)
from forcing_kv.tools.bench.subjects import LoadClock, Subject
from forcing_kv.tools.bench.workloads import Workload, step_work

MEASURE_SEED = 9
NUM_NOISES = 4
"""Noise is drawn before the clock starts; chunks take these in turn."""


@dataclass(frozen=True)
class MeasureOptions:
    """How much to measure."""

    device: str
    num_chunks: int = 50
    """Measured chunks."""
    warmup_chunks: int = 12
    """Chunks before them: the window fills, code is compiled and captured."""
    gate_chunks: int = 7
    """Chunks of the gate's rollout."""
    budget_s: float = 120.0
    """Measuring stops early after this long, but not before `MIN_CHUNKS`."""
    gate_scale: Workload | None = None
    """Workload of a smaller size that bounds the gate's error; None compares with float32."""
    growth_chunks: int = 0
    """Chunks to go on with at the end, for growth."""
    deadline: float = inf
    """When measuring stops early, growth too, on the clock of `monotonic`."""
    folder: Path = Path(".bench")
    """Where reference rollouts are kept."""
    commit: str | None = None
    """Commit to record, where there is no git checkout."""


MIN_CHUNKS = 5
PART_WARMUP = 2
"""Untimed chunks after captured graphs are put aside to time the parts of a chunk."""
SCALE_CHUNKS = 7
"""Length of the gate's rollouts in the smaller size."""
END_TO_END_S = 10.0
"""Longest time of the end-to-end part."""


def measure(subject: Subject, workload: Workload, options: MeasureOptions) -> Iterator[Row]:
    """Measure one subject on one workload.

    Yields:
        Rows of kind load, chunk, step, rollout, decode and growth as they are ready; one row with a
        status other than `ok` where something fails.
    """
    environment = describe_environment(options.device, options.commit)
    blank = Row("chunk", subject.name, describe_workload(workload), environment)
    run = {
        "summary": subject.summary,
        "asked_chunks": options.num_chunks,
        "warmup_chunks": options.warmup_chunks,
        "seed": MEASURE_SEED,
    }
    blank = replace(blank, run=run)
    made: list[Row] = []
    try:
        for row in _measure(subject, workload, options, blank):
            made.append(row)
            yield row
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        place = traceback.format_exc(limit=-3)
        message = f"{message[:2000]}\n{_without_paths(place)}"
        yield replace(blank, kind=failed_kind(made), status="failed", error=message)


def _without_paths(text: str) -> str:
    """The end of a traceback without the machine's folders."""
    root = str(Path(__file__).resolve().parents[3])
    return text.replace(root, ".")[-2000:]


def _measure(
    subject: Subject, workload: Workload, options: MeasureOptions, blank: Row
) -> Iterator[Row]:
    num_gate = subject.gate_chunks(options.gate_chunks)
    scale = None
    if options.gate_scale is not None:
        num_scale = subject.gate_chunks(SCALE_CHUNKS)
        scale = References(options.gate_scale, options.device, num_scale, options.folder)
    references = References(workload, options.device, num_gate, options.folder, scale)
    references.prepare()
    reset_peak_memory(options.device)
    before = memory(options.device)
    prompt = workload.prompt()
    clock = LoadClock()
    with subject.open(workload, options.device, clock) as session:
        begin = perf_counter()
        found = roll_out(session, prompt, num_gate)
        gate_ms = 1e3 * (perf_counter() - begin)
        verdict = check(found, references)
        blank = replace(blank, gate=asdict(verdict), run={**blank.run, **_tactics()})
        if not verdict.passed:
            yield replace(blank, status="gate_failed", error="the gate's rollout is out of bounds")
            return
        gc.collect()
        reset_peak_memory(options.device)
        # The first chunk runs for the second time, which is when PyTorch's subjects capture it.
        for _ in range(2):
            session.reset()
            first = _time_to_first(session, workload)
        parts = {f"{part}_ms": round(value, 1) for part, value in clock.parts_ms.items()}
        load = {**parts, "first_rollout_ms": round(gate_ms, 1), **first}
        yield replace(blank, kind="load", metrics=load)
        session.reset()
        walls: list[float] = []
        yield from _rollout(session, workload, options, blank, before, walls)
        yield from _decoders(workload, options, blank, walls, first["time_to_first_latents_ms"])
        if options.growth_chunks:
            yield _growth(session, options, blank)


def _tactics() -> dict[str, Any]:
    """Tactics of our operators' kernels, where any were launched or compiled."""
    chosen = {name: sorted(tactics) for name, tactics in sorted(tuning.CHOSEN.items())}
    return {"tactics": chosen} if chosen else {}


def _time_to_first(session: Session, workload: Workload) -> dict[str, Any]:
    """Time from a prompt embedding to the first chunk, everything warm."""
    prompt = workload.prompt()
    start = perf_counter()
    session.set_prompt(prompt)
    chunk = session.generate_chunk(seed=MEASURE_SEED)
    latents_ms = 1e3 * (perf_counter() - start)
    frame_ms = None
    if workload.decode is not None:
        workload.decode(chunk.latents)
        frame_ms = round(1e3 * (perf_counter() - start), 3)
    return {"time_to_first_latents_ms": round(latents_ms, 3), "time_to_first_frame_ms": frame_ms}


def _rollout(
    session: Session,
    workload: Workload,
    options: MeasureOptions,
    blank: Row,
    before: Mapping[str, int],
    walls: list[float],
) -> Iterator[Row]:
    """Warm up to the steady state, then measure chunk after chunk; `walls` receives host times."""
    noises = [_noise(session, i) for i in range(NUM_NOISES)]
    session.set_prompt(workload.prompt())
    for i in range(options.warmup_chunks):
        session.generate_chunk(*noises[i % NUM_NOISES])
    at_start = memory(options.device)
    energy, start = EnergyMeter(options.device), perf_counter()
    cpu_times: list[float] = []
    chunks: list[Mapping[str, float]] = []
    for i in range(options.num_chunks):
        late = perf_counter() - start > options.budget_s or monotonic() > options.deadline
        if i >= MIN_CHUNKS and late:
            break
        begin, cpu_begin = perf_counter(), process_time()
        chunk = session.generate_chunk(*noises[i % NUM_NOISES])
        walls.append(1e3 * (perf_counter() - begin))
        cpu_times.append(1e3 * (process_time() - cpu_begin))
        chunks.append(_timings(chunk))
    joules = energy.joules()
    at_end = memory(options.device)
    run = {**blank.run, "num_chunks": len(chunks)}
    blank = replace(blank, run=run)
    denoiser = [times["chunk"] for times in chunks]
    parts = _parts(session, noises)
    metrics = _chunk_metrics(workload, blank, denoiser, parts or chunks, walls)
    if parts:
        metrics["parts_from"] = f"{len(parts)} chunks more, call by call"
    metrics |= {
        "cpu_time_ms": summary(cpu_times),
        **kv_nbytes(session),
        "memory": at_end,
        "memory_before_open": dict(before),
        "joules_per_chunk": None if joules is None else round(joules / len(chunks), 3),
    }
    yield replace(blank, metrics=metrics)
    if "steps_only_ms" in metrics:
        yield replace(blank, kind="step", metrics=_step_metrics(workload, blank, metrics))
    yield replace(
        blank,
        kind="rollout",
        metrics={
            **latency(denoiser),
            "wall": latency(walls),
            "memory_growth_nbytes": {key: at_end[key] - at_start[key] for key in at_end},
            "end_to_end": _end_to_end(session, workload, summary(walls)["median"]),
            "chunk_ms": [round(value, 3) for value in denoiser],
        },
    )


def _parts(session: Session, noises: Sequence[tuple[Any, Any]]) -> list[Mapping[str, float]]:
    """Times of the parts of a few chunks more, enqueued call by call.

    A chunk that is one captured graph tells its whole time alone. Empty where none is.
    """
    backend: Any = session.backend
    if not getattr(backend, "use_graphs", False):
        return []
    backend.use_graphs = False
    try:
        chunks = [
            session.generate_chunk(*noises[i % NUM_NOISES]) for i in range(PART_WARMUP + MIN_CHUNKS)
        ]
    finally:
        backend.use_graphs = True
    return [_timings(chunk) for chunk in chunks[PART_WARMUP:]]


def _noise(session: Session, index: int) -> tuple[Any, Any]:
    shape, draws = session.config.latent_shape, session.config.schedule.num_steps - 1
    eps = [draw_noise(MEASURE_SEED, index, draw + 1, shape) for draw in range(draws)]
    drawn = np.stack(eps) if eps else np.zeros((0, *shape), np.float32)
    return draw_noise(MEASURE_SEED, index, 0, shape), drawn


def _timings(chunk: Chunk) -> dict[str, float]:
    """Times by part; `chunk` is the sum where the backend gives none."""
    times = dict(chunk.timings_ms)
    times.setdefault("chunk", sum(times.values()))
    return times


def _chunk_metrics(
    workload: Workload,
    blank: Row,
    denoiser: list[float],
    chunks: list[Mapping[str, float]],
    walls: list[float],
) -> dict[str, Any]:
    whole = summary(denoiser)
    frames, steps = workload.pixel_frames, workload.config.schedule.num_steps
    metrics: dict[str, Any] = {
        "denoiser_ms": whole,
        "denoiser_fps": round(1e3 * frames / whole["median"], 3),
        "wall_ms": summary(walls),
    }
    for part in ("steps", "clean", "evict", "commit"):
        if all(part in times for times in chunks):
            name = "steps_only_ms" if part == "steps" else f"{part}_ms"
            metrics[name] = summary([times[part] for times in chunks])
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


def _end_to_end(session: Session, workload: Workload, chunk_ms: float) -> dict[str, Any]:
    """Frames a second with noise drawn and latents on the host, and with pixels where decoded.

    The host works beside the device where the backend can: chunks come from a stream that runs
    ahead, as many as fit into `END_TO_END_S`; null where not even one does.
    """
    count = min(20, int(1e3 * END_TO_END_S / chunk_ms))
    if not count:
        return {"latents_fps": None, "pixels_fps": None}
    start = perf_counter()
    stream = session.stream(count, seed=MEASURE_SEED, run_ahead=True)
    latents = [chunk.latents for chunk in stream]
    seconds = perf_counter() - start
    frames = workload.pixel_frames * len(latents)
    found: dict[str, Any] = {"latents_fps": round(frames / seconds, 3), "pixels_fps": None}
    if workload.decode is not None:
        begin = perf_counter()
        for chunk in latents:
            workload.decode(chunk)
        found["pixels_fps"] = round(frames / (seconds + perf_counter() - begin), 3)
    return found


def _decoders(
    workload: Workload,
    options: MeasureOptions,
    blank: Row,
    walls: Sequence[float],
    first_latents_ms: float,
) -> Iterator[Row]:
    """Time of each decoder that the workload has, frames a second and the first frame with it."""
    if workload.decoders is None:
        return
    from forcing_kv.tools.bench.measure.pixel_decoders import time_decoder

    metrics: dict[str, Any] = {}
    chunk_ms = summary(walls)["median"]
    for decoder in workload.decoders(options.device):
        times = summary(time_decoder(decoder, workload.config.latent_shape))
        fps = 1e3 * workload.pixel_frames / (chunk_ms + times["median"])
        metrics |= {
            f"{decoder.name}_ms": times,
            f"with_{decoder.name}_fps": round(fps, 3),
            f"time_to_first_frame_{decoder.name}_ms": round(first_latents_ms + times["median"], 3),
        }
    yield replace(blank, kind="decode", metrics=metrics)


def _growth(session: Session, options: MeasureOptions, blank: Row) -> Row:
    """Latency and memory from the first to the last of many chunks."""
    noises = [_noise(session, i) for i in range(NUM_NOISES)]
    at_start = memory(options.device)
    denoiser: list[float] = []
    for i in range(options.growth_chunks):
        if i >= MIN_CHUNKS and monotonic() > options.deadline:
            break
        denoiser.append(_timings(session.generate_chunk(*noises[i % NUM_NOISES]))["chunk"])
    at_end = memory(options.device)
    metrics = {
        **latency(denoiser),
        "memory_growth_nbytes": {key: at_end[key] - at_start[key] for key in at_end},
        "chunk_ms": [round(value, 3) for value in denoiser],
    }
    run = {**blank.run, "asked_chunks": options.growth_chunks, "num_chunks": len(denoiser)}
    return replace(blank, kind="growth", metrics=metrics, run=run)
