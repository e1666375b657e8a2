"""Latent sizes: names of the usual ones, and which sizes a policy can run."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from forcing_kv.runtime_trt.errors import InputError

RESOLUTIONS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"480p": (60, 104), "720p": (90, 160), "1080p": (136, 240)}
)
"""Latent rows and columns; a latent pixel is 8 x 8 pixels, so 1080p is 1088 x 1920."""


def parse_size(option: str, text: str) -> tuple[int, int]:
    """Read `ROWSxCOLUMNS`.

    Raises:
        InputError: another form.
    """
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise InputError(f"{option} is {text!r}; give rows x columns such as 60x104")
    return int(rows), int(columns)


def parse_latent_size(option: str, text: str) -> tuple[int, int]:
    """Read a resolution's name or `ROWSxCOLUMNS`.

    Raises:
        InputError: neither.
    """
    if text in RESOLUTIONS:
        return RESOLUTIONS[text]
    try:
        return parse_size(option, text)
    except InputError as error:
        raise InputError(f"{error}, or one of {list(RESOLUTIONS)}") from error


def is_valid_size(height: int, width: int, patch_size: int, num_segments: int) -> bool:
    """Whether a frame of this latent size cuts into patches, and its tokens into segments."""
    if min(height, width) < patch_size or height % patch_size or width % patch_size:
        return False
    return (height // patch_size) * (width // patch_size) % num_segments == 0


def nearest_valid_sizes(
    size: tuple[int, int], patch_size: int, num_segments: int
) -> list[tuple[int, int]]:
    """The three valid latent sizes closest to `size` (rows, columns), nearest first."""
    height, width = size
    # Rows divisible by patch_size * num_segments are valid with any whole number of patches in a
    # row, so twice that distance holds several sizes, also where no smaller ones exist.
    radius = 2 * patch_size * num_segments
    found = [
        (rows, columns)
        for rows in range(max(1, height - radius), height + radius + 1)
        for columns in range(max(1, width - radius), width + radius + 1)
        if is_valid_size(rows, columns, patch_size, num_segments)
    ]
    found.sort(key=lambda near: (abs(near[0] - height) + abs(near[1] - width), near))
    return found[:3]


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
    near = ", ".join(f"{h}x{w}" for h, w in nearest_valid_sizes(size, patch_size, num_segments))
    raise InputError(
        f"latent size {size[0]}x{size[1]}: both sides must be multiples of {patch_size} and the "
        f"tokens of a frame a multiple of the {num_segments} segments; the nearest sizes are {near}"
    )
