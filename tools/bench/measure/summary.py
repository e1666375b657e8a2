"""Summaries of repeated times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def summary(times_ms: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    low, middle, high = np.percentile(times_ms, (20, 50, 80))
    return {"median": round(float(middle), 4), "p20": round(float(low), 4),
            "p80": round(float(high), 4)}  # fmt: skip


def latency(times_ms: Sequence[float]) -> dict[str, float]:
    """p50, p99, worst, jitter (p99 - p50), and growth: last tenth over first tenth."""
    times = np.asarray(times_ms, np.float64)
    middle, high = np.percentile(times, (50, 99))
    tenth = max(1, len(times) // 10)
    growth = np.median(times[-tenth:]) / np.median(times[:tenth])
    return {
        "p50_ms": round(float(middle), 4),
        "p99_ms": round(float(high), 4),
        "max_ms": round(float(times.max()), 4),
        "jitter_ms": round(float(high - middle), 4),
        "growth": round(float(growth), 4),
    }
