"""Frame maps of many passes, pooled into one score per head.

Legend: S samples (passes), L layers, H heads, Fq query frames, Fk key frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from forcing_kv.calibration.heads.rule import HeadRule
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import HeadPartition


@dataclass(frozen=True)
class Sample:
    """One pass of the denoiser over one chunk of one rollout."""

    prompt: str
    seed: int
    chunk: int
    step: int
    """Denoise step; the clean pass has the number of denoise steps."""


@dataclass(frozen=True)
class HeadProfile:
    """Frame maps of a calibration and what follows from them."""

    samples: tuple[Sample, ...]
    maps: tuple[Tensor, ...]
    """Of each sample [L, H, Fq, Fk], float32, CPU."""
    rule: HeadRule

    def __post_init__(self) -> None:
        shapes = {tuple(frame_map.shape[:2]) for frame_map in self.maps}
        if len(self.maps) != len(self.samples) or len(shapes) != 1:
            raise InputError(
                f"a head profile needs one map for each sample and at least one; found "
                f"{len(self.maps)} maps of {shapes} layers and heads for {len(self.samples)}"
            )

    @cached_property
    def masses_SLH2(self) -> NDArray[np.float64]:
        """Last and whole mass of every head in every sample [S, L, H, 2]."""
        return np.array(
            [
                [[self.rule.masses(head) for head in layer] for layer in frame_map]
                for frame_map in self.maps
            ],
            dtype=np.float64,
        )

    @property
    def scores_SLH(self) -> NDArray[np.float64]:
        """Score of every head in every sample [S, L, H]."""
        scores: NDArray[np.float64] = self.masses_SLH2[..., 0] / self.masses_SLH2[..., 1]
        return scores

    @property
    def pooled_LH(self) -> NDArray[np.float64]:
        """Score of every head over all samples [L, H]: the masses are added up before dividing."""
        last, whole = np.moveaxis(self.masses_SLH2.sum(0), -1, 0)
        pooled: NDArray[np.float64] = last / whole
        return pooled

    @property
    def partition(self) -> HeadPartition:
        """Static and dynamic heads by the pooled score."""
        static = tuple(
            tuple(head for head, score in enumerate(row) if self.rule.is_static(score))
            for row in self.pooled_LH
        )
        return HeadPartition(self.pooled_LH.shape[1], static)

    @property
    def num_key_frames(self) -> int:
        """Fk of the widest sample."""
        return max(frame_map.shape[-1] for frame_map in self.maps)
