"""Clips generated in several processes: a small model is bound by overhead, not by arithmetic."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

import torch

from forcing_kv.export.checkpoint.load import load_model
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.tools.digits.evaluation.comparison import Clip, Float32, Variant, generate
from forcing_kv.tools.digits.shipped import MODEL

JOB_CLIPS = 8
"""Clips per job: a progress bar moves by as many."""


@dataclass(frozen=True)
class Job:
    """Clips of one variant."""

    variant: Variant
    clips: Sequence[Clip]
    num_chunks: int


def split_jobs(variant: Variant, clips: Sequence[Clip], num_chunks: int) -> list[Job]:
    """Cut a variant into jobs, in order."""
    starts = range(0, len(clips), JOB_CLIPS)
    return [Job(variant, clips[start : start + JOB_CLIPS], num_chunks) for start in starts]


_models: dict[Path, CausalWanModel] = {}
"""The model of this process."""


def _run(checkpoint: Path, job: Job) -> Float32:
    if checkpoint not in _models:
        _models[checkpoint] = load_model(checkpoint, MODEL)
    return generate(_models[checkpoint], job.variant, job.clips, job.num_chunks)


def run_jobs(checkpoint: Path, jobs: Sequence[Job], processes: int) -> Iterator[Float32]:
    """Yield the latents [clips, F, C, h, w] of every job, in order.

    Args:
        checkpoint: weights of the digits model.
        jobs: what to generate.
        processes: single-threaded processes; 1 works in this one.
    """
    if processes == 1:
        yield from (_run(checkpoint, job) for job in jobs)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin) as pool:
        try:
            yield from pool.map(_run, [checkpoint] * len(jobs), jobs)
        except BaseException:
            for process in active_children():
                process.terminate()  # Or the pool would wait for what nobody wants any more.
            raise


def _begin() -> None:
    """Make this process one that works on one core, and ends when its parent says so or ends."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None, "called in the main process"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
