"""Frame-wise attention mass of each head, and the published rule that tells static from dynamic.

Legend: H heads, N query tokens, M key tokens, D head dim, Fq query frames, Fk key frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from forcing_kv.export.request.presets import PUBLISHED_THRESHOLD
from forcing_kv.runtime_trt.errors import InputError

DEFAULT_BLOCK_ELEMENTS = 1 << 22
"""Largest block of attention scores held at a time: 16 MiB of float32."""
_MAX_KEY_ROWS = 2048


@dataclass(frozen=True)
class HeadRule:
    """A head is static if its attention stays near the chunk.

    Source: `configs_head/head_profile.py` of Forcing-KV at commit 50ac1f4. The published partitions
    of the 1.3B models were made with `skip_first=3`, by their own description.
    """

    threshold: float = PUBLISHED_THRESHOLD
    """Lowest score of a static head."""
    skip_first: int = 1
    """First key frames, the attention sink, that the whole mass leaves out."""
    last_k: int = 4
    """Last key frames whose mass is compared with the whole; all, if there are fewer."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise InputError(f"HeadRule.threshold is {self.threshold}; it must be a number >= 0")
        if self.skip_first < 0 or self.last_k < 1:
            raise InputError(
                f"HeadRule: skip_first is {self.skip_first} and last_k {self.last_k}; allowed are "
                "skip_first >= 0 and last_k >= 1"
            )

    def masses(self, frame_map: Tensor) -> tuple[float, float]:
        """Mass of the last key frames, and of all but the first, of a map [Fq, Fk].

        Their quotient is the score: above 1 where the last frames include the first ones.
        The sums are float32, as published: rounding decides a score that lies at the threshold.

        Raises:
            InputError: the map is not 2-D, has no frame after the first ones, or holds no mass.
        """
        if frame_map.ndim != 2 or frame_map.shape[1] <= self.skip_first:
            raise InputError(
                f"a frame map of shape {tuple(frame_map.shape)} cannot be scored; it needs query "
                f"frames and more than {self.skip_first} key frames"
            )
        frame_map = frame_map.float().cpu()
        last = float(frame_map[:, -self.last_k :].sum())
        whole = float(frame_map[:, self.skip_first :].sum())
        if not (whole > 0 and math.isfinite(last) and math.isfinite(whole)):
            raise InputError(
                f"a frame map holds the mass {whole} after its first {self.skip_first} key frames; "
                "it must be positive and finite"
            )
        return last, whole

    def is_static(self, score: float) -> bool:
        """Whether a head with this score is static; the threshold itself is."""
        return score >= self.threshold

    def is_informative(self, num_key_frames: int) -> bool:
        """Whether a head could be dynamic at all with this many key frames."""
        return num_key_frames > self.last_k + self.skip_first


def frame_mass(
    q_HND: Tensor,
    k_HMD: Tensor,
    key_frames_M: Tensor,
    num_query_frames: int,
    *,
    block_elements: int = DEFAULT_BLOCK_ELEMENTS,
) -> Tensor:
    """Attention mass that the queries of each frame give to each key frame.

    The softmax is split by key frame: a frame's share is exp(logsumexp over the frame - logsumexp
    over all), so that one pass over the keys suffices and N x M is never held.

    Args:
        q_HND: queries [H, N, D] after norm and RoPE, any float dtype, frame after frame.
        k_HMD: keys [H, M, D] likewise, rows in any order.
        key_frames_M: frame index of each key row [M], integer.
        num_query_frames: Fq; divides N.
        block_elements: bound on the elements of one block of scores.

    Returns:
        Mass [H, Fq, Fk] float32, key frames ascending; the mean over the frame's queries, so that
        each row sums to 1.
    """
    num_queries = q_HND.shape[1]
    if num_queries % num_query_frames or key_frames_M.shape != k_HMD.shape[1:2]:
        raise InputError(
            f"{num_queries} queries of {num_query_frames} frames and key frames "
            f"{tuple(key_frames_M.shape)} do not fit keys {tuple(k_HMD.shape)}"
        )
    lse_FkHN = torch.stack(
        [
            _frame_logsumexp(q_HND, k_HMD[:, key_frames_M == frame], block_elements)
            for frame in torch.unique(key_frames_M)
        ]
    )
    mass_FkHFq = lse_FkHN.softmax(0).unflatten(-1, (num_query_frames, -1)).mean(-1)
    return mass_FkHFq.permute(1, 2, 0)


def _frame_logsumexp(q_HND: Tensor, k_HMD: Tensor, block_elements: int) -> Tensor:
    """Logsumexp of the scaled scores over all key rows given, [H, N] float32, in blocks."""
    num_heads, num_queries, head_dim = q_HND.shape
    key_rows = max(1, min(k_HMD.shape[1], _MAX_KEY_ROWS, block_elements // num_heads))
    query_rows = max(1, block_elements // (num_heads * key_rows))
    result = q_HND.new_full((num_heads, num_queries), -math.inf, dtype=torch.float32)
    for keys in k_HMD.split(key_rows, dim=1):
        keys_HDm = keys.float().transpose(1, 2)
        for start in range(0, num_queries, query_rows):
            rows = slice(start, start + query_rows)
            scores = (q_HND[:, rows].float() * head_dim**-0.5) @ keys_HDm
            result[:, rows] = torch.logaddexp(result[:, rows], scores.logsumexp(-1))
    return result
