"""A head calibration from start to end: rollouts, profile, `heads.json` and `heads.png`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from forcing_kv.calibration.heads.head_profile import HeadProfile
from forcing_kv.calibration.heads.picture import draw_heads
from forcing_kv.calibration.heads.record import heads_record
from forcing_kv.calibration.heads.rollouts import ProfilePlan, profile_heads, recorded_chunks
from forcing_kv.calibration.model_source import ModelSource
from forcing_kv.runtime_trt.bundle.atomic.files import write_json
from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.runtime_trt.rollout.config import RolloutConfig


@dataclass(frozen=True)
class HeadCalibration:
    """Every prompt of a model with every seed, generated under dense attention."""

    FILES: ClassVar = ("heads.json", "heads.png")

    source: ModelSource
    plan: ProfilePlan
    seeds: tuple[int, ...] = (0, 1)
    window_frames: int | None = None
    """Frames that a query sees, sink and own chunk included; None lets it see all."""
    num_sink_frames: int = 0
    """First frames that stay in the window."""
    dtype: DType = "float32"
    device: str = "cpu"

    @cached_property
    def config(self) -> RolloutConfig:
        """The dense rollout."""
        return self.source.dense_config(
            self.plan.num_chunks, self.window_frames, self.dtype, self.num_sink_frames
        )

    @property
    def num_ticks(self) -> int:
        """Passes of the denoiser in all rollouts together."""
        chunks = len(self.source.rollouts(self.seeds)) * self.plan.num_chunks
        return chunks * (self.source.schedule.num_steps + 1)

    @property
    def description(self) -> str:
        """What will run, one line."""
        return (
            f"{self.source.name}: {len(self.source.prompts)} prompts x {len(self.seeds)} seeds, "
            f"{self.plan.num_chunks} chunks each; recording chunks "
            f"{list(recorded_chunks(self.plan, self.config))} under a dense window of "
            f"{self.config.policy.num_sink_frames + self.config.policy.warmup_frames} past frames, "
            f"whose K and V take {self.config.nbytes_kv / 1e6:,.1f} MB"
        )

    def run(self, on_tick: Callable[[], object] | None = None) -> HeadProfile:
        """Generate and record; `on_tick` is called in each of `num_ticks` passes."""
        rollouts = self.source.rollouts(self.seeds)
        return profile_heads(
            self.source.model, self.config, rollouts, self.plan, device=self.device, on_pass=on_tick
        )

    def write(self, folder: Path, measured: HeadProfile) -> dict[str, Any]:
        """Write `heads.json` and `heads.png` to a folder; returns the content of the former."""
        record, rule = heads_record(measured, self.config, self.source.sha256), measured.rule
        file, picture = self.FILES
        draw_heads(
            folder / picture,
            measured.pooled_LH,
            rule.threshold,
            f"{self.source.name}: mass of the last {rule.last_k} of {measured.num_key_frames} "
            f"key frames, threshold {rule.threshold:g}",
        )
        write_json(folder / file, record)
        return record
