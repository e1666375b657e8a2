"""From latents to pixels: the first frame, frames a second end to end, and decoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

from forcing_kv.runtime_trt.session import Session
from forcing_kv.tools.bench.measure.chunks import MEASURE_SEED
from forcing_kv.tools.bench.measure.options import END_TO_END_S
from forcing_kv.tools.bench.measure.summary import summary
from forcing_kv.tools.bench.report.rows import Row
from forcing_kv.tools.bench.workloads import Workload


def time_to_first(session: Session, workload: Workload) -> dict[str, Any]:
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


def end_to_end(session: Session, workload: Workload, chunk_ms: float) -> dict[str, Any]:
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


def decoder_row(
    workload: Workload,
    device: str,
    blank: Row,
    walls: Sequence[float],
    first_latents_ms: float,
) -> Row:
    """Time of each decoder that the workload has, frames a second and the first frame with it."""
    from forcing_kv.tools.bench.pixel_decoders import time_decoder

    assert workload.decoders is not None
    metrics: dict[str, Any] = {}
    chunk_ms = summary(walls)["median"]
    for decoder in workload.decoders(device):
        times = summary(time_decoder(decoder, workload.config.latent_shape))
        fps = 1e3 * workload.pixel_frames / (chunk_ms + times["median"])
        metrics |= {
            f"{decoder.name}_ms": times,
            f"with_{decoder.name}_fps": round(fps, 3),
            f"time_to_first_frame_{decoder.name}_ms": round(first_latents_ms + times["median"], 3),
        }
    return replace(blank, kind="decode", metrics=metrics)
