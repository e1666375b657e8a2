"""Folded padding weighs what it stands for, in every dtype."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.text_fold import MAX_PAD_ROWS, fold_text, pad_biases


@given(st.integers(1, 4096), st.sampled_from(["float32", "float16", "bfloat16"]))
def test_biases_add_up_and_are_exact(count, dtype):
    biases = pad_biases(count, dtype)
    assert 1 <= len(biases) <= MAX_PAD_ROWS
    assert sum(map(math.exp, biases)) == pytest.approx(count, rel=2e-5)
    for bias in biases:
        bits = np.float32(bias).view(np.uint32)
        assert np.float32(bias) == bias
        assert dtype != "float16" or float(np.float16(bias)) == bias
        assert dtype != "bfloat16" or not bits & 0xFFFF


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_each_bias_is_the_largest_that_weighs_no_more_than_is_left(dtype):
    # In float32 the logarithm of 938 rounds up to a value of bfloat16.
    for count in range(1, 4097):
        left = float(count)
        for bias in pad_biases(count, dtype):
            assert bias <= math.log(left) < next_above(bias, dtype), count
            left -= math.exp(bias)


def next_above(value: float, dtype: str) -> float:
    """The value of `dtype` that follows."""
    if dtype == "float16":
        return float(np.nextafter(np.float16(value), np.float16(np.inf)))
    if value == 0:
        return float(np.finfo(np.float32).tiny)
    step = 1 if value > 0 else -1
    bits = int(np.float32(value).view(np.uint32)) + step * 0x10000
    return float(np.uint32(bits).view(np.float32))


def test_no_padding_needs_no_bias():
    assert pad_biases(0, "bfloat16") == []
    embeds, bias = fold_text(np.ones((8, 4), np.float32), 8, "float32")
    assert embeds.shape == (8, 4)
    assert not bias.any()


def test_rows_behind_the_padding_weigh_nothing():
    prompt = np.zeros((32, 4), np.float32)
    prompt[:5] = 1
    embeds, bias = fold_text(prompt, 10, "float32")
    assert embeds.shape == (10, 4)
    assert bias[:5].tolist() == [0.0] * 5
    assert bias[5] == np.float32(math.log(27))
    assert np.isneginf(bias[6:]).all()


def test_a_long_prompt_is_refused():
    with pytest.raises(InputError, match="has 9 rows of text, but this engine folds"):
        fold_text(np.pad(np.ones((9, 4), np.float32), ((0, 7), (0, 0))), 9, "float32")
