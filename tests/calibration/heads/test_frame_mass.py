"""Streaming frame mass against a dense float64 reference, and its memory bound."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from forcing_kv.calibration.heads import rule
from forcing_kv.calibration.heads.rule import frame_mass
from forcing_kv.runtime_trt.errors import InputError


def dense_frame_mass(q, k, key_frames, num_query_frames):
    """The whole softmax in float64, then sums over the keys and means over the queries."""
    probabilities = (q.double() @ k.double().transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
    rows = probabilities.unflatten(1, (num_query_frames, -1)).mean(2)
    columns = [rows[..., key_frames == frame].sum(-1) for frame in key_frames.unique()]
    return torch.stack(columns, dim=-1)


@settings(max_examples=40, deadline=None)
@given(
    num_heads=st.integers(1, 3),
    num_query_frames=st.integers(1, 3),
    tokens=st.integers(1, 7),
    key_frames=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    block_elements=st.integers(1, 200),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_streaming_equals_dense(
    num_heads, num_query_frames, tokens, key_frames, block_elements, scale, seed
):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_heads, num_query_frames * tokens, 8, generator=generator) * scale
    k = torch.randn(num_heads, len(key_frames), 8, generator=generator)
    frames = torch.tensor(key_frames)
    found = frame_mass(q, k, frames, num_query_frames, block_elements=block_elements)
    expected = dense_frame_mass(q, k, frames, num_query_frames)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:2]))


def test_keys_are_cut_into_blocks(monkeypatch):
    monkeypatch.setattr(rule, "_MAX_KEY_ROWS", 5)
    q, k = torch.randn(2, 6, 8), torch.randn(2, 33, 8)
    frames = torch.arange(33) // 11
    torch.testing.assert_close(
        frame_mass(q, k, frames, 3).double(), dense_frame_mass(q, k, frames, 3), atol=1e-5, rtol=0
    )


def test_bfloat16_inputs_are_computed_in_float32():
    q, k = torch.randn(2, 6, 8).bfloat16(), torch.randn(2, 12, 8).bfloat16()
    frames = torch.arange(12) // 4
    expected = dense_frame_mass(q, k, frames, 3)
    torch.testing.assert_close(frame_mass(q, k, frames, 3).double(), expected, atol=1e-6, rtol=0)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def test_memory_is_bounded_with_32k_keys():
    num_frames, tokens, heads, head_dim = 21, 1560, 2, 16
    q = torch.randn(heads, 3 * 100, head_dim)
    k = torch.randn(heads, num_frames * tokens, head_dim)
    frames = torch.arange(num_frames).repeat_interleave(tokens)
    block_elements = 1 << 17
    with LargestTensor() as largest:
        mass = frame_mass(q, k, frames, 3, block_elements=block_elements)
    assert mass.shape == (heads, 3, num_frames)
    # Beside the blocks there are only one frame's keys and the results, never queries x keys.
    bound = max(block_elements, heads * tokens * head_dim, num_frames * q[..., 0].numel())
    assert largest.num_elements <= bound < heads * q.shape[1] * k.shape[1] / 100


@pytest.mark.parametrize(("queries", "frames"), [(7, 12), (6, 11)])
def test_shapes_that_do_not_fit_are_refused(queries, frames):
    with pytest.raises(InputError, match="do not fit"):
        frame_mass(torch.ones(1, queries, 4), torch.ones(1, 12, 4), torch.zeros(frames), 3)
