"""Latent sizes by name, and the nearest valid ones on refusal."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.resolution import (
    RESOLUTIONS,
    check_latent_size,
    is_valid_size,
    nearest_valid_sizes,
    parse_latent_size,
)


def test_names_and_sizes():
    assert parse_latent_size("--latent-size", "480p") == (60, 104)
    assert parse_latent_size("--latent-size", "16x24") == (16, 24)
    with pytest.raises(InputError, match="480p"):
        parse_latent_size("--latent-size", "4k")
    for size in RESOLUTIONS.values():
        check_latent_size(size, 2, 6)


def test_refusal_names_the_nearest_valid_sizes():
    with pytest.raises(InputError, match=r"61x104.*nearest sizes are 60x104, 60x10"):
        check_latent_size((61, 104), 2, 6)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 2), st.integers(1, 8))
def test_nearest_sizes_are_valid_and_none_is_nearer(height, width, patch, segments):
    found = nearest_valid_sizes((height, width), patch, segments)
    assert len(found) == 3
    assert all(is_valid_size(*size, patch, segments) for size in found)
    reach = abs(found[0][0] - height) + abs(found[0][1] - width)
    for rows, columns in itertools.product(range(1, 90), range(1, 90)):
        if abs(rows - height) + abs(columns - width) < reach:
            assert not is_valid_size(rows, columns, patch, segments)
