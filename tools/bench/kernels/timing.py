"""Timing of single operators on a GPU, with a cold L2 cache, and the device's measured bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

_FLUSH_MIN_BYTES = 256 * 2**20
_MAX_FLUSHES = 64
_COPY_BYTES = 2**30
_GEMM_SIZE = 8192


@dataclass(frozen=True)
class DeviceBounds:
    """What the device reaches on the simplest work, measured in the same process."""

    copy_gbs: float
    """Device copy of 1 GiB, read and written bytes, GB/s."""
    gemm_tflops: float
    """8192^3 matrix product in the compute dtype, TFLOP/s."""


def time_cold(call: Callable[[], object], warmup: int, iterations: int) -> list[float]:
    """Time a call with a cold L2 cache.

    A buffer larger than the cache is overwritten before every call, as often as keeps the device
    busy until the host has enqueued the call: launch overhead stays out of the time between the
    events.

    Args:
        call: enqueues work on the current stream.
        warmup: untimed calls, at least one for compilation.
        iterations: timed calls.

    Returns:
        Device time of each call, in milliseconds.
    """
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(max(_FLUSH_MIN_BYTES, 4 * cache), dtype=torch.int8, device="cuda")
    for _ in range(warmup):
        call()
    # Twice what was enough once, for the host is not always as quick.
    num_flushes = 2 * _covering_flushes(call, flush)
    events = [_enqueue(call, flush, num_flushes) for _ in range(iterations)]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _enqueue(
    call: Callable[[], object], flush: torch.Tensor, num_flushes: int
) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Overwrite the buffer, then call; returns the events around the call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(num_flushes):
        flush.zero_()
    start.record()
    call()
    end.record()
    return start, end


def _covering_flushes(call: Callable[[], object], flush: torch.Tensor) -> int:
    """How often to overwrite the buffer so that the device begins after the host has enqueued.

    Asked of an idle device, doubling up to _MAX_FLUSHES; a call that waits for the device is never
    covered.
    """
    num_flushes = 1
    while num_flushes < _MAX_FLUSHES:
        torch.cuda.synchronize()
        start, _ = _enqueue(call, flush, num_flushes)
        if not start.query():
            break
        num_flushes *= 2
    return num_flushes


def time_graph(call: Callable[[], object], warmup: int, iterations: int) -> list[float]:
    """Time a sequence of calls as one captured graph, as the runtime runs them."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return time_cold(graph.replay, warmup, iterations)


def measure_bounds(dtype: torch.dtype, warmup: int, iterations: int) -> DeviceBounds:
    """Measure the copy bandwidth and the matrix rate of the current device."""
    source = torch.empty(_COPY_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copy = time_cold(lambda: target.copy_(source), warmup, iterations)
    a, b = (torch.randn(_GEMM_SIZE, _GEMM_SIZE, device="cuda").to(dtype) for _ in range(2))
    gemm = time_cold(lambda: a @ b, warmup, iterations)
    return DeviceBounds(
        copy_gbs=2 * _COPY_BYTES / median(copy) / 1e6,
        gemm_tflops=2 * _GEMM_SIZE**3 / median(gemm) / 1e9,
    )
