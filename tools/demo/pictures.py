"""Pictures of the demo: side-by-side frames, kept segments, memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.backends.stream import Chunk
from forcing_kv.runtime_trt.dtypes import DTYPES
from forcing_kv.runtime_trt.errors import require
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import pool_nbytes
from forcing_kv.tools.digits import codec
from forcing_kv.tools.run.video import Uint8, gray_to_rgb

LABEL_HEIGHT = 28
GAP = 12
KIND_COLOURS = {
    "every": "#4c9a6a",
    "uncompressed": "#888888",
    "static": "#3b6fb6",
    "dynamic": "#e08a2e",
}


@dataclass(frozen=True)
class Clip:
    """One generated clip of the comparison."""

    config: RolloutConfig
    chunks: list[Chunk]

    @property
    def label(self) -> str:
        """The cache in a word or two."""
        policy = self.config.policy
        if policy.num_dynamic_frames:
            return "Forcing-KV"
        past = policy.num_sink_frames + policy.warmup_frames
        return f"dense, {past + self.config.chunk.num_frames} frames"

    @property
    def video(self) -> NDArray[np.float32]:
        """Frames [F, H, W] in 0..1."""
        return codec.decode(np.concatenate([chunk.latents for chunk in self.chunks]))

    @property
    def chunk_ms(self) -> list[float]:
        """Denoiser time of every chunk, eviction and commit included."""
        return [sum(chunk.timings_ms.values()) for chunk in self.chunks]


def side_by_side(clips: Sequence[Clip], scale: int = 8) -> Uint8:
    """Frames [F, height, width, 3] with one labelled column a clip."""
    columns = []
    for clip in clips:
        frames = gray_to_rgb(clip.video).repeat(scale, axis=1).repeat(scale, axis=2)
        label = _label(clip.label, frames.shape[2])
        strip = np.broadcast_to(label, (len(frames), *label.shape))
        columns.append(np.concatenate([strip, frames], axis=1))
        gap = np.full((*columns[-1].shape[:2], GAP, 3), 255, np.uint8)
        columns.append(gap)
    return np.concatenate(columns[:-1], axis=2)


def _label(text: str, width: int) -> Uint8:
    """White strip [LABEL_HEIGHT, width, 3] with centred text."""
    image, draw = require("PIL.Image"), require("PIL.ImageDraw")
    strip = image.new("RGB", (width, LABEL_HEIGHT), "white")
    font = require("PIL.ImageFont").load_default(14)
    draw.Draw(strip).text(
        (width // 2, LABEL_HEIGHT // 2), text, fill="black", font=font, anchor="mm"
    )
    return np.asarray(strip, np.uint8)


def _figure(width: float, height: float) -> Any:
    require("matplotlib")
    # A figure made without pyplot needs no display and leaves no global state behind.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw_kept_segments(clip: Clip, path: Path) -> None:
    """Candidate frames of every selecting chunk, with the segments that were kept in colour."""
    chosen = [chunk for chunk in clip.chunks if chunk.kept is not None]
    policy, shape = clip.config.policy, clip.config.chunk
    video, frames = clip.video, shape.num_frames
    figure = _figure(1.8 * frames + 1.2, 1.9 * max(1, len(chosen)) + 0.6)
    axes = figure.subplots(max(1, len(chosen)), frames, squeeze=False)
    for row, chunk in zip(axes, chosen, strict=False):
        kept = set(np.asarray(chunk.kept).tolist())
        first = chunk.index * frames - policy.num_temporal_frames
        for candidate, axis in enumerate(row):
            tokens = np.zeros(shape.tokens_per_frame)
            for segment in range(policy.num_segments):
                if candidate * policy.num_segments + segment in kept:
                    size = shape.tokens_per_frame // policy.num_segments
                    tokens[segment * size : (segment + 1) * size] = 1
            height, width = video.shape[1:]
            rows, columns = shape.grid
            mask = tokens.reshape(shape.grid).repeat(height // rows, 0).repeat(width // columns, 1)
            image = np.repeat(video[first + candidate][..., None], 3, axis=-1)
            tint = np.array([1.0, 0.55, 0.1])
            axis.imshow(np.where(mask[..., None] > 0, 0.55 * image + 0.45 * tint, image).clip(0, 1))
            axis.set_title(f"frame {first + candidate}", fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(f"after chunk {chunk.index}", fontsize=8)
    figure.suptitle("segments kept by similarity (orange)", fontsize=10)
    figure.savefig(path, dpi=110)


def draw_cost(clips: Sequence[Clip], path: Path) -> None:
    """K/V bytes by kind of head, and denoiser time of every chunk."""
    figure = _figure(9.0, 3.4)
    memory, timing = figure.subplots(1, 2)
    labelled: set[str] = set()
    for place, clip in enumerate(clips):
        base = 0.0
        for kind, nbytes in kv_nbytes_by_kind(clip.config).items():
            memory.bar(
                place, nbytes / 1e6, bottom=base, color=KIND_COLOURS[kind],
                label=None if kind in labelled else f"{kind} head{'s' * (kind != 'every')}",
            )  # fmt: skip
            labelled.add(kind)
            base += nbytes / 1e6
        memory.text(place, base, f"{base:.3f}", ha="center", va="bottom")
        timing.plot(clip.chunk_ms, marker="o", label=clip.label)
    memory.set_xticks(range(len(clips)), [clip.label for clip in clips])
    memory.set_ylabel("K/V cache, MB")
    memory.margins(y=0.15)
    memory.legend()
    timing.set_xlabel("chunk")
    timing.set_ylabel("denoiser, ms a chunk")
    timing.set_ylim(bottom=0)
    timing.legend()
    figure.savefig(path, dpi=110)


def kv_nbytes_by_kind(config: RolloutConfig) -> dict[str, int]:
    """Bytes of the K/V pools by kind of head, `every` where kinds make no difference."""
    if config.policy.num_dynamic_frames == 0:
        return {"every": config.nbytes_kv}
    totals: dict[str, int] = {}
    per_row = pool_nbytes(config.layouts[:1], config.model.head_dim, DTYPES[config.dtype].nbytes)
    per_row //= config.layouts[0].num_rows
    for layout in config.layouts:
        for group in layout.groups:
            totals[group.kind] = totals.get(group.kind, 0) + group.num_rows * per_row
    return totals
