"""Latent sizes by name, and the nearest valid ones on refusal."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.resolution import (
    MAX_SIDE,
    RESOLUTIONS,
    check_latent_size,
    is_valid_size,
    nearest_valid_sizes,
    parse_latent_size,
    pixel_text,
)


def test_names_and_sizes():
    assert parse_latent_size("--latent-size", "480p") == (60, 104)
    assert parse_latent_size("--latent-size", "16x24") == (16, 24)
    assert parse_latent_size("--latent-size", "480p-portrait") == (104, 60)
    assert parse_latent_size("--latent-size", " 480P ") == (60, 104)
    for size in RESOLUTIONS.values():
        check_latent_size(size, 2, 6)


def test_pixels_are_width_by_height():
    for text in ("832x480px", "832X480 pixels", "832 × 480 px"):
        assert parse_latent_size("--resolution", text) == (60, 104)
    assert parse_latent_size("--resolution", "480x832px") == (104, 60)
    assert pixel_text((60, 104)) == "832x480 pixels"


@pytest.mark.parametrize(
    "text", ["480x832", "832x480", "854x480", "1080x1920", "1280x720", "256x256", "9999x99999"]
)
def test_numbers_that_may_be_pixels_are_asked_about(text):
    with pytest.raises(
        InputError, match=r"as latents is \d+x\d+ pixels; for pixels write"
    ) as error:
        parse_latent_size("--resolution", text)
    latents = str(error.value).rpartition(" ")[2]
    assert latents.endswith("latents")
    parse_latent_size("--resolution", latents)


@pytest.mark.parametrize(
    "text",
    [
        "4k", "", "x", "60x", "-60x104", "60x104x3", "6e1x104", "60.0x104", "٦٠x١٠٤", "60x104kg",
        "60\n104", "9" * 5000, "9" * 5000 + "x1", "60x104\x00", "480p\x1b[31m",
    ],
)  # fmt: skip
def test_other_forms_are_refused_in_one_short_line(text):
    with pytest.raises(InputError, match="480p-portrait") as error:
        parse_latent_size("--latent-size", text)
    assert len(str(error.value)) < 300
    assert str(error.value).isprintable()


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_the_sizes_that_are_proposed_for_pixels_are_accepted(width, height):
    try:
        parse_latent_size("--resolution", f"{width}x{height}px")
    except InputError as error:
        told = str(error).partition("near sizes are ")[2].split(", ")
        for text in told:
            check_latent_size(parse_latent_size("--resolution", text), 2, 6)
        assert told
    else:
        assert width % 8 == height % 8 == 0


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 2), st.integers(1, 10**9))
def test_the_sizes_that_are_proposed_are_accepted(height, width, patch, segments):
    if is_valid_size(height, width, patch, segments):
        return check_latent_size((height, width), patch, segments)
    with pytest.raises(InputError, match=r"nearest sizes are|choose fewer segments") as error:
        check_latent_size((height, width), patch, segments)
    told = str(error.value).partition("nearest sizes are ")[2]
    for text in told.split(", ") if told else ():
        size = parse_latent_size("--resolution", text)
        check_latent_size(size, patch, segments)
        assert max(size) <= MAX_SIDE
    return None


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
