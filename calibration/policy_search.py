"""Cache policies compared on one model: quality against dense, bytes, and predicted speed.

Every policy generates the same videos from the same noise as dense attention does. Quality is how
close its latents stay (PSNR over the rollout), and whether chunks join as smoothly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.calibration.model_source import ModelSource
from forcing_kv.calibration.policy_grid import PolicyGrid
from forcing_kv.export.cost_model import fps_bound, histories, step_cost
from forcing_kv.export.devices import Device
from forcing_kv.export.engine import eager_session
from forcing_kv.runtime_trt.config import RolloutConfig
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.layout import CachePolicy, HeadPartition

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
            "num_static_heads": sum(map(len, self.candidate.config.partition.static_heads)),
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


@dataclass(frozen=True)
class PolicySearch:
    """A model, the dense rollout that is the truth, and the candidates."""

    source: ModelSource
    dense: RolloutConfig
    """The uncompressed rollout."""
    base: CachePolicy
    """Policy whose fields the grid changes."""
    grid: PolicyGrid
    scores: Sequence[Sequence[float]] | None
    """Score of every head [layer][head], needed for thresholds."""
    partition: HeadPartition
    """The partition that was calibrated."""
    device: Device
    """GPU for which speed is predicted."""
    num_chunks: int = 7
    seeds: tuple[int, ...] = (0,)
    skipped: list[str] = field(default_factory=list)
    """Why combinations were left out."""

    def candidates(self) -> list[Candidate]:
        """Every combination that can run, once; the others are named in `skipped`.

        Of combinations that keep the same rows, the first is taken.

        Raises:
            InputError: no combination can run.
        """
        self.skipped.clear()
        found: dict[RolloutConfig, Candidate] = {}
        for threshold, changes in self.grid.combinations():
            policy = replace(self.base, **changes)
            if policy.num_dynamic_frames == 0:
                policy = replace(policy, num_segments=self.base.num_segments)
            try:
                config = replace(self.dense, policy=policy, partition=self._partition(threshold))
            except InputError as error:
                self.skipped.append(f"threshold {threshold}, {changes}: {error}")
                continue
            found.setdefault(_meaning(config), Candidate(threshold, config))
        if not found:
            raise InputError(
                f"no combination of the grid can run; the first: {self.skipped[0]}; change the grid"
            )
        return list(found.values())

    def _partition(self, threshold: float | None) -> HeadPartition:
        if threshold is None or self.scores is None:
            return self.partition
        static = (
            tuple(head for head, score in enumerate(layer) if score >= threshold)
            for layer in self.scores
        )
        return HeadPartition(self.partition.num_heads, tuple(static))

    @property
    def num_rollouts(self) -> int:
        """Videos per policy."""
        return len(self.source.prompts) * len(self.seeds)

    def run(
        self, candidates: Sequence[Candidate], on_chunk: Callable[[], object] | None = None
    ) -> list[Measurement]:
        """Generate and compare.

        Args:
            candidates: what `candidates` returned.
            on_chunk: called after each chunk of the dense and of every candidate's rollouts.
        """
        dense = self._generate(self.dense, on_chunk)
        return [self._measure(candidate, dense, on_chunk) for candidate in candidates]

    def _generate(
        self, config: RolloutConfig, on_chunk: Callable[[], object] | None
    ) -> dict[tuple[str, int], Float32]:
        """Latents [chunks, F, C, h, w] of every prompt and seed."""
        videos = {}
        with eager_session(self.source.model, config) as session:
            for name, embeds in self.source.prompts.items():
                for seed in self.seeds:
                    session.reset()
                    session.set_prompt(embeds)
                    chunks = []
                    for chunk in session.stream(self.num_chunks, seed=seed):
                        chunks.append(chunk.latents)
                        if on_chunk is not None:
                            on_chunk()
                    videos[name, seed] = np.stack(chunks)
        return videos

    def _measure(
        self,
        candidate: Candidate,
        dense: Mapping[tuple[str, int], Float32],
        on_chunk: Callable[[], object] | None,
    ) -> Measurement:
        config = candidate.config
        made = self._generate(config, on_chunk)
        wanted = np.stack(list(dense.values()))
        found = np.stack([made[key] for key in dense])
        parts = step_cost(config, histories(config, self.num_chunks))
        return Measurement(
            candidate,
            latent_psnr(found, wanted),
            tuple(latent_psnr(found[:, i], wanted[:, i], wanted) for i in range(self.num_chunks)),
            boundary_ratio(found) / boundary_ratio(wanted),
            config.nbytes_kv,
            fps_bound(config, parts, self.device),
        )


def _meaning(config: RolloutConfig) -> RolloutConfig:
    """The configuration, without what makes no difference to the rows that it keeps."""
    policy, partition = config.policy, config.partition
    temporal = policy.num_temporal_frames
    if not any(partition.static_heads):
        # Then the frames of static heads only widen the warm-up and layer 0.
        policy = replace(policy, num_static_frames=max(policy.num_static_frames, temporal))
    if policy.num_dynamic_frames == 0 and policy.num_static_frames == temporal:
        partition = HeadPartition.uniform(config.model.num_layers, partition.num_heads, static=True)
    return replace(config, policy=policy, partition=partition)


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


def search_record(search: PolicySearch, measurements: Sequence[Measurement]) -> dict[str, Any]:
    """The content of `policy.json`."""
    front = {id(one) for one in pareto_front(measurements)}
    dense = step_cost(search.dense, histories(search.dense, search.num_chunks))
    return {
        "format": "forcing_kv.policy_search",
        "schema_version": 1,
        "model": {"name": search.source.name, "sha256": search.source.sha256},
        "prompts": list(search.source.prompts),
        "seeds": list(search.seeds),
        "num_chunks": search.num_chunks,
        "device": search.device.name,
        "dense": {
            "nbytes_kv": search.dense.nbytes_kv,
            "fps_bound": fps_bound(search.dense, dense, search.device),
        },
        "candidates": [{**one.to_json(), "pareto": id(one) in front} for one in measurements],
        "skipped": search.skipped,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
