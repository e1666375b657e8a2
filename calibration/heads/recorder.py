"""Observes the self-attention of dense rollouts in the eager engine.

Legend: L layers, H heads, Fq query frames, Fk key frames.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from forcing_kv.calibration.heads.head_profile import HeadProfile, Sample
from forcing_kv.calibration.heads.rule import HeadRule, frame_mass
from forcing_kv.export.verify.eager import AttentionCall
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig


def num_key_frames(config: RolloutConfig, chunk: int) -> int:
    """Key frames that the queries of `chunk` see under a dense policy, its own included."""
    policy, num_frames = config.policy, config.chunk.num_frames
    past = chunk * num_frames
    return num_frames + min(past, policy.num_sink_frames + policy.warmup_frames)


def widest_chunks(config: RolloutConfig, num_chunks: int) -> tuple[int, ...]:
    """The chunks of a rollout that see the most key frames.

    A score depends on how many frames there are to look at (a head that looks everywhere alike has
    last_k / (Fk - skip_first)), so passes of different width are not pooled by default.
    """
    widths = [num_key_frames(config, chunk) for chunk in range(num_chunks)]
    return tuple(chunk for chunk, width in enumerate(widths) if width == max(widths))


class HeadRecorder:
    """An observer for the eager engine: every call is reduced to the frame map of its heads.

    Args:
        config: dense rollout.
        chunks: chunks whose passes are recorded.
        steps: denoise steps to record, the number of steps for the clean pass; None for all.
    """

    def __init__(
        self,
        config: RolloutConfig,
        chunks: Collection[int],
        steps: Collection[int] | None = None,
    ) -> None:
        policy = config.policy
        if policy.num_dynamic_frames or policy.num_static_frames != policy.num_temporal_frames:
            raise InputError(
                "heads are profiled under dense attention, but this policy compresses; use "
                "CachePolicy.dense"
            )
        self._config = config
        self._chunks = frozenset(chunks)
        self._steps = frozenset(range(config.schedule.num_steps + 1) if steps is None else steps)
        self._rollout = ("", 0)
        self._maps: dict[Sample, Tensor] = {}

    def begin(self, prompt: str, seed: int) -> None:
        """Name the rollout that the next calls belong to."""
        self._rollout = (prompt, seed)

    @torch.inference_mode()
    def __call__(self, call: AttentionCall) -> None:
        """Record one self-attention, if its chunk and step are wanted."""
        if call.chunk not in self._chunks or call.step not in self._steps:
            return
        tokens = self._config.chunk.tokens_per_frame
        mass_HFqFk = frame_mass(
            call.q,
            call.k,
            torch.tensor(call.key_frames, device=call.k.device).repeat_interleave(tokens),
            call.q.shape[1] // tokens,
        )
        sample, shape = Sample(*self._rollout, call.chunk, call.step), self._config.model
        if sample not in self._maps:
            size = (shape.num_layers, shape.num_heads, *mass_HFqFk.shape[1:])
            self._maps[sample] = torch.full(size, math.nan)
        self._maps[sample][call.layer, list(call.heads)] = mass_HFqFk.cpu()

    def profile(self, rule: HeadRule) -> HeadProfile:
        """Everything recorded so far.

        Raises:
            InputError: nothing was recorded.
        """
        return HeadProfile(tuple(self._maps), tuple(self._maps.values()), rule)
