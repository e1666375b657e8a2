"""Training of the digits model: one step, the loop, checkpoints and the log.

Everything random about a step follows from the seed and the step's number, so a run that is stopped
and resumed computes what one run computes. The learning rate falls linearly to zero over the
planned steps or, if a time budget is given, over whichever of steps and time is further along; the
log records the progress that was used.

Legend: B batch, F frames, C latent channels; a sequence is J clean and 4 noisy chunks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from forcing_kv.export.denoiser import CausalWanModel
from forcing_kv.tools.digits.network import (
    attention_bias,
    build_model,
    couple_noise,
    frame_rope,
    level_sinusoids,
    sequence_flow,
)
from forcing_kv.tools.digits.optimiser import Average, build_optimisers
from forcing_kv.tools.digits.sequences import NUM_LEVELS, Batch, make_batch
from forcing_kv.tools.digits.shipped import CHUNK, MODEL, SCHEDULE

CLEAN_LEVEL = NUM_LEVELS
"""Row of `level_sinusoids` for clean context, t = 0."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    seed: int = 0
    """Seed of weights, data and noise."""
    steps: int = 20000
    """Planned optimiser steps."""
    budget_minutes: float = 0.0
    """Wall-clock budget that also drives the decay; 0 means steps alone."""
    batch: int = 8
    """Sequences per shard."""
    shards: int = 2
    """Batches per step; processes share them."""
    lr: float = 2e-3
    """Peak learning rate."""
    warmup: int = 200
    """Steps of linear warm-up."""
    average: float = 0.998
    """Decay of the weights' moving average."""
    forcing_start: float = 0.35
    """Progress after which half the steps train on the model's own predictions."""
    long_start: float = 0.286
    """Progress after which every third step trains on long sequences."""
    precision: str = "bfloat16"
    """Compute dtype of the matrix products: bfloat16 or float32."""
    compile: bool = True
    """Whether to compile the forward and backward passes."""


@dataclass(frozen=True)
class Sequence:
    """Tensors of one step that do not depend on the model's predictions."""

    prompts: Tensor
    """[B, text_len, text_dim]."""
    clean: Tensor
    """True clean chunks, [B, J, F, C, h, w]."""
    target: Tensor
    """True x0 of the noisy chunks, [B, 4, F, C, h, w]."""
    source: Tensor
    """Which clean chunk a noisy one shows, [B, 4]; J is the last, which is no context."""
    starts: Tensor
    """Whether a noisy chunk is chunk 0, [B, 4] bool."""
    styles: Tensor
    """[B, STYLE_DIM]."""
    clean_sigma: Tensor
    """[B, J]."""
    rope: tuple[Tensor, Tensor]
    """[B, 1, N, D / 2] each."""
    bias: Tensor
    """[B, 1, N, clean tokens]."""


def to_sequence(batch: Batch) -> Sequence:
    """Bring a batch into tensors."""
    latents = torch.from_numpy(batch.latents)
    source = torch.from_numpy(batch.noisy_source)
    index = source[..., None, None, None, None].expand(-1, -1, *latents.shape[2:])
    query = torch.from_numpy(batch.query_chunks)
    frames = query[..., None] * CHUNK.num_frames + torch.arange(CHUNK.num_frames)
    cos, sin = frame_rope(frames.flatten(1), MODEL, CHUNK)
    return Sequence(
        prompts=torch.from_numpy(batch.prompts),
        clean=latents[:, :-1],
        target=latents.gather(1, index),
        source=source,
        starts=query[:, batch.num_clean :] == 0,
        styles=torch.from_numpy(batch.styles),
        clean_sigma=torch.from_numpy(batch.clean_sigma),
        rope=(cos[:, None], sin[:, None]),
        bias=attention_bias(torch.from_numpy(batch.visible), CHUNK),
    )


