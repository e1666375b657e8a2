"""Cache policies compared on one model: quality against dense, bytes, and predicted speed.

Every policy generates the same videos from the same noise as dense attention does. Quality is how
close its latents stay (PSNR over the rollout), and whether chunks join as smoothly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from forcing_kv.calibration.model_source import ModelSource
from forcing_kv.calibration.policy.grid import PolicyGrid
from forcing_kv.calibration.policy.measures import (
    Candidate,
    Float32,
    Measurement,
    boundary_ratio,
    latent_psnr,
    pareto_front,
)
from forcing_kv.calibration.policy.picture import draw_policies
from forcing_kv.calibration.rollouts import Rollout
from forcing_kv.export.cost.devices import Device
from forcing_kv.export.cost.work import fps_bound, histories, step_cost
from forcing_kv.export.verify.eager import eager_session
from forcing_kv.runtime_trt.bundle.atomic.files import write_json
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import HeadPartition
from forcing_kv.runtime_trt.rollout.policy import CachePolicy


@dataclass(frozen=True)
class PolicySearch:
    """A model, the dense rollout that is the truth, and the candidates."""

    FILES: ClassVar = ("policy.json", "policy.png")

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

    def candidates(self) -> list[Candidate]:
        """Every combination that can run, once; of those that keep the same rows, the first.

        Raises:
            InputError: no combination can run.
        """
        found, skipped = self._sorted_grid
        if not found:
            raise InputError(
                f"no combination of the grid can run; the first: {skipped[0]}; change the grid"
            )
        return list(found)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Why combinations cannot run."""
        return self._sorted_grid[1]

    @cached_property
    def _sorted_grid(self) -> tuple[tuple[Candidate, ...], tuple[str, ...]]:
        """Combinations that can run, and why the others cannot."""
        found: dict[RolloutConfig, Candidate] = {}
        skipped = []
        for threshold, changes in self.grid.combinations():
            policy = replace(self.base, **changes)
            if policy.num_dynamic_frames == 0:
                policy = replace(policy, num_segments=self.base.num_segments)
            try:
                config = replace(self.dense, policy=policy, partition=self._partition(threshold))
            except InputError as error:
                skipped.append(f"threshold {threshold}, {changes}: {error}")
                continue
            found.setdefault(_meaning(config), Candidate(threshold, config))
        return tuple(found.values()), tuple(skipped)

    def _partition(self, threshold: float | None) -> HeadPartition:
        if threshold is None or self.scores is None:
            return self.partition
        static = (
            tuple(head for head, score in enumerate(layer) if score >= threshold)
            for layer in self.scores
        )
        return HeadPartition(self.partition.num_heads, tuple(static))

    @cached_property
    def rollouts(self) -> list[Rollout]:
        """Videos per policy."""
        return self.source.rollouts(self.seeds)

    @property
    def description(self) -> str:
        """What will run, and a line for each combination that cannot."""
        told = (
            f"{self.source.name}: {len(self.candidates())} policies and dense, "
            f"{len(self.rollouts)} videos of {self.num_chunks} chunks each; "
            f"{len(self.skipped)} combinations cannot run"
        )
        return "\n".join([told, *(f"left out: {reason}" for reason in self.skipped)])

    @property
    def num_ticks(self) -> int:
        """Chunks of dense and of every candidate."""
        return (len(self.candidates()) + 1) * len(self.rollouts) * self.num_chunks

    def run(self, on_tick: Callable[[], object] = lambda: None) -> list[Measurement]:
        """Generate and compare every candidate; `on_tick` is called after each chunk."""
        return self.compare(self.candidates(), on_tick)

    def compare(
        self, candidates: Sequence[Candidate], on_chunk: Callable[[], object] = lambda: None
    ) -> list[Measurement]:
        """Compare some candidates with dense attention."""
        dense = self._generate(self.dense, on_chunk)
        return [self._measure(candidate, dense, on_chunk) for candidate in candidates]

    def write(self, folder: Path, measured: Sequence[Measurement]) -> dict[str, Any]:
        """Write `policy.json` and `policy.png` to a folder; returns the content of the former."""
        record = search_record(self, measured)
        file, picture = self.FILES
        draw_policies(folder / picture, record)
        write_json(folder / file, record)
        return record

    def _generate(self, config: RolloutConfig, on_chunk: Callable[[], object]) -> Float32:
        """Latents [videos, chunks, F, C, h, w]."""
        videos = []
        with eager_session(self.source.model, config) as session:
            for rollout in self.rollouts:
                chunks = []
                for chunk in rollout.generate(session, self.num_chunks):
                    chunks.append(chunk.latents)
                    on_chunk()
                videos.append(np.stack(chunks))
        return np.stack(videos)

    def _measure(
        self, candidate: Candidate, wanted: Float32, on_chunk: Callable[[], object]
    ) -> Measurement:
        config = candidate.config
        found = self._generate(config, on_chunk)
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
        "skipped": list(search.skipped),
    }
