"""The digits model under several cache policies on the same prompts and noise.

Legend: F frames, C latent channels, P segments per frame, B dynamic budget in frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.export.checkpoint.fp8_file import read_fp8
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.model.fp8_layers import quantize_, scales_for
from forcing_kv.export.model.rewrite import share_weights
from forcing_kv.export.request.presets import DENSE_WINDOW_FRAMES
from forcing_kv.export.verify.eager import eager_session
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import HeadPartition
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.tools.digits import codec, text
from forcing_kv.tools.digits.evaluation import metrics
from forcing_kv.tools.digits.shipped import (
    CHUNK,
    FP8,
    MODEL,
    POLICY,
    SCHEDULE,
    encode_prompt,
)
from forcing_kv.tools.digits.training.sequences import HELDOUT_CAPTIONS

FIRST_SEED = 1000
"""Seed of the first clip; each clip has its own, the same in every variant."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Variant:
    """One cache policy to compare."""

    name: str
    policy: CachePolicy
    partition: HeadPartition
    random_segments: bool = False
    """Whether segments are drawn at random instead of by similarity."""
    fp8: bool = False
    """Whether linear layers run in FP8."""

    @property
    def config(self) -> RolloutConfig:
        """The variant's rollout configuration."""
        return RolloutConfig(MODEL, CHUNK, self.policy, self.partition, SCHEDULE)


def standard_variants(partition: HeadPartition) -> tuple[Variant, ...]:
    """Dense, Forcing-KV with `partition`, and what it must beat.

    `recency-only` spends the segments' memory on recent frames, in the same heads: T_d + B local
    frames and no segments. Its layer 0 is all static and its warm-up is clipped, so that nothing
    but the segments changes and the bytes are equal. One variant keeps one local frame, as the
    published policies of large models do; the last has its linear layers in FP8.
    """
    dynamic = HeadPartition.uniform(MODEL.num_layers, MODEL.num_heads, static=False)
    static = HeadPartition.uniform(MODEL.num_layers, MODEL.num_heads, static=True)
    local = POLICY.num_temporal_frames + POLICY.num_dynamic_frames
    no_segments = replace(POLICY, num_dynamic_frames=0)
    recency = replace(
        no_segments, num_temporal_frames=local, compress_first_layer=True, warmup="steady"
    )
    one_frame = replace(POLICY, num_static_frames=1, num_temporal_frames=1)
    every_head = static.static_heads[:1]
    same_heads = HeadPartition(MODEL.num_heads, every_head + partition.static_heads[1:])
    return (
        Variant("dense", CachePolicy.dense(DENSE_WINDOW_FRAMES, CHUNK.num_frames), dynamic),
        Variant("forcing-kv", POLICY, partition),
        Variant("recency-only", recency, same_heads),
        Variant("random segments", POLICY, partition, random_segments=True),
        Variant("all-static", no_segments, static),
        Variant("no context", CachePolicy(0, 0, 0, 0, last_warmup_chunk=0), static),
        Variant("forcing-kv, one frame", one_frame, partition),
        Variant("forcing-kv, FP8", POLICY, partition, fp8=True),
    )


@dataclass(frozen=True)
class Clip:
    """What to generate."""

    caption: str
    seed: int


def clips_of(count: int) -> list[Clip]:
    """`count` clips that go through all forty captions, each with a new seed."""
    captions = [
        text.caption_of(digit, direction) for digit in range(10) for direction in text.DIRECTIONS
    ]
    return [Clip(captions[i % len(captions)], FIRST_SEED + i) for i in range(count)]


class _RandomChoice:
    """Keeps as many segments as the policy does, at random; every clip starts its own sequence."""

    def __init__(self, num_kept: int) -> None:
        self._num_kept = num_kept
        self.restart(0)

    def restart(self, seed: int) -> None:
        self._rng = np.random.Generator(np.random.Philox(key=seed))

    def __call__(self, scores: Float32) -> NDArray[np.int32]:
        return np.sort(self._rng.permutation(scores.size)[: self._num_kept]).astype(np.int32)


