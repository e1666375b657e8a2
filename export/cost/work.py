"""Arithmetic and time bounds of a deployment, from its configuration alone.

FLOPs are exact for what is counted; times are lower bounds. Nothing is loaded, and torch is not
needed. Memory is in `memory.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from forcing_kv.export.cost.devices import Device
from forcing_kv.export.cost.memory import NO_FP8, weight_counts
from forcing_kv.export.request.presets import PIXEL_FRAMES_PER_LATENT
from forcing_kv.runtime_trt.bundle.fp8 import Fp8Counts
from forcing_kv.runtime_trt.dtypes import DTYPES, DType
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.policy import HeadKind
from forcing_kv.runtime_trt.rollout.timeline import Timeline

History = Mapping[HeadKind, int]
"""Frames of rows that a head of each kind sees, its own chunk not counted."""


def histories(config: RolloutConfig, num_chunks: int) -> list[History]:
    """What heads see before each of the first chunks."""
    timeline = Timeline(config.policy, config.chunk.num_frames)
    plans = [timeline.advance() for _ in range(num_chunks)]
    return [{kind: g.history_frames for kind, g in plan.groups.items()} for plan in plans]


def _until_steady(config: RolloutConfig) -> list[History]:
    """What heads see before each chunk, up to one where nothing changes any more."""
    policy, frames = config.policy, config.chunk.num_frames
    filled = -(-(policy.num_sink_frames + policy.warmup_frames) // frames)
    # Two chunks after the warm-up the first selection is in place.
    return histories(config, policy.last_warmup_chunk + filled + 4)


def steady_history(config: RolloutConfig) -> History:
    """What heads see once nothing changes any more."""
    return _until_steady(config)[-1]


def first_steady_chunk(config: RolloutConfig) -> int:
    """First chunk from which on every chunk sees as many rows."""
    seen = _until_steady(config)
    changing = [index for index, history in enumerate(seen) if history != seen[-1]]
    return max(changing, default=-1) + 1


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


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step by what is multiplied; a multiply-add is two.

    Norms, gates and rotations count as fused into their neighbours.
    """

    self_attention: float
    """Attention to history and own chunk, the mean over chunks."""
    text_attention: float
    """Attention to the text."""
    projections: float
    """q, k, v and output of self-attention."""
    text_projections: float
    """q and output of cross-attention, whose k and v are made once a prompt."""
    feed_forward: float
    patches: float
    """Patch embedding and head."""
    time_embedding: float


def step_flops(config: RolloutConfig, history: Sequence[History]) -> StepFlops:
    """FLOPs of one step, the mean over chunks with these histories."""
    model, chunk = config.model, config.chunk
    num_tokens, dim = chunk.num_tokens, model.dim
    square = 2 * model.num_layers * num_tokens * dim**2
    return StepFlops(
        self_attention=4 * num_tokens * attended_keys(config, history) * model.head_dim,
        text_attention=4 * model.num_layers * num_tokens * model.text_len * dim,
        projections=4 * square,
        text_projections=2 * square,
        feed_forward=4 * model.num_layers * num_tokens * dim * model.ffn_dim,
        patches=4 * num_tokens * dim * model.patch_size**2 * model.in_channels,
        time_embedding=2 * dim * (model.freq_dim + 7 * dim),
    )


def clean_flops(config: RolloutConfig, history: History) -> float:
    """FLOPs of a clean pass that ends at the last layer's keys and values.

    The embedding of the time is not counted: it is one row, and may come from a table.
    """
    flops, layers = step_flops(config, [history]), config.model.num_layers
    last, own = config.layouts[-1], config.chunk.num_frames
    frames = sum(group.num_heads * (history[group.kind] + own) for group in last.groups)
    keys = frames * config.chunk.tokens_per_frame
    uncut = sum(vars(flops).values()) - flops.time_embedding
    attention = 4 * config.chunk.num_tokens * keys * config.model.head_dim
    # Queries and output; keys and values are what is wanted.
    ends = (flops.projections / 2, flops.text_projections, flops.text_attention, flops.feed_forward)
    return uncut - attention - sum(ends) / layers - flops.patches / 2


def attended_keys(config: RolloutConfig, history: Sequence[History]) -> float:
    """Keys that all heads of all layers attend to, the mean over chunks with these histories."""
    return fmean(head_frames(config, each) for each in history) * config.chunk.tokens_per_frame


def step_cost(
    config: RolloutConfig, history: Sequence[History], fp8: Fp8Counts = NO_FP8
) -> tuple[PartCost, ...]:
    """FLOPs and bytes of one step by part, the mean over chunks with these histories.

    Rounding to FP8 counts as fused, and smaller activations as if they were not smaller.
    """
    model, dtype = config.model, config.dtype
    num_tokens, dim = config.chunk.num_tokens, model.dim
    layers, size = model.num_layers, DTYPES[dtype].nbytes
    flops = step_flops(config, history)
    stream = layers * num_tokens * dim * size
    text = 2 * layers * dim * model.text_len * size
    patch = model.patch_size**2 * model.in_channels
    keys = attended_keys(config, history)
    # What is read and written beside the weights.
    moved = {
        "projections": (flops.projections, 8 * stream),
        "cross-attention": (flops.text_projections + flops.text_attention, text + 6 * stream),
        "feed-forward": (flops.feed_forward, stream * (2 + 2 * model.ffn_dim / dim)),
        "embeddings and head": (
            flops.patches + flops.time_embedding,
            2 * num_tokens * (dim * size + patch * 4),
        ),
    }
    counts = weight_counts(model, fp8)
    attention = PartCost(
        "self-attention", flops.self_attention, 2 * keys * model.head_dim * size + 2 * stream
    )
    return (
        attention,
        *(
            PartCost(
                part, work, counts[part].nbytes(dtype) + nbytes, 2 * num_tokens * counts[part].fp8
            )
            for part, (work, nbytes) in moved.items()
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
