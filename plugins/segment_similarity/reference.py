"""Meaning of FkSegmentSimilarity in plain torch.

Legend: G dynamic heads, H heads, N new tokens, D head dim, R pool rows, F frames per chunk,
T tokens per frame, P segments per frame.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from forcing_kv.plugins.frame_chain.layout import CandidateLayout
from forcing_kv.plugins.frame_chain.reference import frame_chain


def segment_similarity(hist_k: Tensor, new_k: Tensor, *candidates: int) -> Tensor:
    """Score every candidate segment by its similarity with the frame after it.

    Args:
        hist_k: pool of history keys [R, D], compute dtype.
        new_k: keys of the chunk [H, N, D], same dtype.
        candidates: the fields of `CandidateLayout`.

    Returns:
        Scores [F, P], float32: the mean over a segment's tokens of the cosine between token i of
        a frame and token i of the next, each the concatenation over the dynamic heads.
    """
    layout = CandidateLayout(*candidates)
    chain_GFTD = frame_chain(hist_k, new_k, layout).float()
    tokens_FTC = chain_GFTD.permute(1, 2, 0, 3).flatten(-2)
    cosine_FT = F.cosine_similarity(tokens_FTC[:-1], tokens_FTC[1:], dim=-1, eps=1e-8)
    return cosine_FT.unflatten(-1, (layout.num_segments, -1)).mean(-1)
