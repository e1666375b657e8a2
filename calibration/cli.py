"""`fkv calibrate heads`: profiles the attention heads of a model on real rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from forcing_kv.export.model_options import (
    Checkpoint,
    ChunkFrames,
    ComputeDType,
    LatentSize,
    Lora,
    LoraAlpha,
    ModelConfig,
    ModelName,
    PromptEmbeds,
    WeightSet,
)
from forcing_kv.runtime_trt.console import console, print_json, progress, talk
from forcing_kv.runtime_trt.errors import InputError, require
from forcing_kv.runtime_trt.files import check_folder
from forcing_kv.runtime_trt.resolution import parse_latent_size

_SCHEDULE_PANEL = "Schedule"
_ROLLOUT_PANEL = "Rollouts"
_RULE_PANEL = "Rule"

Prompts = Annotated[
    list[str] | None,
    typer.Option(help="Prompt of a shipped model; repeat it for more. Default: its own set."),
]
Seeds = Annotated[
    str, typer.Option(help="Seeds, each with every prompt.", rich_help_panel=_ROLLOUT_PANEL)
]
NumChunks = Annotated[
    int, typer.Option(min=1, help="Chunks of a rollout.", rich_help_panel=_ROLLOUT_PANEL)
]
WindowFrames = Annotated[
    int | None,
    typer.Option(
        help="Frames that dense attention sees, sink and own chunk included. Default: all.",
        rich_help_panel=_ROLLOUT_PANEL,
    ),
]
TorchDevice = Annotated[str, typer.Option(help="PyTorch device.", rich_help_panel=_ROLLOUT_PANEL)]
Force = Annotated[bool, typer.Option("--force", help="Overwrite earlier files.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, say what would run, and stop.")
]


def calibrate_heads(
    out: Annotated[Path, typer.Option(help="Folder that receives heads.json and heads.png.")],
    model: ModelName = "digits",
    prompt: Prompts = None,
    checkpoint: Checkpoint = None,
    config: ModelConfig = None,
    weights: WeightSet = None,
    lora: Lora = None,
    lora_alpha: LoraAlpha = None,
    prompt_embeds: PromptEmbeds = None,
    latent_size: LatentSize = None,
    chunk_frames: ChunkFrames = None,
    denoise_steps: Annotated[
        str | None,
        typer.Option(
            help="Denoising step list. Default: the model's own.",
            rich_help_panel=_SCHEDULE_PANEL,
        ),
    ] = None,
    warped: Annotated[
        bool,
        typer.Option(
            help="Whether that list indexes the shifted schedule.",
            rich_help_panel=_SCHEDULE_PANEL,
        ),
    ] = True,
    seeds: Seeds = "0,1",
    num_chunks: NumChunks = 7,
    profile_chunks: Annotated[
        str | None,
        typer.Option(
            help="Chunks to record, such as 5,6. Default: those that see the most frames.",
            rich_help_panel=_ROLLOUT_PANEL,
        ),
    ] = None,
    profile_steps: Annotated[
        str | None,
        typer.Option(
            help="Denoise steps to record; the clean pass is the last. Default: all.",
            rich_help_panel=_ROLLOUT_PANEL,
        ),
    ] = None,
    window_frames: WindowFrames = None,
    sink_frames: Annotated[
        int,
        typer.Option(
            min=0, help="First frames that stay in that window.", rich_help_panel=_ROLLOUT_PANEL
        ),
    ] = 0,
    dtype: ComputeDType = "float32",
    device: TorchDevice = "cpu",
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Lowest score of a static head. Default: the model's own; 0.8 as published.",
            rich_help_panel=_RULE_PANEL,
        ),
    ] = None,
    skip_first: Annotated[
        int, typer.Option(help="First key frames left out.", rich_help_panel=_RULE_PANEL)
    ] = 1,
    last_k: Annotated[
        int, typer.Option(help="Last key frames compared.", rich_help_panel=_RULE_PANEL)
    ] = 4,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the content of heads.json on stdout.")
    ] = False,
) -> None:
    """Find out which attention heads are static and which dynamic.

    Generates videos with dense attention, measures how much of each head's attention stays on the
    last frames, and writes the partition with its scores and their stability, and a heat map.
    """
    from forcing_kv.calibration.head_profile import HeadRule
    from forcing_kv.calibration.heads import HEADS_FILE, PICTURE_FILE, HeadCalibration
    from forcing_kv.calibration.model_source import load_source
    from forcing_kv.calibration.rollouts import ProfilePlan
    from forcing_kv.export.request import ExportRequest
    from forcing_kv.runtime_trt.schedule import Schedule

    files = [out / HEADS_FILE, out / PICTURE_FILE]
    existing = [str(file) for file in files if file.exists()]
    if existing and not force:
        raise InputError(f"{existing} exist; choose another --out, or overwrite with --force")
    check_folder(out)
    require("matplotlib")
    steps = parse_numbers("--denoise-steps", denoise_steps) if denoise_steps else None
    request = ExportRequest(
        model=model,
        checkpoint=checkpoint,
        config=config,
        weights=cast(Any, weights),
        lora=lora,
        lora_alpha=lora_alpha,
        latent_size=parse_latent_size("--latent-size", latent_size) if latent_size else None,
        chunk_frames=chunk_frames,
        schedule=Schedule(steps, warped) if steps else None,
        dtype=cast(Any, dtype),
    )
    source = load_source(request, prompt or [], prompt_embeds)
    calibration = HeadCalibration(
        source,
        ProfilePlan(
            num_chunks,
            parse_integers("--profile-chunks", profile_chunks) if profile_chunks else None,
            parse_integers("--profile-steps", profile_steps) if profile_steps else None,
            HeadRule(source.threshold if threshold is None else threshold, skip_first, last_k),
        ),
        parse_integers("--seeds", seeds),
        window_frames,
        sink_frames,
        dtype,  # type: ignore[arg-type]  # checked by the rollout's configuration
        device,
    )
    talk(calibration.description)
    if dry_run:
        return
    with progress("profiling heads", calibration.num_passes) as bar:
        profile = calibration.run(bar.advance)
    record = calibration.write(out, profile)
    _show(record)
    talk(f"wrote {files[0]} and {files[1]}")
    if as_json:
        print_json(record)


def parse_integers(option: str, text: str) -> tuple[int, ...]:
    """Read a list such as `0,3,5`.

    Raises:
        InputError: another form.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} is {text!r}; give integers such as 0,3,5") from error


