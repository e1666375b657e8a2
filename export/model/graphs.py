"""The graphs that are exported: prompt, step and evict, and on request clean. All are functional.

Their inputs and outputs are described in `runtime_trt.rollout.ports`.

Legend: F frames per chunk, C channels, N = F * T tokens, H heads, D head dim, R pool rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from forcing_kv.export.model.denoiser import (
    Attend,
    Attention,
    CausalWanModel,
    rms_norm,
    rotate_pairs,
    unpatchify,
)
from forcing_kv.export.model.fusion import PLAIN, FusionOptions, time_tables
from forcing_kv.plugins.bind.torch_library import OPERATORS
from forcing_kv.plugins.frame_chain.layout import CandidateLayout
from forcing_kv.plugins.registry import (
    HEAD_INDEXED_ATTENTION,
    QK_NORM_ROPE,
    SEGMENT_SIMILARITY,
    SIMILARITY_EVICTION,
    STEADY_ATTENTION,
)
from forcing_kv.plugins.steady_attention.layout import SteadyLayout
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import LayerLayout
from forcing_kv.runtime_trt.rollout.schedule import rope_table

AttentionObserver = Callable[[int, Tensor, Tensor], None]
"""(layer, q [H, N, D], k [H, N, D]): post-norm, post-RoPE queries and new keys of every call."""


class PromptGraph(nn.Module):
    """Prompt embeddings to cross-attention K and V of every layer."""

    def __init__(self, model: CausalWanModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, prompt_embeds: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Embed a prompt; returns cross_k and cross_v."""
        context = self.model.embed_text(prompt_embeds)
        pairs = [block.cross_attn.context_kv(context) for block in self.model.layers]
        return [k.contiguous() for k, _ in pairs], [v.contiguous() for _, v in pairs]


@dataclass
class ChunkInputs:
    """What a pass over the chunk reads beside its latents and its time."""

    rope_cos: Tensor
    rope_sin: Tensor
    lengths: tuple[Tensor, Tensor] | None
    """hist_len and new_len; None in the steady form."""
    hist_k: Sequence[Tensor]
    hist_v: Sequence[Tensor]
    cross_k: Sequence[Tensor]
    cross_v: Sequence[Tensor]
    text_bias: Tensor | None = None
    """None for text that is not folded."""

    @classmethod
    def of(cls, rope_cos: Tensor, rope_sin: Tensor, *rest: Any, steady: bool) -> ChunkInputs:
        """From the arguments of a graph, in the order of its ports."""
        if steady:
            return cls(rope_cos, rope_sin, None, *rest)
        hist_len, new_len, *others = rest
        return cls(rope_cos, rope_sin, (hist_len, new_len), *others)


