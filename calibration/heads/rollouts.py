"""Head profiles of real rollouts: dense generation in the eager engine, observed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from forcing_kv.calibration.heads.head_profile import HeadProfile
from forcing_kv.calibration.heads.recorder import HeadRecorder, num_key_frames, widest_chunks
from forcing_kv.calibration.heads.rule import HeadRule
from forcing_kv.calibration.rollouts import Rollout
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.verify.eager import AttentionCall, eager_session
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig


@dataclass(frozen=True)
class ProfilePlan:
    """Which passes of every rollout are recorded, and by which rule heads are classified."""

    num_chunks: int = 7
    """Chunks of each rollout."""
    chunks: tuple[int, ...] | None = None
    """Chunks whose passes are recorded; None takes those that see the most frames."""
    steps: tuple[int, ...] | None = None
    """Denoise steps that are recorded, the clean pass last; None takes all."""
    rule: HeadRule = HeadRule()  # noqa: RUF009 - frozen


def profile_heads(
    model: CausalWanModel,
    config: RolloutConfig,
    rollouts: Sequence[Rollout],
    plan: ProfilePlan,
    *,
    device: torch.device | str = "cpu",
    on_pass: Callable[[], object] | None = None,
) -> HeadProfile:
    """Generate every rollout and record the attention mass of every head.

    Args:
        model: weights in checkpoint order; not changed.
        config: dense rollout, see `dense_config`.
        rollouts: at least one.
        plan: what to record.
        device: where to run.
        on_pass: called once a pass of the denoiser, for progress.

    Raises:
        InputError: no rollout, a chunk or step that the rollouts do not have, or chunks that see
            so few frames that every head would be static.
    """
    if not rollouts:
        raise InputError("no rollout to profile; give at least one prompt and one seed")
    _require_device(device)
    recorder = HeadRecorder(config, recorded_chunks(plan, config), plan.steps)

    def observe(call: AttentionCall) -> None:
        recorder(call)
        if on_pass is not None and call.layer == config.model.num_layers - 1:
            on_pass()

    with eager_session(model, config, device=device, observer=observe) as session:
        for rollout in rollouts:
            recorder.begin(rollout.prompt, rollout.seed)
            for _ in rollout.generate(session, plan.num_chunks):
                pass
    return recorder.profile(plan.rule)


def recorded_chunks(plan: ProfilePlan, config: RolloutConfig) -> tuple[int, ...]:
    """The chunks whose passes are recorded.

    Raises:
        InputError: chunks or steps that the rollouts do not have, or chunks that see so few frames
            that every head would be static.
    """
    chunks = widest_chunks(config, plan.num_chunks) if plan.chunks is None else plan.chunks
    _require_within("chunks", chunks, plan.num_chunks)
    _require_within("steps", plan.steps or (), config.schedule.num_steps + 1)
    rule, widths = plan.rule, [num_key_frames(config, chunk) for chunk in chunks]
    if not all(rule.is_informative(width) for width in widths):
        raise InputError(
            f"chunks {list(chunks)} see {widths} key frames, but with at most "
            f"{rule.last_k + rule.skip_first} every head counts as static; profile later chunks "
            "or a wider window"
        )
    return chunks


def _require_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {str(device)!r} cannot be used here: {reason}") from error


def _require_within(name: str, wanted: Collection[int], count: int) -> None:
    if not all(0 <= index < count for index in wanted):
        raise InputError(f"{name} {sorted(wanted)} to profile are not all within 0 to {count - 1}")
