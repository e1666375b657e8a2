"""Self-attention over the cache in the ways that the baselines do it.

Each way is one class with one method, so that the passes around it are the same code. They read
the same packed pools (`dense` its own), and `functional.scaled_dot_product_attention` picks the
fastest kernel that PyTorch has for the device.

Legend: N tokens, H heads, D head dim, G heads of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.policy import HeadKind
from forcing_kv.runtime_trt.rollout.ports import pool_ports
from forcing_kv.runtime_trt.rollout.timeline import ChunkPlan


class History(Protocol):
    """What a way to attend must offer."""

    exported_order: bool
    """Whether the model's heads are sorted static first."""
    pools: dict[str, list[Tensor]]
    """Per layer the keys ("k") and values ("v") of the past."""

    def begin_chunk(self, plan: ChunkPlan) -> None:
        """Take note of what the chunk sees; called outside of any capture."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """From q, k, v [H, N, D] to [N, H, D]."""
        ...


def empty_pools(config: RolloutConfig, device: torch.device) -> dict[str, list[Tensor]]:
    """Packed pools [R, D] of every layer."""
    pools = [
        torch.zeros(port.shape, dtype=getattr(torch, port.dtype), device=device)
        for port in pool_ports(config)
    ]
    num_layers = config.model.num_layers
    return {"k": pools[:num_layers], "v": pools[num_layers:]}


class DenseHistory:
    """Dense attention over one buffer of the whole window, written in place.

    The chunk's rows go straight to the slots of the chunk that leaves the window, so there is no
    joining and no commit: the kindest form of the dense baseline. Windows of whole chunks without
    a sink alone.
    """

    exported_order = True

    def __init__(self, config: RolloutConfig, device: torch.device) -> None:
        policy, chunk, model = config.policy, config.chunk, config.model
        window = policy.warmup_frames + chunk.num_frames
        assert policy.num_sink_frames == 0, "the dense baseline has no sink"
        assert window % chunk.num_frames == 0, "the dense baseline holds whole chunks"
        self._chunks, self._tokens = window // chunk.num_frames, chunk.num_tokens
        shape = (model.num_heads, window * chunk.tokens_per_frame, model.head_dim)
        dtype = getattr(torch, config.dtype)
        self.pools = {
            part: [torch.zeros(shape, dtype=dtype, device=device) for _ in config.layouts]
            for part in "kv"
        }
        self._valid = self._tokens
        # In device memory, so that one captured graph serves every slot.
        self._rows = torch.arange(self._tokens, device=device)

    def begin_chunk(self, plan: ChunkPlan) -> None:
        """See `History`."""
        self._valid = self._tokens * min(plan.index + 1, self._chunks)
        begin = self._tokens * (plan.index % self._chunks)
        self._rows.copy_(torch.arange(begin, begin + self._tokens))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `History`."""
        keys, values = self.pools["k"][layer], self.pools["v"][layer]
        keys[:, self._rows] = k
        values[:, self._rows] = v
        out = F.scaled_dot_product_attention(
            q[None], keys[None, :, : self._valid], values[None, :, : self._valid]
        )
        return out[0].transpose(0, 1)


class GroupedHistory:
    """Compressed attention in plain PyTorch: static heads, then dynamic heads, joined by `cat`."""

    exported_order = True

    def __init__(self, config: RolloutConfig, device: torch.device) -> None:
        self._config = config
        self.pools = empty_pools(config, device)
        self._history: Mapping[HeadKind, int] = {}

    def begin_chunk(self, plan: ChunkPlan) -> None:
        """See `History`."""
        tokens = self._config.chunk.tokens_per_frame
        self._history = {k: group.history_frames * tokens for k, group in plan.groups.items()}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `History`."""
        outputs = []
        for group in self._config.layouts[layer].groups:
            rows = self._history[group.kind]
            joined = []
            for part, new in (("k", k), ("v", v)):
                pool = self.pools[part][layer][group.rows].view(group.num_heads, -1, k.shape[-1])
                joined.append(torch.cat((pool[:, :rows], new[group.heads]), dim=1))
            keys, values = joined
            heads = q[group.heads]
            outputs.append(F.scaled_dot_product_attention(heads[None], keys[None], values[None]))
        return torch.cat(outputs, dim=1)[0].transpose(0, 1)


class ReferenceHistory:
    """Compressed attention the way the research code does it.

    Heads stay in checkpoint order: each layer reads its fill level back to the host, builds its
    head indices, extracts the heads' queries and rows by index, joins sink, local, selected and
    own rows, attends twice and scatters the results. Written from its description.
    """

    exported_order = False

    def __init__(self, config: RolloutConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self.pools = empty_pools(config, device)
        self._fill: dict[HeadKind, Tensor] = {}
        self._sink = config.policy.num_sink_frames * config.chunk.tokens_per_frame

    def begin_chunk(self, plan: ChunkPlan) -> None:
        """See `History`."""
        tokens = self._config.chunk.tokens_per_frame
        self._fill = {
            kind: torch.tensor(group.history_frames * tokens, device=self._device)
            for kind, group in plan.groups.items()
        }

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `History`."""
        order = self._config.partition.head_order(layer)
        out = torch.empty_like(q)
        for group in self._config.layouts[layer].groups:
            heads = torch.tensor(order[group.heads], device=self._device)
            fill = int(self._fill[group.kind].item())
            joined = []
            for part, new in (("k", k), ("v", v)):
                pool = self.pools[part][layer][group.rows].view(group.num_heads, -1, k.shape[-1])
                sink, rest = pool[:, : min(self._sink, fill)], pool[:, self._sink : fill]
                joined.append(torch.cat((sink, rest, new[heads]), dim=1))
            keys, values = joined
            extracted = q[heads]
            attended = F.scaled_dot_product_attention(extracted[None], keys[None], values[None])
            out[heads] = attended[0]
        return out.transpose(0, 1)
