"""Meaning of FkSimilarityEviction in plain torch.

Legend: G dynamic heads, H heads, N new tokens, D head dim, R pool rows, F frames per chunk,
T tokens per frame, P segments per frame, M kept segments, S tokens per segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forcing_kv.plugins.frame_chain.layout import CandidateLayout
from forcing_kv.plugins.frame_chain.reference import frame_chain


def select_segments(scores: Tensor, num_kept: int) -> Tensor:
    """Indices of the segments to keep.

    Args:
        scores: scores [F, P], float32; NaN counts as the largest score.
        num_kept: segments to keep.

    Returns:
        Indices [num_kept], int32, ascending; among equal scores the lower index goes first.
    """
    ordered = torch.nan_to_num(scores.flatten(), nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = torch.argsort(ordered, stable=True)
    return order[:num_kept].sort().values.to(torch.int32)


def similarity_eviction(
    scores: Tensor,
    hist_k: Tensor,
    hist_v: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    *attributes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select segments by score and compact their keys and values.

    Args:
        scores: scores of the candidate segments [F, P], float32.
        hist_k: pool of history keys [R, D], compute dtype.
        hist_v: pool of history values [R, D], same dtype.
        new_k: keys of the chunk [H, N, D], same dtype.
        new_v: values of the chunk [H, N, D], same dtype.
        attributes: the fields of `CandidateLayout`, and the number of segments to keep, M.

    Returns:
        Kept keys [G, M*S, D] and values [G, M*S, D] in ascending segment order, and the kept
        indices [M], int32, ascending.
    """
    *candidates, num_kept = attributes
    layout = CandidateLayout(*candidates)
    kept = select_segments(scores, num_kept)

    def compact(pool: Tensor, new: Tensor) -> Tensor:
        candidates_GFTD = frame_chain(pool, new, layout)[:, :-1]
        segments_GISD = candidates_GFTD.flatten(1, 2).unflatten(1, (-1, layout.segment_tokens))
        return segments_GISD[:, kept.long()].flatten(1, 2)

    return compact(hist_k, new_k), compact(hist_v, new_v), kept
