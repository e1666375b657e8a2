"""`fkv calibrate policy`: which cache policy a model needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from forcing_kv.calibration.options import CalibrationOutput, RolloutOptions, SourceOptions
from forcing_kv.calibration.policy.grid import PolicyGrid
from forcing_kv.export.cost.devices import find_device
from forcing_kv.export.request.flags import Int, Integers, Threads, between, flags
from forcing_kv.runtime_trt.console import console
from forcing_kv.runtime_trt.errors import InputError


@flags()
@dataclass(frozen=True, kw_only=True)
class PolicyRollouts(RolloutOptions):
    """Videos that policies are compared by."""

    seeds: Integers = (0,)
    """Seeds, each with every prompt."""
    num_chunks: Annotated[Int, between(2)] = 7
    """Chunks of a rollout."""
    num_threads: Threads = 0
    """CPU threads of torch; 0: its choice."""


@flags()
@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """What is searched for besides the grid."""

    heads: Path | None = None
    """Head partition of `fkv calibrate heads`. Default: the shipped one."""
    device: str = "h200"
    """GPU to predict speed for, such as rtx4090 or h100; an unknown name lists them all."""


def calibrate_policy(
    *,
    output: CalibrationOutput,
    model: SourceOptions = SourceOptions(),
    grid: PolicyGrid = PolicyGrid(),
    rollouts: PolicyRollouts = PolicyRollouts(),
    target: TargetOptions = TargetOptions(),
) -> None:
    """Find the cache policy that a model needs: quality against bytes and predicted speed.

    Generates the same videos with dense attention and with every policy of the grid, compares
    latents and chunk boundaries, and draws which policies no other beats.
    """
    from forcing_kv.calibration.policy.search import PolicySearch
    from forcing_kv.calibration.policy.source import load_search

    output.check(PolicySearch.FILES)
    device = find_device(target.device)
    loaded = load_search(model, target.heads, rollouts.num_chunks, rollouts.window_frames)
    if grid.thresholds and loaded.scores is None:
        raise InputError(
            "--thresholds needs scores, which this head partition does not hold; make one with "
            "`fkv calibrate heads`, or leave the option out"
        )
    search = PolicySearch(
        loaded.source, loaded.dense, loaded.base, grid, loaded.scores, loaded.partition,
        device, rollouts.num_chunks, rollouts.seeds,
    )  # fmt: skip
    if rollouts.num_threads:
        import torch

        torch.set_num_threads(rollouts.num_threads)
    output.carry_out(search, "comparing policies", _show)


def _show(record: Mapping[str, Any]) -> None:
    from rich.table import Column, Table

    names = ("static heads", "PSNR, dB", "boundary", "K/V, MB", "FPS bound", "")
    table = Table(Column("policy", no_wrap=True), *names)
    ranked = sorted(record["candidates"], key=lambda one: -(one["psnr_db"] or 1e9))
    for one in ranked:
        psnr = "equal" if one["psnr_db"] is None else f"{one['psnr_db']:.2f}"
        table.add_row(
            one["label"],
            str(one["num_static_heads"]),
            psnr,
            f"{one['boundary_ratio']:.3f}",
            f"{one['nbytes_kv'] / 1e6:.2f}",
            f"{one['fps_bound']:.0f}",
            "Pareto" if one["pareto"] else "",
        )
    dense = record["dense"]
    table.add_row(
        "dense", "", "", "1", f"{dense['nbytes_kv'] / 1e6:.2f}", f"{dense['fps_bound']:.0f}", ""
    )
    console().print(table)
