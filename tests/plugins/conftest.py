"""Float64 truth of the operators as plain loops, and the tolerance classes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from forcing_kv.plugins.check.accuracy import output_errors, reference_outputs
from forcing_kv.plugins.check.cases import CASES, KERNEL_CASES, OpCase
from forcing_kv.plugins.frame_chain.layout import CandidateLayout

Arrays = tuple[np.ndarray, ...]


def case_id(case: OpCase) -> str:
    return f"{case.spec.torch_name}-{case.name.replace(' ', '_')}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=case_id)
    if "kernel_case" in metafunc.fixturenames:
        metafunc.parametrize("kernel_case", KERNEL_CASES, ids=case_id)


def naive_qk_norm_rope(q, k, q_weight, k_weight, cos, sin, num_heads, eps) -> Arrays:
    def one(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        num_tokens, dim = x.shape
        head_dim = dim // num_heads
        out = np.empty((num_heads, num_tokens, head_dim))
        for n in range(num_tokens):
            row = x[n] / np.sqrt(np.mean(x[n] ** 2) + eps) * weight
            for h in range(num_heads):
                for i in range(head_dim // 2):
                    a, b = row[h * head_dim + 2 * i], row[h * head_dim + 2 * i + 1]
                    out[h, n, 2 * i] = a * cos[n, i] - b * sin[n, i]
                    out[h, n, 2 * i + 1] = a * sin[n, i] + b * cos[n, i]
        return out

    return one(q, q_weight), one(k, k_weight)


def naive_head_indexed_attention(
    q, k_new, v_new, hist_k, hist_v, head_offset, hist_len, new_len, max_history
) -> Arrays:
    num_heads, num_tokens, head_dim = q.shape
    out = np.empty((num_tokens, num_heads, head_dim))
    for h in range(num_heads):
        rows = range(int(head_offset[h]), int(head_offset[h] + hist_len[h]))
        k = np.stack([hist_k[r] for r in rows] + [k_new[h, n] for n in range(int(new_len[0]))])
        v = np.stack([hist_v[r] for r in rows] + [v_new[h, n] for n in range(int(new_len[0]))])
        for n in range(num_tokens):
            scores = k @ q[h, n] / np.sqrt(head_dim)
            weights = np.exp(scores - scores.max())
            out[n, h] = weights @ v / weights.sum()
    return (out,)


def naive_steady_attention(q, k_new, v_new, hist_k, hist_v, *attributes) -> Arrays:
    num_first, first_capacity, first_rows, second_capacity, second_rows = attributes
    num_heads, num_tokens, _ = q.shape
    first = [True] * num_first + [False] * (num_heads - num_first)
    capacities = [first_capacity if is_first else second_capacity for is_first in first]
    return naive_head_indexed_attention(
        q, k_new, v_new, hist_k, hist_v,
        np.cumsum([0, *capacities[:-1]]),
        np.array([first_rows if is_first else second_rows for is_first in first]),
        np.array([num_tokens]), max(capacities),
    )  # fmt: skip


def chain_row(pool, new, layout: CandidateLayout, head: int, frame: int, token: int) -> np.ndarray:
    """Row of a dynamic head's token in a frame of the chain."""
    if frame < layout.temporal_frames:
        run = layout.row_offset + head * layout.rows_per_head + layout.sink_rows
        return pool[run + frame * layout.tokens_per_frame + token]
    row = (frame - layout.temporal_frames) * layout.tokens_per_frame + token
    return new[layout.first_head + head, row]


def naive_segment_similarity(hist_k, new_k, *attributes) -> Arrays:
    layout = CandidateLayout(*attributes)
    heads = range(new_k.shape[0] - layout.first_head)
    num_frames = new_k.shape[1] // layout.tokens_per_frame
    scores = np.zeros((num_frames, layout.num_segments))
    for frame in range(num_frames):
        for token in range(layout.tokens_per_frame):
            a, b = (
                np.concatenate([chain_row(hist_k, new_k, layout, h, f, token) for h in heads])
                for f in (frame, frame + 1)
            )
            cosine = a @ b / max(np.linalg.norm(a), 1e-8) / max(np.linalg.norm(b), 1e-8)
            scores[frame, token // layout.segment_tokens] += cosine / layout.segment_tokens
    return (scores,)


def naive_similarity_eviction(scores, hist_k, hist_v, new_k, new_v, *attributes) -> Arrays:
    layout, num_kept = CandidateLayout(*attributes[:-1]), attributes[-1]
    flat = [np.inf if np.isnan(s) else s for s in scores.ravel()]
    kept = sorted(sorted(range(len(flat)), key=lambda i: (flat[i], i))[:num_kept])
    heads = range(new_k.shape[0] - layout.first_head)

    def compact(pool: np.ndarray, new: np.ndarray) -> np.ndarray:
        size = layout.segment_tokens
        rows = [divmod(i * size + t, layout.tokens_per_frame) for i in kept for t in range(size)]
        return np.stack(
            [
                [chain_row(pool, new, layout, h, frame, token) for frame, token in rows]
                for h in heads
            ]
        )

    return compact(hist_k, new_k), compact(hist_v, new_v), np.array(kept)


NAIVE: dict[str, Callable[..., Arrays]] = {
    "qk_norm_rope": naive_qk_norm_rope,
    "head_indexed_attention": naive_head_indexed_attention,
    "segment_similarity": naive_segment_similarity,
    "similarity_eviction": naive_similarity_eviction,
    "steady_attention": naive_steady_attention,
}


def run_reference(case: OpCase, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return reference_outputs(case.spec, inputs, case.attributes)


@pytest.fixture
def truth() -> Callable[[OpCase, Sequence[torch.Tensor]], Arrays]:
    """Outputs by plain loops in float64."""

    def compute(case: OpCase, inputs: Sequence[torch.Tensor]) -> Arrays:
        arrays = [x.double().numpy() for x in inputs]
        return NAIVE[case.spec.torch_name](*arrays, *case.arguments)

    return compute


@pytest.fixture
def reference() -> Callable[[OpCase, Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]:
    return run_reference


@pytest.fixture
def check() -> Callable[[OpCase, Sequence[torch.Tensor], Sequence[Any]], None]:
    """Compares outputs with the float64 truth by the operator's tolerance class."""

    def compare(case: OpCase, inputs: Sequence[torch.Tensor], outputs: Sequence[Any]) -> None:
        expected = run_reference(case, inputs)
        for found, same_dtype in zip(outputs, expected, strict=True):
            assert found.shape == same_dtype.shape
            assert found.dtype == same_dtype.dtype
        for error in output_errors(case.spec, inputs, case.attributes, outputs):
            assert error.passed, error

    return compare


def make_strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in every second element of a larger storage filled with NaN."""
    filler = torch.nan if tensor.is_floating_point() else -1
    storage = tensor.new_full((*tensor.shape, 2), filler)
    storage[..., 0] = tensor
    return storage[..., 0]


@pytest.fixture
def strided() -> Callable[[torch.Tensor], torch.Tensor]:
    return make_strided
