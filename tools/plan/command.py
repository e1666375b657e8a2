"""`fkv plan`: what a deployment needs and can reach, before anything is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from forcing_kv.export.cost.devices import find_device
from forcing_kv.export.request.flags import File, Int, Json, between, flags
from forcing_kv.runtime_trt.bundle.atomic.files import check_file, replaced_file
from forcing_kv.runtime_trt.console import print_json, talk
from forcing_kv.runtime_trt.rollout.resolution import pixel_text
from forcing_kv.tools.plan.report import Plan, draw, print_tables
from forcing_kv.tools.plan.request import PlanRequest, Subject, resolve


@flags()
@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Which policies are planned, for which GPU, and how that is shown."""

    policy: str = "forcing-kv"
    """forcing-kv (the model's own), dense, a .json file of policy fields, or changes such as
    num_sink_frames=0,num_temporal_frames=2."""
    device: str = "h200"
    """GPU to plan for, such as rtx4090 or h100; an unknown name lists them all."""
    num_chunks: Annotated[Int, between(1, 10_000)] = 7
    """Chunks that the mean is taken over; 7 make 5 s of video."""
    compare: str | None = None
    """A second policy to show beside, such as dense."""
    plot: File | None = None
    """Write stacked bars to this .png."""
    force: bool = False
    """Replace an earlier one."""
    as_json: Json = False
    """Print the numbers."""


def plan(*, request: PlanRequest = PlanRequest(), options: PlanOptions = PlanOptions()) -> None:
    """Predict memory, FLOPs, ideal times, frame rate and fit, before anything is built."""
    plot = options.plot
    if plot is not None:
        check_file(plot, [".png"], "--plot", force=options.force)
    target = find_device(options.device)
    policies = [policy for policy in (options.policy, options.compare) if policy is not None]
    subject = resolve(request, policies)
    plans = [
        Plan(
            policy, subject.config(policy), target, subject.heads_source, options.num_chunks,
            subject.fp8, request.native_attention,
        )
        for policy in policies
    ]  # fmt: skip
    if options.as_json:
        record, *others = [plan.to_json() for plan in plans]
        print_json(record | ({"compare": others[0]} if others else {}))
    else:
        talk(_headline(subject, plans[0]))
        print_tables(plans)
    if plot is not None:
        with replaced_file(plot, force=options.force) as file:
            draw(file, plans)
        talk(f"wrote {plot}")


def _headline(subject: Subject, plan: Plan) -> str:
    config = plan.config
    total = config.model.num_layers * config.model.num_heads
    rows, columns = config.chunk.latent_height, config.chunk.latent_width
    pixels = f" ({pixel_text((rows, columns))})" if subject.has_wan_pixels else ""
    return (
        f"{subject.name} at {rows}x{columns} latents{pixels}, "
        f"{config.dtype}{', linear layers in FP8' if plan.fp8 else ''}, "
        f"{config.schedule.num_steps} steps and a clean pass a chunk; "
        f"{config.partition.num_static_heads} static heads of {total} ({plan.heads_source})"
    )
