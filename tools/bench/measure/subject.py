"""Opens a subject, passes the gate and measures; every result and every failure is a row."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from forcing_kv.plugins.compile import tuning
from forcing_kv.tools.bench.measure.chunks import MEASURE_SEED, Chunks
from forcing_kv.tools.bench.measure.device_counters import memory, reset_peak_memory
from forcing_kv.tools.bench.measure.gate import References, check, roll_out
from forcing_kv.tools.bench.measure.options import MeasureOptions
from forcing_kv.tools.bench.measure.pixels import decoder_row, time_to_first
from forcing_kv.tools.bench.measure.steady import growth_row, run_steady, steady_rows
from forcing_kv.tools.bench.report.environment import describe_environment
from forcing_kv.tools.bench.report.rows import Row, describe_workload, failed_kind
from forcing_kv.tools.bench.subjects import LoadClock, Subject
from forcing_kv.tools.bench.workloads import Workload

SCALE_CHUNKS = 7
"""Length of the gate's rollouts in the smaller size."""


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
        yield replace(blank, kind=failed_kind(made), status="failed", error=error_text(error))


def error_text(error: Exception) -> str:
    """What a row says of an error that is being handled."""
    place = traceback.format_exc(limit=-3)
    return f"{f'{type(error).__name__}: {error}'[:2000]}\n{_without_paths(place)}"


def _without_paths(text: str) -> str:
    """The end of a traceback without the machine's folders."""
    root = str(Path(__file__).resolve().parents[3])
    return text.replace(root, ".")[-2000:]


def _measure(
    subject: Subject, workload: Workload, options: MeasureOptions, blank: Row
) -> Iterator[Row]:
    references = _references(subject, workload, options)
    references.prepare()
    reset_peak_memory(options.device)
    before = memory(options.device)
    prompt = workload.prompt()
    clock = LoadClock()
    with subject.open(workload, options.device, clock) as session:
        begin = perf_counter()
        found = roll_out(session, prompt, references.num_chunks)
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
            first = time_to_first(session, workload)
        parts = {f"{part}_ms": round(value, 1) for part, value in clock.parts_ms.items()}
        load = {**parts, "first_rollout_ms": round(gate_ms, 1), **first}
        yield replace(blank, kind="load", metrics=load)
        session.reset()
        chunks = Chunks(session)
        steady = run_steady(chunks, workload, options)
        yield from steady_rows(steady, chunks, workload, blank, before)
        if workload.decoders is not None:
            latents_ms = first["time_to_first_latents_ms"]
            yield decoder_row(workload, options.device, blank, steady.walls, latents_ms)
        if options.growth_chunks:
            yield growth_row(chunks, options, blank)


def _references(subject: Subject, workload: Workload, options: MeasureOptions) -> References:
    """What the gate compares with, at this size and at the smaller one that bounds its error."""
    num_chunks, scale = subject.gate_chunks(options.gate_chunks), None
    if options.gate_scale is not None:
        num_scale = subject.gate_chunks(SCALE_CHUNKS)
        scale = References(options.gate_scale, options.device, num_scale, options.folder)
    return References(workload, options.device, num_chunks, options.folder, scale)


def _tactics() -> dict[str, Any]:
    """Tactics of our operators' kernels, where any were launched or compiled."""
    chosen = {name: sorted(tactics) for name, tactics in sorted(tuning.CHOSEN.items())}
    return {"tactics": chosen} if chosen else {}