def parse_numbers(option: str, text: str) -> tuple[float, ...]:
    """Read a list such as `1000,750`.

    Raises:
        InputError: another form.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} is {text!r}; give numbers such as 1000,750") from error


def _show(record: Mapping[str, Any]) -> None:
    """Print the partition, a row a layer, and how stable it is."""
    from rich.table import Column, Table

    heads = Column("heads (S static)", overflow="fold")
    table = Table("layer", "static", "dynamic", heads, "score from", "to")
    for layer, scores in zip(record["layers"], record["scores"], strict=True):
        static = set(layer["static_head"])
        table.add_row(
            str(layer["layer_idx"]),
            str(len(static)),
            str(len(layer["dynamic_head"])),
            "".join("S" if head in static else "." for head in range(record["num_heads"])),
            f"{min(scores):.3f}",
            f"{max(scores):.3f}",
        )
    console().print(table)
    stability = record["stability"]
    talk(f"{record['num_static']} static, {record['num_dynamic']} dynamic heads")
    talk(
        f"stability over {stability['num_samples']} passes: a single pass agrees with the pooled "
        f"class for {stability['agreement']:.1%} of heads, two passes with each other for "
        f"{stability['pairwise_agreement']:.1%}; {stability['unanimous_heads']:.1%} of heads never "
        f"change; score deviates by {stability['mean_score_std']:.3f}"
    )
    for name, groups in stability["agreement_by"].items():
        if len(groups) > 1:
            worst = min(groups, key=groups.__getitem__)
            talk(f"  by {name}: at least {groups[worst]:.1%} of heads agree ({name} {worst!r})")
