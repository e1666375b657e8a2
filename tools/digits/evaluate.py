"""`fkv eval`: what the cache policy costs in quality, on the shipped digits model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter

from forcing_kv.export.checkpoint.fp8_file import read_fp8
from forcing_kv.export.checkpoint.origin import Origin
from forcing_kv.export.request.flags import Int, Json, PositiveInt, YesNo, between, flags
from forcing_kv.runtime_trt.bundle.atomic.files import check_names, filled_folder, write_file
from forcing_kv.runtime_trt.bundle.atomic.locks import claimed_in
from forcing_kv.runtime_trt.bundle.hashes import sha256_of
from forcing_kv.runtime_trt.bundle.heads import read_heads
from forcing_kv.runtime_trt.console import ExitCode, print_json, talk, track
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.tools.digits import shipped

FILES = ("eval.json", "eval.png")
SHORT_CHUNKS, LONG_CHUNKS = 7, 20
"""21 and 60 frames."""
MIN_DIGIT, MIN_DIRECTION = 0.93, 0.97
"""Goals under dense attention: frames read right, clips that start right."""
MAX_DIGIT_LOSS, MAX_MOTION_CHANGE = 0.02, 0.10
"""Goals for Forcing-KV against dense: lost share of frames, relative change of motion."""
MOTION = ("displacement", "heading", "shape")
"""Measures whose relative change is bounded: pixels a frame, steps the right way, shape kept."""
ERRORS = ("position_error", "step_error_inside", "step_error_across", "phase_error")
"""Measures whose relative growth is bounded."""


Shipped = Annotated[Path, Parameter(show_default="shipped")]


@flags()
@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What is compared, on how many clips."""

    out: Path
    """Folder for eval.json and eval.png."""
    checkpoint: Shipped = shipped.CHECKPOINT
    """Weights of the digits model."""
    heads: Shipped = shipped.HEADS
    """Head partition of the Forcing-KV rows."""
    clips: Annotated[Int, between(40)] = 160
    """Clips of 21 frames per row."""
    long_clips: Annotated[Int, between(40)] = 40
    """Clips of 60 frames per row."""
    check: YesNo = False
    """Exit with 1 if a goal is missed."""
    processes: PositiveInt = 2
    """Processes, one core each."""
    force: bool = False
    """Replace an earlier result."""
    as_json: Json = False
    """Print the result on stdout."""


def evaluate_command(*, options: EvalOptions) -> ExitCode:
    """Compare cache policies on the shipped digits model: digits, motion, shape, memory.

    Every row generates the same captions from the same noise: dense attention, Forcing-KV with the
    calibrated heads, recency alone at equal memory, random segments, all heads static, no context,
    one local frame, and linear layers in FP8.
    """
    checkpoint, heads, out = options.checkpoint, options.heads, options.out
    for file in (checkpoint, heads):
        if not file.is_file():
            raise InputError(f"{file}: no such file")
    check_names(out, FILES, force=options.force)
    counts = (options.clips, options.long_clips, options.processes)
    with claimed_in(out, FILES[0]):
        record = run_evaluation(checkpoint, heads, *counts)
        _write(record, out, force=options.force)
    if options.as_json:
        print_json(record)
    if options.check and not all(goal["met"] for goal in record["goals"]):
        talk("a goal is missed", style="red")
        return ExitCode.CHECK_FAILED
    return ExitCode.GOOD


def _write(record: Mapping[str, Any], out: Path, *, force: bool) -> None:
    """Write `FILES`, and print the table."""
    from forcing_kv.tools.digits.evaluation.report import draw_curves, print_table

    data, picture = FILES
    with filled_folder(out, force=force) as folder:
        write_file(folder / data, (json.dumps(record, indent=1) + "\n").encode())
        draw_curves(record, folder / picture)
    print_table(record)


def run_evaluation(
    checkpoint: Path, heads: Path, num_clips: int, num_long_clips: int, processes: int = 1
) -> dict[str, Any]:
    """Generate, measure and judge; returns the content of `eval.json`.

    Args:
        checkpoint: weights of the digits model.
        heads: head partition of the Forcing-KV rows.
        num_clips: clips of 21 frames.
        num_long_clips: clips of 60 frames.
        processes: single-threaded processes that generate.
    """
    from forcing_kv.tools.digits.evaluation.comparison import (
        clips_of,
        compare,
        standard_variants,
        variant_record,
    )
    from forcing_kv.tools.digits.evaluation.workers import run_jobs, split_jobs

    head_file, sha256 = read_heads(heads, shipped.MODEL), sha256_of(checkpoint)
    warn_of_others(checkpoint, sha256, Origin(heads, "heads", head_file.model_sha256))
    variants = standard_variants(head_file.partition)
    record: dict[str, Any] = {"model_sha256": sha256, "heads_sha256": head_file.sha256}
    for name, count, chunks in (
        ("short", num_clips, SHORT_CHUNKS),
        ("long", num_long_clips, LONG_CHUNKS),
    ):
        clips = clips_of(count)
        jobs = [job for each in variants for job in split_jobs(each, clips, chunks)]
        made = list(track(run_jobs(checkpoint, jobs, processes), name, len(jobs)))
        latents = np.concatenate(made).reshape(len(variants), count, -1, *made[0].shape[2:])
        results = compare(variants, clips, list(latents))
        record[name] = {
            "num_clips": count,
            "num_frames": chunks * shipped.CHUNK.num_frames,
            "rows": [variant_record(result, clips, results[0]) for result in results],
        }
    record["goals"] = judge(record["short"]["rows"])
    return record


def warn_of_others(checkpoint: Path, sha256: str, heads: Origin) -> None:
    """Say on stderr which of the heads and the shipped FP8 scales are another checkpoint's."""
    fp8 = read_fp8(shipped.FP8, shipped.MODEL)
    for origin in (heads, Origin(shipped.FP8, "fp8", fp8.model_sha256)):
        origin.warn_of_other(str(checkpoint), lambda: sha256)


def judge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Hold the dense and the Forcing-KV row against the goals.

    A goal is met or missed by the mean; its standard error over clips stands beside it.
    """
    by_name = {row["name"]: row for row in rows}
    dense, change = by_name["dense"]["measures"], by_name["forcing-kv"]["change_from_dense"]
    start, digit = dense["direction"], dense["digit"]
    goals = [
        _goal("dense: frames read right", digit["mean"], digit["sem"], MIN_DIGIT, True),
        _goal("dense: clips that start right", start["mean"], start["sem"], MIN_DIRECTION, True),
        _goal(
            "forcing-kv: frames lost",
            -change["digit"]["mean"],
            change["digit"]["sem"],
            MAX_DIGIT_LOSS,
            False,
        ),
    ]
    for name in (*MOTION, *ERRORS):
        base = max(abs(dense[name]["mean"]), 1e-9)
        relative, error = change[name]["mean"] / base, change[name]["sem"] / base
        word, relative = ("growth", relative) if name in ERRORS else ("change", abs(relative))
        goal = f"forcing-kv: {word} of {name}"
        goals.append(_goal(goal, relative, error, MAX_MOTION_CHANGE, False))
    return goals


def _goal(name: str, value: float, sem: float, bound: float, at_least: bool) -> dict[str, Any]:
    met = value >= bound if at_least else value <= bound
    return {
        "goal": name,
        "value": value,
        "sem": sem,
        "bound": bound,
        "at_least": at_least,
        "met": met,
    }
