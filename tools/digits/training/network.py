"""The digits model in training form: many chunks in one sequence, one mask a sample.

Legend: B batch, Q chunks, F frames per chunk, T tokens per frame, N = Q * F * T tokens, H heads,
D head dim, K clean frames, P segments per frame.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from forcing_kv.export.model.denoiser import Attend, Block, CausalWanModel, rotate_pairs, unpatchify
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, ModelShape
from forcing_kv.runtime_trt.rollout.schedule import rope_table, time_sinusoid
from forcing_kv.tools.digits import data
from forcing_kv.tools.digits.shipped import CHUNK, MODEL, SCHEDULE


def build_model(seed: int, shape: ModelShape = MODEL) -> CausalWanModel:
    """A model whose first output is flow ~ x and whose blocks start as the identity."""
    torch.manual_seed(seed)
    model = CausalWanModel(shape)
    embedding = model.patch_embedding.weight
    with torch.no_grad():
        orthogonal = torch.linalg.qr(torch.randn(shape.dim, embedding[0].numel())).Q
        embedding.copy_(orthogonal.reshape(embedding.shape))
        # The head's norm divides by the RMS of the embedded patch; its rows are (pixel, channel).
        rms = math.sqrt(embedding[0].numel() / shape.dim)
        by_pixel = orthogonal.T.unflatten(0, (shape.in_channels, -1)).transpose(0, 1).flatten(0, 1)
        model.head.head.weight.copy_(rms * by_pixel)
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "modulation")):
                parameter.zero_()
        for block in model.layers:
            block.modulation[:, [2, 5]] = 1.0
            for linear in (block.self_attn.o, block.cross_attn.o, block.ffn[2]):
                zeroed: Tensor = linear.weight  # type: ignore[assignment]
                zeroed.zero_()
        for linear in (model.time_embedding[0], model.time_embedding[2], model.time_projection[1]):
            small: Tensor = linear.weight  # type: ignore[assignment]
            small.normal_(std=0.02)
    return model


def frame_rope(frames: Tensor, shape: ModelShape, chunk: ChunkShape) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., frames * T, D / 2] of the tokens of frames of index [..., frames]."""
    rows, columns = chunk.grid
    temporal, height, width = shape.rope_pairs
    table = rope_table(range(int(frames.max()) + 1), temporal)
    row, column = rope_table(range(rows), height), rope_table(range(columns), width)
    parts = []
    for time, high, wide in zip(table, row, column, strict=True):
        time_part = torch.from_numpy(time)[frames][..., None, None, :]
        time_part = time_part.expand(*frames.shape, rows, columns, temporal)
        high_part = torch.from_numpy(high)[:, None].expand(*frames.shape, rows, columns, height)
        wide_part = torch.from_numpy(wide).expand(*frames.shape, rows, columns, width)
        parts.append(torch.cat([time_part, high_part, wide_part], dim=-1).flatten(-4, -2))
    return parts[0], parts[1]


def attention_bias(visible: Tensor, chunk: ChunkShape) -> Tensor:
    """Additive mask [B, 1, N, K * T] from every token of a sequence to the clean ones.

    Args:
        visible: whether a query chunk sees a segment of a clean frame, [B, Q, K, P] bool.
        chunk: chunk shape.

    Returns:
        0 where seen and -inf elsewhere. That a chunk sees itself is not part of it.
    """
    run = chunk.tokens_per_frame // visible.shape[-1]
    seen = visible.repeat_interleave(run, dim=-1).flatten(2)
    seen = seen.repeat_interleave(chunk.num_tokens, dim=1)[:, None]
    return torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)


def masked_attention(block: Block, cos: Tensor, sin: Tensor, bias: Tensor) -> Attend:
    """Self-attention in a sequence of chunks [B, Q, F * T, dim]: to clean tokens, and to their own.

    Written out instead of a fused call: on a CPU, the backward pass of the fused one takes 44% of a
    training step (bfloat16, 336 tokens, head dim 32), and noisy chunks never see each other.
    """
    attn, num_clean = block.self_attn, bias.shape[-1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chunks = (q.shape[1], q.shape[2])
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (attn.split_heads(x.flatten(1, 2)) for x in (q, k, v))
        q = rotate_pairs(q, cos, sin) * q.shape[-1] ** -0.5
        k = rotate_pairs(k, cos, sin)
        past = q @ k[:, :, :num_clean].mT + bias
        own = q.unflatten(2, chunks) @ k.unflatten(2, chunks).mT
        weights = torch.cat([past, own.flatten(2, 3)], dim=-1).float().softmax(-1).to(v.dtype)
        out = weights[..., :num_clean] @ v[:, :, :num_clean]
        own = weights[..., num_clean:].unflatten(2, chunks) @ v.unflatten(2, chunks)
        return (out + own.flatten(2, 3)).transpose(1, 2).flatten(-2).unflatten(1, chunks)

    return attend


def sequence_flow(
    model: CausalWanModel,
    latents: Tensor,
    sinusoids: Tensor,
    prompts: Tensor,
    rope: tuple[Tensor, Tensor],
    bias: Tensor,
    chunk: ChunkShape = CHUNK,
) -> Tensor:
    """Predicted flow of every chunk of a sequence.

    Args:
        model: the denoiser.
        latents: [B, Q, F, C, h, w].
        sinusoids: of each chunk's timestep, [B, Q, freq_dim].
        prompts: [B, text_len, text_dim].
        rope: cosines and sines [B, 1, N, D / 2].
        bias: additive mask [B, 1, N, clean tokens].
        chunk: chunk shape.

    Returns:
        [B, Q, F, C, h, w] float32.
    """
    num_chunks = latents.shape[1]
    x = model.embed_latents(latents)
    embedding, projection = model.embed_time(sinusoids)
    context = model.embed_text(prompts)
    for block in model.layers:
        k, v = block.cross_attn.context_kv(context)
        k, v = (t[:, None].expand(-1, num_chunks, -1, -1, -1) for t in (k, v))
        attend = masked_attention(block, *rope, bias)
        with sdpa_kernel(SDPBackend.MATH):  # cross-attention; see masked_attention
            x = block(x, projection.unsqueeze(-3), attend, k, v)
    out = model.head(x, embedding.unsqueeze(-2)).float()
    return unpatchify(out, chunk.num_frames, chunk.grid, model.shape.patch_size)


def level_sinusoids(shape: ModelShape = MODEL) -> Tensor:
    """Sinusoids [levels + 1, freq_dim] of the schedule's timesteps and of t = 0, the clean pass."""
    timesteps = [*SCHEDULE.timesteps.tolist(), 0.0]
    return torch.stack([torch.from_numpy(time_sinusoid(t, shape.freq_dim)[0]) for t in timesteps])


def style_basis() -> Tensor:
    """Orthonormal noise directions [STYLE_DIM, F, C, h, w]: the sum of one latent channel each."""
    size = (CHUNK.num_frames, MODEL.in_channels, CHUNK.latent_height, CHUNK.latent_width)
    basis = torch.zeros(data.STYLE_DIM, *size)
    for index in range(data.STYLE_DIM):
        basis[index, :, index] = (size[0] * size[2] * size[3]) ** -0.5
    return basis


def couple_noise(noise: Tensor, styles: Tensor) -> Tensor:
    """Make chunk noise [..., F, C, h, w] say the styles [..., STYLE_DIM]; N(0, I) stays N(0, I)."""
    basis = style_basis().flatten(1)
    flat = noise.flatten(-4)
    return (flat + (styles - flat @ basis.T) @ basis).reshape(noise.shape)
