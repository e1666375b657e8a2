"""Clips generated in several processes: a small model is bound by overhead, not by arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
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
    pool = ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,))
    with pool:
        yield from pool.map(_run, [checkpoint] * len(jobs), jobs)
