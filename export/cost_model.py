"""Arithmetic and time bounds of a deployment, from its configuration alone.

FLOPs are exact for what is counted; times are lower bounds. Nothing is loaded, and torch is not
needed. Memory is in `memory_model.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from forcing_kv.export.devices import Device
from forcing_kv.export.memory_model import NO_FP8, weight_counts
from forcing_kv.runtime_trt.config import RolloutConfig
from forcing_kv.runtime_trt.dtypes import DTYPES, DType
from forcing_kv.runtime_trt.fp8 import Fp8Counts
from forcing_kv.runtime_trt.layout import HeadKind
from forcing_kv.runtime_trt.timeline import Timeline

PIXEL_FRAMES_PER_LATENT = 4
"""One latent frame of the Wan VAE decodes to four pixel frames."""

History = Mapping[HeadKind, int]
"""Frames of rows that a head of each kind sees, its own chunk not counted."""


def histories(config: RolloutConfig, num_chunks: int) -> list[History]:
    """What heads see before each of the first chunks."""
    timeline = Timeline(config.policy, config.chunk.num_frames)
    plans = [timeline.advance() for _ in range(num_chunks)]
    return [{kind: g.history_frames for kind, g in plan.groups.items()} for plan in plans]


def steady_history(config: RolloutConfig) -> History:
    """What heads see once nothing changes any more."""
    policy, frames = config.policy, config.chunk.num_frames
    filled = -(-(policy.num_sink_frames + policy.warmup_frames) // frames)
    # Two chunks after the warm-up the first selection is in place.
    return histories(config, policy.last_warmup_chunk + filled + 4)[-1]


def head_frames(config: RolloutConfig, history: History) -> int:
    """Frames attended, own chunk included, summed over all heads of all layers."""
    own = config.chunk.num_frames
    return sum(
        group.num_heads * (history[group.kind] + own)
        for layout in config.layouts
        for group in layout.groups
    )


def mean_frames(config: RolloutConfig, history: History) -> float:
    """Frames attended by the average head, own chunk included."""
    return head_frames(config, history) / (config.model.num_layers * config.model.num_heads)


def attended_nbytes(config: RolloutConfig, history: History) -> int:
    """Bytes of K and V that one step attends to, own chunk included."""
    row = config.model.head_dim * DTYPES[config.dtype].nbytes
    return 2 * head_frames(config, history) * config.chunk.tokens_per_frame * row


@dataclass(frozen=True)
class PartCost:
    """One part of a step."""

    name: str
    flops: float
    nbytes: float
    """Bytes that must cross the memory bus: weights, K and V, inputs and outputs."""
    fp8_flops: float = 0
    """Those of `flops` that are products in FP8."""

    def ideal_ms(self, device: Device, dtype: DType) -> float:
        """Lower bound of its time: arithmetic or bandwidth, whichever is slower."""
        wide = self.flops - self.fp8_flops
        arithmetic = wide / (device.sustained_tflops(dtype) * 1e9)
        if self.fp8_flops:
            arithmetic += self.fp8_flops / (device.sustained_fp8_tflops * 1e9)
        return max(arithmetic, self.nbytes / (device.bandwidth_gbps * 1e6))


def step_cost(
    config: RolloutConfig, history: Sequence[History], fp8: Fp8Counts = NO_FP8
) -> tuple[PartCost, ...]:
    """FLOPs and bytes of one step by part, the mean over chunks with these histories.

    A multiply-add is two FLOPs. Norms, gates and rotations count as fused into their neighbours;
    so does rounding to FP8, whose smaller activations are counted as if they were not smaller.
    """
    model, chunk, dtype = config.model, config.chunk, config.dtype
    num_tokens, dim, ffn = chunk.num_tokens, model.dim, model.ffn_dim
    layers, size = model.num_layers, DTYPES[dtype].nbytes
    counts = weight_counts(model, fp8)
    weights = {part: count.nbytes(dtype) for part, count in counts.items()}
    rounded = {part: 2 * num_tokens * count.fp8 for part, count in counts.items()}
    stream = layers * num_tokens * dim * size
    frames = fmean(head_frames(config, each) for each in history)
    keys = frames * chunk.tokens_per_frame
    text = 2 * layers * dim * model.text_len * size
    patch = model.patch_size**2 * model.in_channels
    time = dim * (model.freq_dim + 7 * dim)
    cross = layers * (4 * num_tokens * dim**2 + 4 * num_tokens * model.text_len * dim)
    return (
        PartCost(
            "self-attention",
            4 * num_tokens * keys * model.head_dim,
            2 * keys * model.head_dim * size + 2 * stream,
        ),
        PartCost(
            "projections",
            8 * layers * num_tokens * dim**2,
            weights["projections"] + 8 * stream,
            rounded["projections"],
        ),
        PartCost(
            "cross-attention",
            cross,
            weights["cross-attention"] + text + 6 * stream,
            rounded["cross-attention"],
        ),
        PartCost(
            "feed-forward",
            4 * layers * num_tokens * dim * ffn,
            weights["feed-forward"] + stream * (2 + 2 * ffn / dim),
            rounded["feed-forward"],
        ),
        PartCost(
            "embeddings and head",
            4 * num_tokens * dim * patch + 2 * time,
            weights["embeddings and head"] + 2 * num_tokens * (dim * size + patch * 4),
        ),
    )


def num_passes(config: RolloutConfig) -> int:
    """Forward passes of a chunk: every denoise step and the clean pass."""
    return config.schedule.num_steps + 1


def fps_bound(config: RolloutConfig, parts: Sequence[PartCost], device: Device) -> float:
    """Pixel frames per second that the denoiser alone cannot exceed (no VAE, no text encoder)."""
    step_ms = sum(part.ideal_ms(device, config.dtype) for part in parts)
    frames = config.chunk.num_frames * PIXEL_FRAMES_PER_LATENT
    return frames / (num_passes(config) * step_ms / 1e3)
