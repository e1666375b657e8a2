"""A head calibration from start to end: rollouts, profile, `heads.json` and `heads.png`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from forcing_kv.calibration.heads.head_profile import HeadProfile
from forcing_kv.calibration.heads.picture import draw_heads
from forcing_kv.calibration.heads.record import heads_record
from forcing_kv.calibration.heads.rollouts import ProfilePlan, profile_heads, recorded_chunks
from forcing_kv.calibration.model_source import ModelSource
from forcing_kv.runtime_trt.bundle.files import write_json
from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.runtime_trt.rollout.config import RolloutConfig

HEADS_FILE = "heads.json"
PICTURE_FILE = "heads.png"


@dataclass(frozen=True)
class HeadCalibration:
    """Every prompt of a model with every seed, generated under dense attention."""

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
    def num_passes(self) -> int:
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

    def run(self, on_pass: Callable[[], object] | None = None) -> HeadProfile:
        """Generate and record.

        Args:
            on_pass: called in each of `num_passes` passes.
        """
        rollouts = self.source.rollouts(self.seeds)
        return profile_heads(
            self.source.model, self.config, rollouts, self.plan, device=self.device, on_pass=on_pass
        )

    def write(self, folder: Path, profile: HeadProfile) -> dict[str, Any]:
        """Write `heads.json` and `heads.png` to a folder.

        Returns:
            The content of `heads.json`.
        """
        record = heads_record(profile, self.config, self.source.sha256)
        rule = profile.rule
        draw_heads(
            folder / PICTURE_FILE,
            profile.pooled_LH,
            rule.threshold,
            f"{self.source.name}: mass of the last {rule.last_k} of {profile.num_key_frames} "
            f"key frames, threshold {rule.threshold:g}",
        )
        write_json(folder / HEADS_FILE, record)
        return record
