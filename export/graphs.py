"""The three graphs that are exported: prompt, step and evict. All are purely functional.

Legend: F frames per chunk, C channels, N = F * T tokens, H heads, D head dim, R pool rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple

import numpy as np
import torch
from torch import Tensor, nn

from forcing_kv.export.denoiser import Attention, CausalWanModel, unpatchify
from forcing_kv.plugins.candidates import CandidateLayout
from forcing_kv.plugins.head_indexed_attention.torch_op import head_indexed_attention
from forcing_kv.plugins.qk_norm_rope.torch_op import qk_norm_rope
from forcing_kv.plugins.segment_similarity.torch_op import segment_similarity
from forcing_kv.plugins.similarity_eviction.torch_op import similarity_eviction
from forcing_kv.runtime_trt.config import RolloutConfig
from forcing_kv.runtime_trt.schedule import rope_table

AttentionObserver = Callable[[int, Tensor, Tensor], None]
"""(layer, q [H, N, D], k [H, N, D]): post-norm, post-RoPE queries and new keys of every call."""


class PromptGraph(nn.Module):
    """Prompt embeddings to cross-attention K and V of every layer."""

    def __init__(self, model: CausalWanModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, prompt_embeds: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Embed [text_len, text_dim]; returns cross_k and cross_v, [H, text_len, D] a layer."""
        context = self.model.embed_text(prompt_embeds)
        pairs = [block.cross_attn.context_kv(context) for block in self.model.layers]
        return [k.contiguous() for k, _ in pairs], [v.contiguous() for _, v in pairs]


