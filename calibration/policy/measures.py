"""What a cache policy gave against dense attention: closeness, smooth joints, bytes, speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.rollout.config import RolloutConfig

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Candidate:
    """One configuration to measure."""

    threshold: float | None
    config: RolloutConfig

    @property
    def label(self) -> str:
        """Short name for tables and pictures."""
        policy = self.config.policy
        parts = [
            "" if self.threshold is None else f"t{self.threshold:g}",
            f"S{policy.num_static_frames}",
            f"T{policy.num_temporal_frames}",
            f"B{policy.num_dynamic_frames}",
            f"P{policy.num_segments}" if policy.num_dynamic_frames else "",
        ]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Measurement:
    """What one candidate gave."""

    candidate: Candidate
    psnr_db: float
    """Of the latents against dense, all rollouts and frames; infinite if they are equal."""
    psnr_by_chunk: tuple[float, ...]
    boundary_ratio: float
    """Mean change between the frames at chunk boundaries over that within chunks, relative to the
    same ratio under dense attention: 1 joins chunks as dense does, more is a visible jump."""
    nbytes_kv: int
    fps_bound: float
    """Predicted upper bound, pixel frames per second of the denoiser alone."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; an infinite PSNR is null."""
        policy = self.candidate.config.policy
        return {
            "label": self.candidate.label,
            "threshold": self.candidate.threshold,
            "num_static_heads": self.candidate.config.partition.num_static_heads,
            "num_sink_frames": policy.num_sink_frames,
            "num_static_frames": policy.num_static_frames,
            "num_temporal_frames": policy.num_temporal_frames,
            "num_dynamic_frames": policy.num_dynamic_frames,
            "num_segments": policy.num_segments,
            "retention": policy.num_dynamic_frames / self.candidate.config.chunk.num_frames,
            "psnr_db": _finite(self.psnr_db),
            "psnr_db_by_chunk": [_finite(value) for value in self.psnr_by_chunk],
            "boundary_ratio": self.boundary_ratio,
            "nbytes_kv": self.nbytes_kv,
            "fps_bound": self.fps_bound,
        }


def latent_psnr(found: Float32, wanted: Float32, whole: Float32 | None = None) -> float:
    """Peak signal-to-noise ratio in dB; the peak is the range of the dense latents.

    Args:
        found: latents of any shape.
        wanted: the dense ones.
        whole: latents whose range is the peak; `wanted` if None.
    """
    peak = np.ptp(wanted if whole is None else whole).astype(np.float64)
    error = np.mean(np.square(found.astype(np.float64) - wanted))
    return math.inf if error == 0 else float(10 * np.log10(peak**2 / error))


def boundary_ratio(videos: Float32) -> float:
    """Mean absolute change across chunk boundaries over that within chunks.

    Args:
        videos: latents [videos, chunks, F, C, h, w].
    """
    frames = videos.reshape(videos.shape[0], -1, *videos.shape[3:]).astype(np.float64)
    change = np.abs(np.diff(frames, axis=1)).mean(axis=(2, 3, 4))
    at_boundary = np.arange(1, frames.shape[1]) % videos.shape[2] == 0
    return float(change[:, at_boundary].mean() / change[:, ~at_boundary].mean())


def pareto_front(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Measurements that no other beats in PSNR, bytes and speed together."""

    def beats(one: Measurement, other: Measurement) -> bool:
        gains = (
            one.psnr_db - other.psnr_db if one.psnr_db != other.psnr_db else 0.0,
            other.nbytes_kv - one.nbytes_kv,
            one.fps_bound - other.fps_bound,
        )
        return min(gains) >= 0 and max(gains) > 0

    return [one for one in measurements if not any(beats(other, one) for other in measurements)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
