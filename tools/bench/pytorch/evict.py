"""The evict graph in plain PyTorch, as the references of the operators have it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from forcing_kv.export.model.graphs import candidate_layout, dynamic_rows
from forcing_kv.plugins.registry import SEGMENT_SIMILARITY, SIMILARITY_EVICTION
from forcing_kv.runtime_trt.rollout.config import RolloutConfig

Rows = list[Tensor]


class PlainEvict:
    """Scores, selects and compacts the candidates of every evicted layer."""

    def __init__(self, config: RolloutConfig) -> None:
        self._config = config

    def __call__(
        self, hist_k: Rows, hist_v: Rows, new_k: Rows, new_v: Rows
    ) -> tuple[Rows, Rows, Tensor, Tensor]:
        """Arguments and results as those of `EvictGraph`."""
        scoring = self._config.evicted_layers.index(1)
        similarity = SEGMENT_SIMILARITY.module("reference").segment_similarity
        arguments = candidate_layout(self._config, 1).arguments()
        own = dynamic_rows(new_k[scoring], self._config.layouts[1])
        scores = similarity(hist_k[scoring], own, *arguments)
        dyn_k, dyn_v, kept = self._compact(scores, hist_k, hist_v, new_k, new_v)
        return dyn_k, dyn_v, scores, kept

    def take(self, kept: Tensor, scores: Tensor, *rows: Rows) -> tuple[Rows, Rows]:
        """Dynamic rows of given segments.

        Args:
            kept: segments to keep.
            scores: [F, P], for the shape alone.
            rows: the four lists of `__call__`.
        """
        lowest = torch.ones_like(scores).flatten()
        lowest[kept.long()] = -1.0
        dyn_k, dyn_v, _ = self._compact(lowest.view_as(scores), *rows)
        return dyn_k, dyn_v

    def _compact(self, scores: Tensor, *rows: Rows) -> tuple[Any, Any, Tensor]:
        eviction = SIMILARITY_EVICTION.module("reference").similarity_eviction
        layers, num_kept = self._config.evicted_layers, self._config.policy.num_kept_segments
        outputs = []
        for layer, (pool_k, pool_v, *new) in zip(layers, zip(*rows, strict=True), strict=True):
            own = (dynamic_rows(part, self._config.layouts[layer]) for part in new)
            arguments = (*candidate_layout(self._config, layer).arguments(), num_kept)
            outputs.append(eviction(scores, pool_k, pool_v, *own, *arguments))
        dyn_k, dyn_v, kept = (list(column) for column in zip(*outputs, strict=True))
        return dyn_k, dyn_v, kept[0]