def generate(
    model: CausalWanModel, variant: Variant, clips: Sequence[Clip], num_chunks: int
) -> Float32:
    """Latents [clips, F, C, h, w] of clips under a variant's policy, in the eager backend."""
    if variant.fp8:
        scales = scales_for(model, read_fp8(FP8, MODEL).amax)
        model = quantize_(share_weights(model), scales)
    choice = _RandomChoice(variant.policy.num_kept_segments)
    latents = []
    with eager_session(
        model, variant.config, select=choice if variant.random_segments else None
    ) as session:
        for clip in clips:
            choice.restart(clip.seed)
            session.reset()
            session.set_prompt(encode_prompt(clip.caption))
            chunks = session.stream(num_chunks, seed=clip.seed)
            latents.append(np.concatenate([chunk.latents for chunk in chunks]))
    return np.stack(latents)


@dataclass(frozen=True)
class VariantResult:
    """Measures of one variant at one length."""

    variant: Variant
    clips: Sequence[metrics.ClipMeasures]
    latent_distance: NDArray[np.float64]
    """RMS difference of latents from the first variant's on the same noise, [clips, F]."""

    def by_clip(self) -> dict[str, NDArray[np.float64]]:
        """Every measure of each clip, [clips]."""
        clips = [asdict(clip) for clip in self.clips]
        names = [name for name, value in clips[0].items() if np.ndim(value) == 0]
        values = {name: np.array([clip[name] for clip in clips]) for name in names}
        return values | {"latent_distance": self.latent_distance.mean(1)}

    def statistics(self) -> dict[str, dict[str, float]]:
        """Mean and standard error over clips of every measure."""
        return {name: _statistics(values) for name, values in self.by_clip().items()}

    def change_from(self, reference: VariantResult) -> dict[str, dict[str, float]]:
        """Mean and standard error of every measure minus that of the clip in another variant."""
        other = reference.by_clip()
        return {name: _statistics(values - other[name]) for name, values in self.by_clip().items()}


def _statistics(values: NDArray[np.float64]) -> dict[str, float]:
    error = values.std() / max(1, len(values) - 1) ** 0.5
    return {"mean": float(values.mean()), "sem": float(error)}


def compare(
    variants: Sequence[Variant], clips: Sequence[Clip], latents: Sequence[Float32]
) -> list[VariantResult]:
    """Measure the clips of every variant; the first is the reference of latent distances.

    Args:
        variants: policies.
        clips: captions and seeds.
        latents: [clips, F, C, h, w] of each variant.
    """
    results = []
    for variant, made in zip(variants, latents, strict=True):
        measures = [
            metrics.measure_clip(video, clip.caption, CHUNK.num_frames)
            for video, clip in zip(codec.decode(made), clips, strict=True)
        ]
        difference = (made - latents[0]).astype(np.float64)
        results.append(VariantResult(variant, measures, np.sqrt((difference**2).mean((2, 3, 4)))))
    return results


def variant_record(
    result: VariantResult, clips: Sequence[Clip], dense: VariantResult
) -> dict[str, Any]:
    """A variant as plain data for JSON, with its changes from the dense variant clip by clip."""
    heldout = {text.caption_of(*pair) for pair in HELDOUT_CAPTIONS}
    unseen = [i for i, clip in enumerate(clips) if clip.caption in heldout]
    digit_right = np.stack([clip.digit_right for clip in result.clips])
    position_error = np.stack([clip.distance for clip in result.clips])
    return {
        "name": result.variant.name,
        "nbytes_kv": result.variant.config.nbytes_kv,
        "policy": asdict(result.variant.policy),
        "static_heads": [list(heads) for heads in result.variant.partition.static_heads],
        "measures": result.statistics(),
        "change_from_dense": result.change_from(dense),
        "digit_on_untrained_captions": float(digit_right[unseen].mean()),
        "digit_by_frame": digit_right.mean(0).round(4).tolist(),
        "position_error_by_frame": position_error.mean(0).round(4).tolist(),
        "latent_distance_by_frame": result.latent_distance.mean(0).round(5).tolist(),
    }
