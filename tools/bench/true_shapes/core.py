"""One core: pinned to it, and what it reaches in a matrix product."""

from __future__ import annotations

import os
from pathlib import Path
from time import process_time

import torch

from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.runtime_trt.errors import BackendUnavailableError

PRODUCT_SIZE = 3072
PRODUCT_REPEATS = 3


def pin_to_one_core() -> int | None:
    """Let every thread of this process run on one core alone, the last that it may use.

    Returns:
        The core's number; None where the system cannot pin.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    core = max(os.sched_getaffinity(0))
    tasks = Path("/proc/self/task")
    for thread in [int(each.name) for each in tasks.iterdir()] if tasks.is_dir() else [0]:
        os.sched_setaffinity(thread, {core})
    torch.set_num_threads(1)
    return core


def product_gflops(dtype: DType, size: int = PRODUCT_SIZE) -> float:
    """Rate of a large matrix product by CPU time, the best of a few, GFLOP/s."""
    left, right = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    torch.mm(left[: size // 8], right)
    times = []
    for _ in range(PRODUCT_REPEATS):
        begin = process_time()
        torch.mm(left, right)
        times.append(process_time() - begin)
    return float(2 * size**3 / min(times) / 1e9)


def has_bfloat16() -> bool:
    """Whether PyTorch has fast bfloat16 products on this CPU: AVX-512, or better."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def require_dtype(dtype: DType) -> None:
    """Refuse bfloat16 where PyTorch would work through it element by element.

    Raises:
        BackendUnavailableError: it would.
    """
    if dtype == "bfloat16" and not has_bfloat16():
        raise BackendUnavailableError(
            "PyTorch has no bfloat16 products on this CPU (they need AVX-512); measure float32 here"
        )