def mix(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise, sigma [B, Q]."""
    sigma = sigma[..., None, None, None, None]
    return (1 - sigma) * x0 + sigma * noise


class Predictor:
    """x0 of the noisy chunks of a sequence, by the model."""

    def __init__(self, model: CausalWanModel, config: TrainConfig) -> None:
        self.model = model
        self.dtype = getattr(torch, config.precision)
        self.sinusoids = level_sinusoids(model.shape)
        self.sigmas = torch.from_numpy(SCHEDULE.sigmas)
        self.flow = torch.compile(sequence_flow, dynamic=False) if config.compile else sequence_flow

    def __call__(self, seq: Sequence, clean: Tensor, noisy: Tensor, levels: Tensor) -> Tensor:
        """Predicted x0 [B, 4, F, C, h, w] from clean [B, J, ...], noisy [B, 4, ...], levels."""
        num_clean = clean.shape[1]
        context = torch.full_like(levels[:, :1].expand(-1, num_clean), CLEAN_LEVEL)
        sinusoids = self.sinusoids[torch.cat([context, levels], dim=1)]
        latents = torch.cat([clean, noisy], dim=1)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            flow = self.flow(self.model, latents, sinusoids, seq.prompts, seq.rope, seq.bias)
        sigma = self.sigmas[levels][..., None, None, None, None]
        return noisy - sigma * flow[:, num_clean:]


def draw_noise(seq: Sequence, levels: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of the noisy chunks; at the first level, that of chunk 0 says the clip's style."""
    noise = torch.randn(seq.target.shape, generator=generator)
    coupled = (seq.starts & (levels == 0))[..., None, None, None, None]
    return torch.where(coupled, couple_noise(noise, seq.styles[:, None]), noise)


@torch.no_grad()
def self_forced(
    predict: Predictor, seq: Sequence, levels: Tensor, clean: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace context and starting points by the model's own predictions.

    A first pass predicts x0 of every noisy chunk. Predictions from a level after the first stand in
    for the clean chunks they show; half of all predictions are what the next level starts from.

    Returns:
        Clean chunks, the x0 that noisy inputs are made of, and the levels of the second pass.
    """
    noise = draw_noise(seq, levels, generator)
    x0 = predict(seq, clean, mix(seq.target, noise, predict.sigmas[levels]), levels)
    replaced = clean.clone()
    for slot in range(levels.shape[1]):
        rows = torch.nonzero(
            (levels[:, slot] > 0) & (seq.source[:, slot] < clean.shape[1])
        ).flatten()
        replaced[rows, seq.source[rows, slot]] = x0[rows, slot]
    chained = torch.rand(levels.shape, generator=generator) < 0.5
    chained &= levels + 1 < NUM_LEVELS
    start = torch.where(chained[..., None, None, None, None], x0, seq.target)
    fresh = torch.randint(NUM_LEVELS, levels.shape, generator=generator)
    return replaced, start, torch.where(chained, levels + 1, fresh)


def step_loss(predict: Predictor, batch: Batch, seed: int, forcing: bool) -> tuple[Tensor, Tensor]:
    """Mean squared error of the predicted x0, and its detached values [B, 4]."""
    generator = torch.Generator().manual_seed(seed)
    seq, levels = to_sequence(batch), torch.from_numpy(batch.levels)
    clean = mix(seq.clean, torch.randn(seq.clean.shape, generator=generator), seq.clean_sigma)
    start = seq.target
    if forcing:
        clean, start, levels = self_forced(predict, seq, levels, clean, generator)
    noise = draw_noise(seq, levels, generator)
    x0 = predict(seq, clean, mix(start, noise, predict.sigmas[levels]), levels)
    error = (x0 - seq.target).square().flatten(2).mean(-1)
    return error.mean(), error.detach()


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    elapsed_s: float = 0.0

    def fraction(self, config: TrainConfig) -> float:
        """Share of the run that is done, 0..1, by steps or by time."""
        timed = self.elapsed_s / (60 * config.budget_minutes) if config.budget_minutes else 0.0
        return min(1.0, max(self.step / config.steps, timed))


class Trainer:
    """A resumable run in a folder: `state.pt`, `log.jsonl`, `average.safetensors`.

    A step is the mean over `config.shards` batches. If a process group is up, its ranks share them:
    one single-threaded process a core beats one process with many threads where cores are shared
    with other work. The result is the same up to the order of summation.
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.rank, self.world = 0, 1
        if distributed.is_initialized():
            self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.model = build_model(config.seed)
        self.optimisers = build_optimisers(self.model, config.lr)
        self.average = Average(self.model)
        self.predict = Predictor(self.model, config)
        self.progress = Progress()
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.pt").exists():
            self._load()

    def _backward(self, index: int, forcing: bool, long: bool) -> Tensor:
        """Accumulate the gradient of one shard's batch; returns loss sums and counts [4]."""
        config = self.config
        batch = make_batch(config.seed, index, config.batch, long)
        loss, errors = step_loss(self.predict, batch, config.seed * 10**9 + index, forcing)
        (loss / config.shards).backward()
        start = torch.from_numpy(batch.query_chunks[:, batch.num_clean :] == 0)
        sums = (errors[start].sum(), start.sum(), errors[~start].sum(), (~start).sum())
        return torch.stack([value.float() for value in sums])

    def _reduce(self, sums: Tensor) -> Tensor:
        """Sum gradients, loss sums and elapsed times over the ranks; returns the loss sums."""
        if self.world == 1:
            return sums
        grads = [parameter.grad for parameter in self.model.parameters()]
        parts = [grad for grad in grads if grad is not None]
        assert len(parts) == len(grads)
        clock = torch.tensor([self.progress.elapsed_s / self.world])
        flat = torch.cat([*(part.flatten() for part in parts), sums, clock])
        distributed.all_reduce(flat)
        offset = 0
        for part in parts:
            part.copy_(flat[offset : offset + part.numel()].view_as(part))
            offset += part.numel()
        self.progress.elapsed_s = flat[-1].item()
        return flat[offset:-1]

    def train_step(self) -> dict[str, Any]:
        """One optimiser step; returns its log record."""
        config, step = self.config, self.progress.step
        fraction = self.progress.fraction(config)
        lr = config.lr * min(1.0, (step + 1) / config.warmup) * (1 - fraction)
        forcing = fraction > config.forcing_start and step % 2 == 1
        long = fraction > config.long_start and step % 3 == 2
        shards = range(self.rank, config.shards, self.world)
        sums = [self._backward(step * config.shards + shard, forcing, long) for shard in shards]
        start, num_start, later, num_later = self._reduce(torch.stack(sums).sum(0)).tolist()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.average.update(step, config.average)
        self.progress.step += 1
        return {
            "progress": fraction,
            "lr": lr,
            "loss": (start + later) / (num_start + num_later),
            "loss_chunk0": start / max(num_start, 1),
            "loss_later": later / max(num_later, 1),
            "grad_norm": norm.item(),
        }

    def run(self, report: Callable[[Progress, dict[str, Any]], None], every: int = 50) -> None:
        """Train to the end, logging means over `every` steps and saving every fourth log."""
        window: list[dict[str, Any]] = []
        clock = time.monotonic()
        while self.progress.fraction(self.config) < 1.0:
            window.append(self.train_step())
            now = time.monotonic()
            self.progress.elapsed_s += now - clock
            clock = now
            if self.rank == 0 and self.progress.step % every == 0:
                report(self.progress, self._log(window))
                window = []
            if self.rank == 0 and self.progress.step % (4 * every) == 0:
                self.save()
        if self.rank == 0:
            self.save()

    def _log(self, window: list[dict[str, Any]]) -> dict[str, Any]:
        record: dict[str, Any] = {"step": self.progress.step}
        record["elapsed_s"] = round(self.progress.elapsed_s, 1)
        for key in ("progress", "lr"):
            record[key] = float(f"{window[-1][key]:.4g}")
        for key in ("loss", "loss_chunk0", "loss_later", "grad_norm"):
            record[key] = float(f"{sum(entry[key] for entry in window) / len(window):.4g}")
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        return record

    def save(self) -> None:
        """Write the state and the averaged weights, each by rename."""
        from safetensors.torch import save_file

        state = {
            "config": asdict(self.config),
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        torch.save(state, self.folder / "state.tmp")
        (self.folder / "state.tmp").rename(self.folder / "state.pt")
        save_file(self.average.state_dict(), self.folder / "average.tmp")
        (self.folder / "average.tmp").rename(self.folder / "average.safetensors")

    def _load(self) -> None:
        state = torch.load(self.folder / "state.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
