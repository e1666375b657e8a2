"""How far the class of a head depends on the prompt, the seed, the step and the chunk.

Legend: S samples, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forcing_kv.calibration.heads.head_profile import HeadProfile, Sample

GROUPINGS: dict[str, Callable[[Sample], str]] = {
    "prompt": lambda sample: sample.prompt,
    "seed": lambda sample: str(sample.seed),
    "chunk": lambda sample: str(sample.chunk),
    "step": lambda sample: str(sample.step),
}
"""What samples are grouped by, and the name of a sample's group."""


@dataclass(frozen=True)
class Stability:
    """Agreement of the samples of a profile; every share is of (sample, head) pairs."""

    num_samples: int
    agreement: float
    """Share of single samples in which a head has its pooled class."""
    pairwise_agreement: float
    """Share of equal classes between two different samples; 1 for a single sample."""
    unanimous_heads: float
    """Share of heads with the same class in every sample."""
    mean_score_std: float
    """Mean over heads of `score_std`."""
    agreement_by: dict[str, dict[str, float]]
    """Grouping -> group -> share of heads whose class, pooled in the group, is the overall one."""
    score_std: tuple[tuple[float, ...], ...]
    """Standard deviation of the score over samples [layer][head]."""


def measure_stability(profile: HeadProfile) -> Stability:
    """Compare the class of each head in single samples and groups with its pooled class."""
    threshold = profile.rule.threshold
    classes_SLH = profile.scores_SLH >= threshold
    pooled_LH = profile.pooled_LH >= threshold
    score_std = tuple(tuple(map(float, row)) for row in profile.scores_SLH.std(0))
    return Stability(
        num_samples=len(profile.samples),
        agreement=float((classes_SLH == pooled_LH).mean()),
        pairwise_agreement=_pairwise_agreement(classes_SLH),
        unanimous_heads=float((classes_SLH == classes_SLH[0]).all(0).mean()),
        mean_score_std=float(np.mean(score_std)),
        agreement_by={name: _group_agreement(profile, key) for name, key in GROUPINGS.items()},
        score_std=score_std,
    )


def _pairwise_agreement(classes_SLH: NDArray[np.bool_]) -> float:
    """Mean over all pairs of samples, counted per head from its number of static samples."""
    count = len(classes_SLH)
    if count < 2:
        return 1.0
    static = classes_SLH.sum(0).astype(np.float64)
    dynamic = count - static
    equal = static * (static - 1) + dynamic * (dynamic - 1)
    return float(equal.mean() / (count * (count - 1)))


def _group_agreement(profile: HeadProfile, key: Callable[[Sample], str]) -> dict[str, float]:
    pooled_LH = profile.pooled_LH >= profile.rule.threshold
    names = np.array([key(sample) for sample in profile.samples])
    shares = {}
    for name in dict.fromkeys(names.tolist()):
        last, whole = np.moveaxis(profile.masses_SLH2[names == name].sum(0), -1, 0)
        shares[name] = float(((last / whole >= profile.rule.threshold) == pooled_LH).mean())
    return shares