class ChunkGraph(nn.Module):
    """The blocks over one chunk: what a denoise step and a clean pass share.

    The model's heads must be in exported order (`export.model.rewrite.sort_heads_`), and its q, k
    and v fused if `fusion.qkv` says so (`export.model.fusion.fuse_qkv_`).

    Args:
        steady: bake in the rows that a steady chunk sees, instead of reading lengths.
    """

    def __init__(
        self,
        model: CausalWanModel,
        config: RolloutConfig,
        observer: AttentionObserver | None = None,
        fusion: FusionOptions = PLAIN,
        *,
        steady: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.fusion = fusion
        self.steady = steady
        self._observer = observer
        _, height_pairs, width_pairs = config.model.rope_pairs
        rows, columns = config.chunk.grid
        tables = rope_table(range(rows), height_pairs), rope_table(range(columns), width_pairs)
        for name, height, width in zip(("cos", "sin"), *tables, strict=True):
            grid = np.concatenate(
                [np.repeat(height, columns, axis=0), np.tile(width, (rows, 1))], axis=1
            )
            self.register_buffer(f"spatial_{name}", torch.from_numpy(grid), persistent=False)
        for layer, layout in enumerate(() if steady else config.layouts):
            offset = torch.tensor(layout.head_offset, dtype=torch.int32)
            self.register_buffer(f"head_offset_{layer}", offset, persistent=False)
        if fusion.time_tables:
            time, projection = time_tables(model, config.schedule)
            self.register_buffer("time_table", time, persistent=False)
            self.register_buffer("projection_table", projection, persistent=False)

    def angles(self, inputs: ChunkInputs) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, D/2] of every token."""
        pairs = ((inputs.rope_cos, "spatial_cos"), (inputs.rope_sin, "spatial_sin"))
        cos, sin = (_outer_angles(temporal, self.get_buffer(name)) for temporal, name in pairs)
        return cos, sin

    def embed_time(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding [1, dim] and projection [1, 6, dim] of a sinusoid, or of a step's index."""
        if not self.fusion.time_tables:
            return self.model.embed_time(time)
        tables = self.get_buffer("time_table"), self.get_buffer("projection_table")
        embedding, projection = (table.index_select(0, time) for table in tables)
        return embedding, projection

    def run_blocks(
        self, tokens: Tensor, projected: Tensor, inputs: ChunkInputs, num_layers: int
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Run the first `num_layers` blocks; returns tokens, and new_k and new_v of each.

        The latter are `own_rows`.
        """
        model = self.model
        cos, sin = self.angles(inputs)
        text_bias = None if inputs.text_bias is None else inputs.text_bias.to(tokens.dtype)
        new_k: list[Tensor] = []
        new_v: list[Tensor] = []
        for layer, block in enumerate(model.layers[:num_layers]):
            attend = self._attention(layer, block.self_attn, cos, sin, inputs, new_k, new_v)
            tokens = block(
                tokens, projected, attend, inputs.cross_k[layer], inputs.cross_v[layer], text_bias
            )
        return tokens, new_k, new_v

    def _attention(
        self,
        layer: int,
        attn: Attention,
        cos: Tensor,
        sin: Tensor,
        inputs: ChunkInputs,
        new_k: list[Tensor],
        new_v: list[Tensor],
    ) -> Attend:
        """Self-attention of one layer; appends the chunk's rows to `new_k` and `new_v`."""
        shape, layouts = self.config.model, self.config.layouts

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = OPERATORS[QK_NORM_ROPE](
                q, k, attn.norm_q.weight, attn.norm_k.weight, cos, sin,
                shape.num_heads, shape.eps,
            )  # fmt: skip
            v = attn.split_heads(v).contiguous()
            new_k.append(own_rows(k, layouts[layer]))
            new_v.append(own_rows(v, layouts[layer]))
            if self._observer is not None:
                self._observer(layer, q, k)
            rows, layout = (q, k, v, inputs.hist_k[layer], inputs.hist_v[layer]), layouts[layer]
            if inputs.lengths is None:
                out = OPERATORS[STEADY_ATTENTION](*rows, *astuple(steady_layout(layout)))
            else:
                hist_len, new_len = inputs.lengths
                out = OPERATORS[HEAD_INDEXED_ATTENTION](
                    *rows, self.get_buffer(f"head_offset_{layer}"), hist_len[layer], new_len,
                    layout.max_rows_per_head,
                )  # fmt: skip
            return out.flatten(1)

        return attend


def _outer_angles(temporal: Tensor, spatial: Tensor) -> Tensor:
    """[F, temporal pairs] and [T, spatial pairs] -> [N, D/2]."""
    frames, tokens = temporal.shape[0], spatial.shape[0]
    parts = (
        temporal[:, None, :].expand(frames, tokens, -1).flatten(0, 1),
        spatial[None].expand(frames, tokens, -1).flatten(0, 1),
    )
    # Joined last: of a view of it PyTorch's compiler would make a copy for every layer.
    return torch.cat(parts, dim=-1)


class StepGraph(ChunkGraph):
    """One forward of the denoiser over one chunk, with x0 and the next step's input."""

    def forward(
        self,
        x: Tensor,
        eps: Tensor,
        time: Tensor,
        sigma: Tensor,
        next_sigma: Tensor,
        *inputs: Any,
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]] | tuple[Tensor, Tensor]:
        """Run one step; `inputs` are those of `ChunkInputs`.

        `time` is the sinusoid, or with time tables the index of the step. Where there is a clean
        graph for new_k and new_v, x0 and x_next are returned alone.
        """
        model, chunk = self.model, self.config.chunk
        embedding, projected = self.embed_time(time)
        tokens, new_k, new_v = self.run_blocks(
            model.embed_latents(x),
            projected,
            ChunkInputs.of(*inputs, steady=self.steady),
            len(model.layers),
        )
        patches = model.head(tokens, embedding).float()
        flow = unpatchify(patches, chunk.num_frames, chunk.grid, chunk.patch_size)
        x0 = x - sigma * flow
        x_next = (1 - next_sigma) * x0 + next_sigma * eps
        if self.fusion.clean_graph:
            return x0, x_next
        return x0, x_next, new_k, new_v


