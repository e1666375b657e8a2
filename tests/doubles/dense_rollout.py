"""A plain dense rollout of many clips of the digits model at once.

It keeps every key and value and knows no policy, so it is an independent check of the exported
semantics with a dense policy, and of what training computes.

Legend: B clips, F frames per chunk, C latent channels, T tokens per frame, n denoise steps.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from forcing_kv.export.model.denoiser import Attend, Block, CausalWanModel, rotate_pairs, unpatchify
from forcing_kv.runtime_trt.rollout.schedule import time_sinusoid
from forcing_kv.tools.digits import text
from forcing_kv.tools.digits.shipped import CHUNK, SCHEDULE
from forcing_kv.tools.digits.training.network import frame_rope

KeyValue = tuple[Tensor, Tensor]


def clip_noise(seed: int, num_clips: int, num_chunks: int) -> tuple[Tensor, Tensor]:
    """Start noise [B, chunks, F, C, h, w] and re-noise [B, chunks, n - 1, F, C, h, w]."""
    size = (CHUNK.num_frames, 16, CHUNK.latent_height, CHUNK.latent_width)
    rng = np.random.Generator(np.random.Philox(key=seed))
    draws = rng.standard_normal((num_clips, num_chunks, SCHEDULE.num_steps, *size), np.float32)
    return torch.from_numpy(draws[:, :, 0]), torch.from_numpy(draws[:, :, 1:])


def embed_captions(captions: list[str]) -> NDArray[np.float32]:
    """Prompt embeddings [B, text_len, text_dim]."""
    return np.stack([text.encode_prompt(caption) for caption in captions])


def _attend(block: Block, rope: KeyValue, past: list[KeyValue], new: list[KeyValue]) -> Attend:
    attn = block.self_attn

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (attn.split_heads(x) for x in (attn.norm_q(q), attn.norm_k(k), v))
        q, k = rotate_pairs(q, *rope), rotate_pairs(k, *rope)
        keys = torch.cat([*(entry[0] for entry in past), k], dim=-2)
        values = torch.cat([*(entry[1] for entry in past), v], dim=-2)
        new.append((k, v))
        return F.scaled_dot_product_attention(q, keys, values).transpose(-3, -2).flatten(-2)

    return attend


class DenseRollout:
    """Generates clips chunk by chunk under dense attention."""

    def __init__(self, model: CausalWanModel, prompts: NDArray[np.float32]) -> None:
        self.model = model
        context = model.embed_text(torch.from_numpy(prompts))
        self.cross = [block.cross_attn.context_kv(context) for block in model.layers]
        self.past: list[list[KeyValue]] = [[] for _ in model.layers]

    def _forward(self, x: Tensor, timestep: float, index: int) -> tuple[Tensor, list[KeyValue]]:
        """Flow of chunk `index` [B, F, C, h, w] and its keys and values per block."""
        model = self.model
        sinusoid = torch.from_numpy(time_sinusoid(timestep, model.shape.freq_dim))
        embedding, projection = model.embed_time(sinusoid)
        frames = torch.arange(CHUNK.num_frames) + index * CHUNK.num_frames
        rope = frame_rope(frames, model.shape, CHUNK)
        tokens, new = model.embed_latents(x), list[KeyValue]()
        for block, past, cross in zip(model.layers, self.past, self.cross, strict=True):
            tokens = block(tokens, projection, _attend(block, rope, past, new), *cross)
        patches = model.head(tokens, embedding).float()
        return unpatchify(patches, CHUNK.num_frames, CHUNK.grid, model.shape.patch_size), new

    @torch.no_grad()
    def chunk(self, index: int, noise: Tensor, eps: Tensor) -> Tensor:
        """Generate chunk `index` from noise [B, F, C, h, w] and eps [B, n - 1, F, C, h, w]."""
        x = x0 = noise
        sigmas = SCHEDULE.sigmas.tolist()
        for step, timestep in enumerate(SCHEDULE.timesteps.tolist()):
            x0 = x - sigmas[step] * self._forward(x, timestep, index)[0]
            if step + 1 < len(sigmas):
                x = (1 - sigmas[step + 1]) * x0 + sigmas[step + 1] * eps[:, step]
        for past, entry in zip(self.past, self._forward(x0, 0.0, index)[1], strict=True):
            past.append(entry)
        return x0
