"""The causal Wan2.1 denoiser as small pieces, with the official state-dict names.

A piece takes tokens of any leading shape, so that one implementation serves the exported chunk
step ([N, dim]) and training ([batch, N, dim]). Attention over the past is not here: a block is
given a function that does it, because that is what differs between graphs.

Legend: N tokens, H heads, D head dim, F frames, T tokens per frame, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forcing_kv.export.model.fp8 import FP8, Fp8Linear
from forcing_kv.runtime_trt.rollout.layout import ModelShape

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v) [..., N, dim], before qk-norm -> attention output [..., N, dim]."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis in float32, rounded to x's dtype before the weight (Wan2.1)."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)


def layer_norm(x: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """LayerNorm over the last axis in float32; returns float32."""
    weight32 = None if weight is None else weight.float()
    bias32 = None if bias is None else bias.float()
    return F.layer_norm(x.float(), x.shape[-1:], weight32, bias32, eps)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of x [..., D] by angles [..., D/2], in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """Cut latents [..., F, C, h, w] into patches [..., N, C * p * p], row-major in each frame."""
    cut = latents.unflatten(-1, (-1, patch_size)).unflatten(-3, (-1, patch_size))
    # [..., F, C, rows, p, columns, p] -> [..., F, rows, columns, C, p, p]
    cut = cut.movedim((-4, -2), (-5, -4))
    return cut.flatten(-3).flatten(-4, -2)


def unpatchify(tokens: Tensor, num_frames: int, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Assemble head outputs [..., N, p * p * C] (channel last) to latents [..., F, C, h, w]."""
    rows, columns = grid
    cut = tokens.unflatten(-1, (patch_size, patch_size, -1))
    cut = cut.unflatten(-4, (num_frames, rows, columns))
    # [..., F, rows, columns, p, p, C] -> [..., F, C, rows, p, columns, p]
    cut = cut.movedim((-1, -3, -4), (-5, -3, -2))
    return cut.flatten(-2).flatten(-3, -2)


class RMSNorm(nn.Module):
    """Weight of an RMSNorm over the full model width."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Affine LayerNorm in float32, rounded back to the input's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.eps, self.weight, self.bias).to(x.dtype)


class Attention(nn.Module):
    """Projections and qk-norm weights of one attention."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.q = nn.Linear(shape.dim, shape.dim)
        self.k = nn.Linear(shape.dim, shape.dim)
        self.v = nn.Linear(shape.dim, shape.dim)
        self.o = nn.Linear(shape.dim, shape.dim)
        self.norm_q = RMSNorm(shape.dim, shape.eps)
        self.norm_k = RMSNorm(shape.dim, shape.eps)
        self.qkv: nn.Linear | Fp8Linear | None = None
        """q, k and v in one matrix, in place of the three (`export.model.fusion.fuse_qkv_`)."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw q, k and v [..., N, dim] of x [..., N, dim]."""
        if self.qkv is None:
            return self.q(x), self.k(x), self.v(x)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return q, k, v

    def project_kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.qkv is None:
            return self.k(x), self.v(x)
        rows = slice(x.shape[-1], None)
        if isinstance(self.qkv, Fp8Linear):
            kv = self.qkv.rows(x, rows)
        else:
            kv = F.linear(x, self.qkv.weight[rows], self.qkv.bias[rows])
        k, v = kv.chunk(2, dim=-1)
        return k, v

    def split_heads(self, x: Tensor) -> Tensor:
        """[..., N, dim] -> [..., H, N, D]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

    def context_kv(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention K and V [..., H, text_len, D] of embedded text [..., text_len, dim]."""
        return self.split_heads(self.norm_k(self.k(context))), self.split_heads(self.v(context))

    def cross(self, x: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attend from x [..., N, dim] to the rows of k, v [..., H, text_len, D].

        `bias` [text_len] in x's dtype is added to every score, if given.
        """
        q = self.split_heads(self.norm_q(self.q(x)))
        # The exporter knows this function with one batch axis only.
        q4, k4, v4 = (heads.reshape(-1, *heads.shape[-3:]) for heads in (q, k, v))
        mask = None if bias is None else bias.expand(1, 1, q4.shape[-2], -1)
        out = F.scaled_dot_product_attention(q4, k4, v4, attn_mask=mask).reshape(q.shape)
        return self.o(out.transpose(-3, -2).flatten(-2))


class Block(nn.Module):
    """One transformer block: self-attention, cross-attention, feed-forward."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.eps = shape.eps
        self.self_attn = Attention(shape)
        self.cross_attn = Attention(shape)
        self.norm3 = LayerNorm(shape.dim, shape.eps)
        self.ffn = nn.Sequential(
            nn.Linear(shape.dim, shape.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(shape.ffn_dim, shape.dim),
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, shape.dim) / shape.dim**0.5)

    def _modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return (layer_norm(x, self.eps, None, None) * (1 + scale) + shift).to(x.dtype)

    def attention_input(self, x: Tensor, time: Tensor) -> Tensor:
        """What the self-attention projects: x [..., N, dim], normalised and modulated."""
        shift, scale, *_ = (self.modulation.float() + time).unbind(-2)
        return self._modulated(x, shift, scale)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        attend: Attend,
        cross_k: Tensor,
        cross_v: Tensor,
        text_bias: Tensor | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            x: tokens [..., N, dim], compute dtype.
            time: projected time embedding [..., 1 or N, 6, dim], float32.
            attend: self-attention from raw q, k, v [..., N, dim] to [..., N, dim].
            cross_k: text keys [..., H, text_len, D].
            cross_v: text values, same shape.
            text_bias: added to the scores of the text rows [text_len], compute dtype; None for 0.

        Returns:
            Tokens of the same shape and dtype.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + time).unbind(-2)
        attn, h = self.self_attn, self._modulated(x, shift1, scale1)
        y = attn.o(attend(*attn.project(h)))
        x = (x.float() + y.float() * gate1).to(x.dtype)
        x = x + self.cross_attn.cross(self.norm3(x), cross_k, cross_v, text_bias)
        y = self.ffn(self._modulated(x, shift2, scale2))
        return (x.float() + y.float() * gate2).to(x.dtype)


