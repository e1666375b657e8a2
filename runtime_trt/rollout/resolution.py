"""Sizes of a frame: names of the usual ones, how they are written, and which a policy can run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import gcd
from types import MappingProxyType

from forcing_kv.runtime_trt.errors import InputError, shown
from forcing_kv.runtime_trt.rollout.layout import ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy

PIXELS_PER_LATENT = 8
"""Side of a latent pixel, in pixels, of Wan's VAE."""
MAX_SIDE = 2048
"""Most latent rows or columns: 16,384 pixels, as far as video encoders and textures go."""
_AMBIGUOUS_SIDE = 200
"""From this on a bare number is more likely one of pixels: 200 latents are 1,600 pixels, and 240p
has 240. The largest usual size below it, 1080p, has a side of 136 latents."""

_LANDSCAPE = {"480p": (60, 104), "720p": (90, 160), "1080p": (136, 240)}
RESOLUTIONS: Mapping[str, tuple[int, int]] = MappingProxyType(
    _LANDSCAPE
    | {f"{name}-portrait": (columns, rows) for name, (rows, columns) in _LANDSCAPE.items()}
)
"""Latent rows and columns; 1080p is 1920x1088 pixels."""

_SIZE = re.compile(r"([0-9]{1,6}) *[x×] *([0-9]{1,6}) *(px|pixels|latents)?", re.IGNORECASE)


def parse_latent_size(option: str, text: str) -> tuple[int, int]:
    """Read the size of a frame.

    Args:
        option: the flag that it was given with, for messages.
        text: a resolution's name; latent `ROWSxCOLUMNS`, such as 60x104; or pixels,
            `WIDTHxHEIGHTpx`, such as 832x480px. Where both numbers are so large that pixels may be
            meant, latents are written 270x480latents.

    Returns:
        Latent rows and columns.

    Raises:
        InputError: another form, pixels that are no whole latents, or numbers without a unit that
            may be either.
    """
    plain = text.strip().lower()
    if plain in RESOLUTIONS:
        return RESOLUTIONS[plain]
    found = _SIZE.fullmatch(plain)
    if found is None:
        raise InputError(
            f"{option} is {shown(text)}; give latent rows x columns such as 60x104, pixels such as "
            f"832x480px (width x height), or one of {list(RESOLUTIONS)}"
        )
    first, second = int(found[1]), int(found[2])
    if found[3] not in (None, "latents"):
        return _latents_of_pixels(option, text, first, second)
    if found[3] is None and min(first, second) >= _AMBIGUOUS_SIDE:
        raise InputError(
            f"{option} is {shown(text)}, which as latents is {pixel_text((first, second))}; for "
            f"pixels write WIDTHxHEIGHTpx, such as {_near_pixels(first, second)} or "
            f"{_near_pixels(second, first)}; for latents {size_text((first, second))}"
        )
    return first, second


def _near_pixels(width: int, height: int) -> str:
    """The size of whole patches that is nearest, as it is written."""
    side = PIXELS_PER_LATENT * ModelShape.patch_size
    return "x".join(str(side * max(1, round(each / side))) for each in (width, height)) + "px"


def _latents_of_pixels(option: str, text: str, width: int, height: int) -> tuple[int, int]:
    side = PIXELS_PER_LATENT
    if width % side or height % side:
        # As the usual models and policies take them: what is proposed is not refused next.
        patch, segments = ModelShape.patch_size, CachePolicy.num_segments
        near = nearest_valid_sizes((height // side, width // side), patch, segments)
        sizes = ", ".join(f"{side * columns}x{side * rows}px" for rows, columns in near)
        raise InputError(
            f"{option} is {shown(text)}; both sides must be multiples of {side} pixels; near sizes "
            f"are {sizes}"
        )
    return height // side, width // side


def size_text(size: tuple[int, int]) -> str:
    """A latent size (rows, columns) as `parse_latent_size` reads it."""
    return f"{size[0]}x{size[1]}" + ("latents" if min(size) >= _AMBIGUOUS_SIDE else "")


def pixel_text(size: tuple[int, int]) -> str:
    """A latent size (rows, columns) in pixels, width first, as people name it."""
    return f"{size[1] * PIXELS_PER_LATENT}x{size[0] * PIXELS_PER_LATENT} pixels"


def is_valid_size(height: int, width: int, patch_size: int, num_segments: int) -> bool:
    """Whether a frame of this latent size cuts into patches, and its tokens into segments."""
    if not patch_size <= min(height, width) <= max(height, width) <= MAX_SIDE:
        return False
    if height % patch_size or width % patch_size:
        return False
    return (height // patch_size) * (width // patch_size) % num_segments == 0


def nearest_valid_sizes(
    size: tuple[int, int], patch_size: int, num_segments: int
) -> list[tuple[int, int]]:
    """The up to three valid latent sizes closest to `size` (rows, columns), nearest first."""
    height, width = size
    found: list[tuple[int, int]] = []

    def distance(near: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        return abs(near[0] - height) + abs(near[1] - width), near

    all_rows = range(patch_size, MAX_SIDE + 1, patch_size)
    for rows in sorted(all_rows, key=lambda rows: abs(rows - height)):
        if len(found) == 3 and abs(rows - height) > distance(found[-1])[0]:
            break
        # With so many rows, the columns must be a multiple of this.
        step = patch_size * (num_segments // gcd(rows // patch_size, num_segments))
        middle = min(width, MAX_SIDE) // step
        beside = [(rows, step * (middle + i)) for i in range(-2, 4)]
        found += [near for near in beside if is_valid_size(*near, patch_size, num_segments)]
        found = sorted(found, key=distance)[:3]
    return found


def check_latent_size(size: tuple[int, int], patch_size: int, num_segments: int) -> None:
    """Refuse a latent size that cannot be cut into patches and segments.

    Args:
        size: latent rows and columns.
        patch_size: side of the model's patch.
        num_segments: segments per frame; 1 where the policy selects none.

    Raises:
        InputError: with the nearest sizes that can.
    """
    if is_valid_size(*size, patch_size, num_segments):
        return
    near = nearest_valid_sizes(size, patch_size, num_segments)
    told = ", ".join(map(size_text, near))
    raise InputError(
        f"latent size {size[0]}x{size[1]}: both sides must be multiples of {patch_size} up to "
        f"{MAX_SIDE} and the tokens of a frame a multiple of the {num_segments} segments; "
        + (f"the nearest sizes are {told}" if near else "no size is; choose fewer segments")
    )
