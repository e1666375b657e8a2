"""The training objective: x0 of noisy chunks, from true or from the model's own context.

Legend: B batch, J clean chunks, N tokens, F frames per chunk, C latent channels, h and w latent
rows and columns, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.tools.digits.shipped import CHUNK, MODEL, SCHEDULE
from forcing_kv.tools.digits.training.network import (
    attention_bias,
    couple_noise,
    frame_rope,
    level_sinusoids,
    sequence_flow,
)
from forcing_kv.tools.digits.training.sequences import NUM_LEVELS, Batch

CLEAN_LEVEL = NUM_LEVELS
"""Row of `level_sinusoids` for clean context, t = 0."""


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

    def __init__(self, model: CausalWanModel, precision: str, compile_model: bool) -> None:
        self.model = model
        self.dtype: torch.dtype = getattr(torch, precision)
        self.sinusoids = level_sinusoids(model.shape)
        self.sigmas = torch.from_numpy(SCHEDULE.sigmas)
        self.flow = torch.compile(sequence_flow, dynamic=False) if compile_model else sequence_flow

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