class Head(nn.Module):
    """Final modulated norm and projection to patches."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.eps = shape.eps
        self.head = nn.Linear(shape.dim, shape.patch_size**2 * shape.in_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, shape.dim) / shape.dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Project x [..., N, dim] with the time embedding [..., 1 or N, dim] to patches."""
        shift, scale = (self.modulation.float() + time.unsqueeze(-2)).unbind(-2)
        h = layer_norm(x, self.eps, None, None) * (1 + scale) + shift
        return self.head(h.to(x.dtype))


class CausalWanModel(nn.Module):
    """All weights of the denoiser under the official names (`CausalWanModel`, Wan2.1)."""

    FLOAT32_PREFIXES = ("time_embedding.", "time_projection.")
    """Parameters that stay float32 whatever the compute dtype, beside norms and modulation."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        dim = shape.dim
        patch = (1, shape.patch_size, shape.patch_size)
        self.patch_embedding = nn.Conv3d(shape.in_channels, dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(shape.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(shape.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.head = Head(shape)

    @property
    def layers(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def is_island(self, name: str) -> bool:
        """Whether Wan keeps the parameter `name` in float32 whatever the compute dtype."""
        norm = "norm" in name or name.endswith("modulation")
        return norm or name.startswith(self.FLOAT32_PREFIXES)

    def cast_(self, dtype: torch.dtype) -> CausalWanModel:
        """Cast linear weights to `dtype`, but not Wan's float32 islands and FP8; returns self."""
        for name, parameter in self.named_parameters():
            if not self.is_island(name) and parameter.dtype != FP8:
                parameter.data = parameter.data.to(dtype)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def embed_latents(self, latents: Tensor) -> Tensor:
        """Latents [..., F, C, h, w] -> tokens [..., N, dim] in the compute dtype."""
        patches = patchify(latents.to(self.dtype), self.shape.patch_size)
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def embed_text(self, prompt_embeds: Tensor) -> Tensor:
        """Prompt embeddings [..., text_len, text_dim] -> [..., text_len, dim]."""
        return self.text_embedding(prompt_embeds.to(self.dtype))

    def embed_time(self, sinusoid: Tensor) -> tuple[Tensor, Tensor]:
        """Sinusoid [..., freq_dim] float32 -> (embedding [..., dim], projection [..., 6, dim])."""
        embedding = self.time_embedding(sinusoid.float())
        return embedding, self.time_projection(embedding).unflatten(-1, (6, -1))