class CleanGraph(ChunkGraph):
    """The clean pass, cut after the last layer's keys and values: nothing reads what follows."""

    def forward(self, x: Tensor, time: Tensor, *rest: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Compute new_k and new_v of clean latents; pools and text of the last layer stay out."""
        inputs = ChunkInputs.of(*rest, steady=self.steady)
        model = self.model
        _, projected = self.embed_time(time)
        tokens, new_k, new_v = self.run_blocks(
            model.embed_latents(x), projected, inputs, len(model.layers) - 1
        )
        block = model.layers[-1]
        attn = block.self_attn
        k, v = attn.project_kv(block.attention_input(tokens, projected))
        k_HND = attn.split_heads(rms_norm(k, attn.norm_k.weight, attn.norm_k.eps))
        layout = self.config.layouts[-1]
        new_k.append(own_rows(rotate_pairs(k_HND, *self.angles(inputs)), layout))
        new_v.append(own_rows(attn.split_heads(v), layout))
        return new_k, new_v


class EvictGraph(nn.Module):
    """Score the candidate segments from layer 1 and compact K and V of every evicted layer."""

    def __init__(self, config: RolloutConfig) -> None:
        super().__init__()
        self.config = config
        self._candidates = {
            layer: candidate_layout(config, layer) for layer in config.evicted_layers
        }

    def forward(
        self,
        hist_k: Sequence[Tensor],
        hist_v: Sequence[Tensor],
        new_k: Sequence[Tensor],
        new_v: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """Select and compact.

        Lists hold the evicted layers alone, in the order of `config.evicted_layers`; new_k and
        new_v are the clean pass's. Scores and kept are those of layer 1, with `per_layer` selection
        too.
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
            OPERATORS[SEGMENT_SIMILARITY](
                hist_k[i],
                dynamic_rows(new_k[i], self.config.layouts[layer]),
                *astuple(self._candidates[layer]),
            )
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
        chosen_by = scores if len(scores) > 1 else [scores[0]] * len(layers)
        tensors = zip(chosen_by, hist_k, hist_v, new_k, new_v, strict=True)
        outputs = []
        for layer, (chosen, pool_k, pool_v, *new) in zip(layers, tensors, strict=True):
            own = (dynamic_rows(rows, self.config.layouts[layer]) for rows in new)
            arguments = (*astuple(self._candidates[layer]), num_kept)
            outputs.append(OPERATORS[SIMILARITY_EVICTION](chosen, pool_k, pool_v, *own, *arguments))
        dyn_k, dyn_v, kept = (list(column) for column in zip(*outputs, strict=True))
        return dyn_k, dyn_v, kept[layers.index(1)]


def own_rows(rows_HND: Tensor, layout: LayerLayout) -> Tensor:
    """Rows [W, D] of a chunk that a commit may copy, head by head.

    Args:
        rows_HND: keys or values [H, N, D] of the whole chunk.
    """
    blocks = []
    for group in layout.groups:
        block, tokens = rows_HND[group.heads], group.tokens_per_frame
        if group.own_rows_per_head < block.shape[1]:
            frames = [block[:, i * tokens : (i + 1) * tokens] for i in group.own_frames]
            block = torch.cat(frames, dim=1)
        blocks.append(block.flatten(0, 1))
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0].contiguous()


def dynamic_rows(own: Tensor, layout: LayerLayout) -> Tensor:
    """Rows [G, N, D] of the dynamic heads of an evicted layer, of those that `own_rows` gave."""
    group = layout.group("dynamic")
    assert group is not None, "the layer is not evicted"
    return own[group.own_rows].unflatten(0, (group.num_heads, group.own_rows_per_head))


def steady_layout(layout: LayerLayout) -> SteadyLayout:
    """What the heads of a layer see in a steady chunk."""
    first, *others = layout.groups
    second = others[0] if others else None
    return SteadyLayout(
        num_first=first.num_heads,
        first_capacity=first.rows_per_head,
        first_rows=first.steady_rows,
        second_capacity=second.rows_per_head if second else 0,
        second_rows=second.steady_rows if second else 0,
    )


def candidate_layout(config: RolloutConfig, layer: int) -> CandidateLayout:
    """Where the candidates of an evicted layer lie, the chunk's being `dynamic_rows`."""
    group = config.layouts[layer].group("dynamic")
    assert group is not None, f"layer {layer} is not evicted"
    policy, tokens = config.policy, config.chunk.tokens_per_frame
    return CandidateLayout(
        first_head=0,
        row_offset=group.row_offset,
        rows_per_head=group.rows_per_head,
        sink_rows=policy.num_sink_frames * tokens,
        temporal_frames=policy.num_temporal_frames,
        tokens_per_frame=tokens,
        num_segments=policy.num_segments,
    )
