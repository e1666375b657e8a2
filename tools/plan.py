"""`fkv plan`: what a deployment needs and can reach, before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forcing_kv.export.devices import find_device
from forcing_kv.runtime_trt.console import print_json, talk
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.tools.plan_report import Plan, draw, print_tables
from forcing_kv.tools.plan_request import PlanRequest, resolve


def plan(
    model: Annotated[
        str | None,
        typer.Option(help="Preset (default self-forcing-1.3b), or a preset in a .json file."),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Plan for this bundle's own configuration instead.")
    ] = None,
    resolution: Annotated[
        str | None,
        typer.Option(
            "--resolution",
            "--latent-size",
            help="480p, 720p, 1080p, or latent rows x columns: 60x104. Default: the model's own, "
            "480p.",
        ),
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            help="forcing-kv (the model's own), dense, a .json file of policy fields, or changes "
            "such as num_sink_frames=0,num_temporal_frames=2."
        ),
    ] = "forcing-kv",
    heads: Annotated[Path | None, typer.Option(help="Head partition file.")] = None,
    static_heads: Annotated[
        int | None,
        typer.Option(help="Without a file: static heads of all layers, spread evenly."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16 (the default), float16 or float32.")
    ] = None,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="Linear layers in FP8, as `fkv export --fp8`.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="rtx4080, rtx4090, rtx5090, l40s, a100, h100, h200 or b200.")
    ] = "h200",
    num_chunks: Annotated[
        int, typer.Option(help="Chunks that the mean is taken over; 7 make 5 s of video.", min=1)
    ] = 7,
    compare: Annotated[
        str | None, typer.Option(help="A second policy to show beside, such as dense.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write stacked bars to this .png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers.")] = False,
) -> None:
    """Predict memory, FLOPs, ideal times, frame rate and fit, before anything is built."""
    if plot is not None and plot.suffix != ".png":
        raise InputError(f"--plot is {plot}; give a .png file")
    target = find_device(device)
    request = PlanRequest(model, bundle, resolution, heads, static_heads, dtype, fp8 or None)
    subject = resolve(request)
    plans = [
        Plan(text, subject.config(text), target, subject.heads_source, num_chunks, subject.fp8)
        for text in (policy, *([] if compare is None else [compare]))
    ]
    if as_json:
        record = plans[0].to_json()
        print_json(record | ({"compare": plans[1].to_json()} if compare is not None else {}))
    else:
        talk(_headline(subject.name, plans[0]))
        print_tables(plans)
    if plot is not None:
        draw(plot, plans)
        talk(f"wrote {plot}")


def _headline(name: str, plan: Plan) -> str:
    config = plan.config
    total = config.model.num_layers * config.model.num_heads
    return (
        f"{name} at {config.chunk.latent_height}x{config.chunk.latent_width} latents, "
        f"{config.dtype}{', linear layers in FP8' if plan.fp8 else ''}, "
        f"{config.schedule.num_steps} steps and a clean pass a chunk; "
        f"{plan.num_static_heads} static heads of {total} ({plan.heads_source})"
    )
