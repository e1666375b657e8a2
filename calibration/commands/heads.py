"""`fkv calibrate heads`: profiles the attention heads of a model on real rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from forcing_kv.calibration.options import CalibrationOutput, RolloutOptions, SourceOptions
from forcing_kv.export.request.flags import Int, Integers, Natural, Numbers, YesNo, flags, panel
from forcing_kv.runtime_trt.console import console, talk
from forcing_kv.runtime_trt.rollout.schedule import Schedule


@flags(panel("Schedule"))
@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Denoising steps other than the model's own."""

    denoise_steps: Numbers | None = None
    """Denoising step list. Default: the model's own."""
    warped: YesNo = True
    """Whether that list indexes the shifted schedule."""

    @property
    def schedule(self) -> Schedule | None:
        """The schedule that was given, if any."""
        return None if self.denoise_steps is None else Schedule(self.denoise_steps, self.warped)


@flags()
@dataclass(frozen=True, kw_only=True)
class HeadRollouts(RolloutOptions):
    """Rollouts whose heads are profiled."""

    profile_chunks: Integers | None = None
    """Chunks to record, such as 5,6. Default: those that see the most frames."""
    profile_steps: Integers | None = None
    """Denoise steps to record; the clean pass is the last. Default: all."""
    sink_frames: Natural = 0
    """First frames that stay in that window."""
    device: str = "cpu"
    """PyTorch device."""


@flags(panel("Rule"))
@dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """What makes a head static."""

    threshold: float | None = None
    """Lowest score of a static head. Default: the model's own; 0.8 as published."""
    skip_first: Int = 1
    """First key frames left out."""
    last_k: Int = 4
    """Last key frames compared."""


def calibrate_heads(
    *,
    output: CalibrationOutput,
    model: SourceOptions = SourceOptions(),
    schedule: ScheduleOptions = ScheduleOptions(),
    rollouts: HeadRollouts = HeadRollouts(),
    rule: RuleOptions = RuleOptions(),
) -> None:
    """Find out which attention heads are static and which dynamic.

    Generates videos with dense attention, measures how much of each head's attention stays on the
    last frames, and writes the partition with its scores and their stability, and a heat map.
    """
    from forcing_kv.calibration.heads.calibration import HeadCalibration
    from forcing_kv.calibration.heads.rollouts import ProfilePlan
    from forcing_kv.calibration.heads.rule import HeadRule
    from forcing_kv.calibration.model_source import load_source

    output.check(HeadCalibration.FILES)
    source = load_source(replace(model, schedule=schedule.schedule))
    threshold = source.threshold if rule.threshold is None else rule.threshold
    calibration = HeadCalibration(
        source,
        ProfilePlan(
            rollouts.num_chunks, rollouts.profile_chunks, rollouts.profile_steps,
            HeadRule(threshold, rule.skip_first, rule.last_k),
        ),
        rollouts.seeds, rollouts.window_frames, rollouts.sink_frames, model.dtype, rollouts.device,
    )  # fmt: skip
    output.carry_out(calibration, "profiling heads", _show)


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
