"""`fkv calibrate policy`: which cache policy a model needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from forcing_kv.calibration.cli import parse_integers, parse_numbers
from forcing_kv.export.devices import DEVICES, find_device
from forcing_kv.export.model_options import (
    Checkpoint,
    ComputeDType,
    LatentSize,
    Lora,
    ModelConfig,
    ModelName,
    PromptEmbeds,
)
from forcing_kv.runtime_trt.console import console, print_json, progress, talk
from forcing_kv.runtime_trt.errors import InputError, require
from forcing_kv.runtime_trt.files import check_folder
from forcing_kv.runtime_trt.resolution import parse_latent_size

_GRID_PANEL = "Grid (each a list; every combination is tried)"
FILES = ("policy.json", "policy.png")


def calibrate_policy(
    out: Annotated[Path, typer.Option(help="Folder that receives policy.json and policy.png.")],
    model: ModelName = "digits",
    heads: Annotated[
        Path | None,
        typer.Option(help="Head partition of `fkv calibrate heads`. Default: the shipped one."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt of a shipped model; repeat it for more.")
    ] = None,
    checkpoint: Checkpoint = None,
    config: ModelConfig = None,
    lora: Lora = None,
    prompt_embeds: PromptEmbeds = None,
    latent_size: LatentSize = None,
    thresholds: Annotated[
        str | None,
        typer.Option(
            help="Lowest scores of a static head. Default: the partition as its file has it.",
            rich_help_panel=_GRID_PANEL,
        ),
    ] = None,
    dynamic_frames: Annotated[
        str,
        typer.Option(
            help="Retained segments in frames: of three candidates, 1 is a retention of 0.33.",
            rich_help_panel=_GRID_PANEL,
        ),
    ] = "0,1,2",
    segments: Annotated[
        str | None,
        typer.Option(
            help="Segments per frame. Default: the model's own.", rich_help_panel=_GRID_PANEL
        ),
    ] = None,
    static_frames: Annotated[
        str, typer.Option(help="Local frames of static heads.", rich_help_panel=_GRID_PANEL)
    ] = "1",
    temporal_frames: Annotated[
        str, typer.Option(help="Local frames of dynamic heads.", rich_help_panel=_GRID_PANEL)
    ] = "1,2",
    window_frames: Annotated[
        int | None, typer.Option(help="Frames that dense attention sees. Default: all.")
    ] = None,
    num_chunks: Annotated[int, typer.Option(min=2, help="Chunks of a rollout.")] = 7,
    seeds: Annotated[str, typer.Option(help="Seeds, each with every prompt.")] = "0",
    dtype: ComputeDType = "float32",
    device: Annotated[
        str, typer.Option(help=f"GPU to predict speed for: {', '.join(DEVICES)}.")
    ] = "h200",
    num_threads: Annotated[
        int, typer.Option(min=0, help="CPU threads of torch; 0: its choice.")
    ] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite earlier files.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would run, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the content of policy.json.")] = (
        False
    ),
) -> None:
    """Find the cache policy that a model needs: quality against bytes and predicted speed.

    Generates the same videos with dense attention and with every policy of the grid, compares
    latents and chunk boundaries, and draws which policies no other beats.
    """
    from forcing_kv.calibration.artifacts import write_json
    from forcing_kv.calibration.policy_picture import draw_policies
    from forcing_kv.calibration.policy_search import PolicyGrid, PolicySearch, search_record
    from forcing_kv.calibration.policy_source import SearchRequest, load_search
    from forcing_kv.export.request import ExportRequest

    existing = [str(out / name) for name in FILES if (out / name).exists()]
    if existing and not force:
        raise InputError(f"{existing} exist; choose another --out, or overwrite with --force")
    check_folder(out)
    require("matplotlib")
    target = find_device(device)
    size = None if latent_size is None else parse_latent_size("--latent-size", latent_size)
    request = SearchRequest(
        ExportRequest(
            model=model, checkpoint=checkpoint, config=config, lora=lora, latent_size=size,
            heads=heads, dtype=cast(Any, dtype),
        ),
        prompt_embeds,
        tuple(prompt or ()),
        window_frames,
        num_chunks,
    )  # fmt: skip
    loaded = load_search(request)
    grid = PolicyGrid(
        parse_numbers("--thresholds", thresholds) if thresholds else (None,),
        parse_integers("--dynamic-frames", dynamic_frames),
        parse_integers("--segments", segments) if segments else (loaded.base.num_segments,),
        parse_integers("--static-frames", static_frames),
        parse_integers("--temporal-frames", temporal_frames),
    )
    if thresholds and loaded.scores is None:
        raise InputError(
            "--thresholds needs scores, which this head partition does not hold; make one with "
            "`fkv calibrate heads`, or leave the option out"
        )
    search = PolicySearch(
        loaded.source, loaded.dense, loaded.base, grid, loaded.scores, loaded.partition, target,
        num_chunks, parse_integers("--seeds", seeds),
    )  # fmt: skip
    candidates = search.candidates()
    talk(
        f"{loaded.source.name}: {len(candidates)} policies and dense, {search.num_rollouts} "
        f"videos of {num_chunks} chunks each; {len(search.skipped)} combinations cannot run"
    )
    for reason in search.skipped:
        talk(f"left out: {reason}")
    if dry_run:
        return
    if num_threads:
        import torch

        torch.set_num_threads(num_threads)
    total = (len(candidates) + 1) * search.num_rollouts * num_chunks
    with progress("comparing policies", total) as bar:
        measurements = search.run(candidates, bar.advance)
    record = search_record(search, measurements)
    out.mkdir(parents=True, exist_ok=True)
    draw_policies(out / FILES[1], record)
    write_json(out / FILES[0], record)
    _show(record)
    talk(f"wrote {out / FILES[0]} and {out / FILES[1]}")
    if as_json:
        print_json(record)


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