class StepGraph(nn.Module):
    """One forward of the denoiser over one chunk, with x0 and the next step's input.

    The model's heads must be in exported order (`export.rewrite.sort_heads_`).
    """

    def __init__(
        self,
        model: CausalWanModel,
        config: RolloutConfig,
        observer: AttentionObserver | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self._observer = observer
        _, height_pairs, width_pairs = config.model.rope_pairs
        rows, columns = config.chunk.grid
        tables = rope_table(range(rows), height_pairs), rope_table(range(columns), width_pairs)
        for name, height, width in zip(("cos", "sin"), *tables, strict=True):
            grid = np.concatenate(
                [np.repeat(height, columns, axis=0), np.tile(width, (rows, 1))], axis=1
            )
            self.register_buffer(f"spatial_{name}", torch.from_numpy(grid), persistent=False)
        for layer, layout in enumerate(config.layouts):
            offset = torch.tensor(layout.head_offset, dtype=torch.int32)
            self.register_buffer(f"head_offset_{layer}", offset, persistent=False)

    def _angles(self, temporal: Tensor, spatial: Tensor) -> Tensor:
        """[F, temporal pairs] and [T, spatial pairs] -> [N, D/2]."""
        frames, tokens = temporal.shape[0], spatial.shape[0]
        parts = (
            temporal[:, None, :].expand(frames, tokens, -1),
            spatial[None].expand(frames, tokens, -1),
        )
        return torch.cat(parts, dim=-1).flatten(0, 1)

    def forward(
        self,
        x: Tensor,
        eps: Tensor,
        time_sinusoid: Tensor,
        sigma: Tensor,
        next_sigma: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        hist_len: Tensor,
        new_len: Tensor,
        hist_k: Sequence[Tensor],
        hist_v: Sequence[Tensor],
        cross_k: Sequence[Tensor],
        cross_v: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Run one step.

        Args:
            x: [F, C, h, w] float32, noisy latents.
            eps: [F, C, h, w] float32, noise for the next step's input.
            time_sinusoid: [1, freq_dim] float32.
            sigma: [1] float32, noise level of x.
            next_sigma: [1] float32, noise level of the next step's input.
            rope_cos: [F, temporal pairs] float32.
            rope_sin: same.
            hist_len: [L, H] int32, valid history rows of every head.
            new_len: [1] int32, valid rows of the chunk.
            hist_k: per layer [R, D], compute dtype.
            hist_v: same.
            cross_k: per layer [H, text_len, D], compute dtype.
            cross_v: same.

        Returns:
            x0 and x_next [F, C, h, w] float32; new_k and new_v per layer [H, N, D].
        """
        model, shape = self.model, self.config.model
        cos = self._angles(rope_cos, self.get_buffer("spatial_cos"))
        sin = self._angles(rope_sin, self.get_buffer("spatial_sin"))
        time, projected = model.embed_time(time_sinusoid)
        tokens = model.embed_latents(x)
        new_k: list[Tensor] = []
        new_v: list[Tensor] = []
        for layer, block in enumerate(model.layers):
            attn = block.self_attn

            def attend(
                q: Tensor, k: Tensor, v: Tensor, layer: int = layer, attn: Attention = attn
            ) -> Tensor:
                q, k = qk_norm_rope(
                    q, k, attn.norm_q.weight, attn.norm_k.weight, cos, sin,
                    shape.num_heads, shape.eps,
                )  # fmt: skip
                v = attn.split_heads(v).contiguous()
                new_k.append(k)
                new_v.append(v)
                if self._observer is not None:
                    self._observer(layer, q, k)
                out = head_indexed_attention(
                    q, k, v, hist_k[layer], hist_v[layer],
                    self.get_buffer(f"head_offset_{layer}"), hist_len[layer], new_len,
                    self.config.layouts[layer].max_rows_per_head,
                )  # fmt: skip
                return out.flatten(1)

            tokens = block(tokens, projected, attend, cross_k[layer], cross_v[layer])
        chunk = self.config.chunk
        patches = model.head(tokens, time).float()
        flow = unpatchify(patches, chunk.num_frames, chunk.grid, shape.patch_size)
        x0 = x - sigma * flow
        x_next = (1 - next_sigma) * x0 + next_sigma * eps
        return x0, x_next, new_k, new_v


class EvictGraph(nn.Module):
    """Score the candidate segments from layer 1 and compact K and V of every evicted layer."""

    def __init__(self, config: RolloutConfig) -> None:
        super().__init__()
        self.config = config
        self._candidates = {layer: _candidates(config, layer) for layer in config.evicted_layers}

    def forward(
        self,
        hist_k: Sequence[Tensor],
        hist_v: Sequence[Tensor],
        new_k: Sequence[Tensor],
        new_v: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """Select and compact.

        Args:
            hist_k: [R, D] of each evicted layer, in the order of `config.evicted_layers`.
            hist_v: same.
            new_k: [H, N, D] of each evicted layer, from the clean pass.
            new_v: same.

        Returns:
            dyn_k and dyn_v per evicted layer [dynamic heads, B * T, D]; scores [F, P] float32 and
            kept [B * P] int32 of layer 1 (with `per_layer` selection too).
        """
        scores = self.score(hist_k, new_k)
        dyn_k, dyn_v, kept = self.compact(scores, hist_k, hist_v, new_k, new_v)
        return dyn_k, dyn_v, scores[self._scoring], kept

    @property
    def _scoring(self) -> int:
        """Position of layer 1, whose scores and selection are reported, among the scores."""
        per_layer = self.config.policy.selection == "per_layer"
        return self.config.evicted_layers.index(1) if per_layer else 0

    def score(self, hist_k: Sequence[Tensor], new_k: Sequence[Tensor]) -> list[Tensor]:
        """Scores [F, P] of layer 1, or of every evicted layer with `per_layer` selection."""
        return [
            segment_similarity(hist_k[i], new_k[i], *astuple(self._candidates[layer]))
            for i, layer in enumerate(self.config.evicted_layers)
            if self.config.policy.selection == "per_layer" or layer == 1
        ]

    def compact(
        self,
        scores: Sequence[Tensor],
        hist_k: Sequence[Tensor],
        hist_v: Sequence[Tensor],
        new_k: Sequence[Tensor],
        new_v: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """dyn_k, dyn_v and layer 1's kept segments, given the scores of `score`."""
        layers, num_kept = self.config.evicted_layers, self.config.policy.num_kept_segments
        candidates = [astuple(self._candidates[layer]) for layer in layers]
        outputs = [
            similarity_eviction(
                scores[i if len(scores) > 1 else 0],
                hist_k[i], hist_v[i], new_k[i], new_v[i], *candidates[i], num_kept,
            )
            for i in range(len(layers))
        ]  # fmt: skip
        dyn_k, dyn_v, kept = (list(column) for column in zip(*outputs, strict=True))
        return dyn_k, dyn_v, kept[layers.index(1)]


def _candidates(config: RolloutConfig, layer: int) -> CandidateLayout:
    group = config.layouts[layer].group("dynamic")
    assert group is not None, f"layer {layer} is not evicted"
    policy, tokens = config.policy, config.chunk.tokens_per_frame
    return CandidateLayout(
        first_head=group.first_head,
        row_offset=group.row_offset,
        rows_per_head=group.rows_per_head,
        sink_rows=policy.num_sink_frames * tokens,
        temporal_frames=policy.num_temporal_frames,
        tokens_per_frame=tokens,
        num_segments=policy.num_segments,
    )
