"""The stand-in for a video VAE: 4x4 space-to-depth with a fixed scale and shift. numpy only.

Legend: F frames, C latent channels (16), h and w latent rows and columns.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.errors import InputError

BLOCK = 4
"""Pixels per latent cell on each side."""
PIXEL_MEAN = 0.077
"""Mean brightness of the training clips."""
SCALE = 6.0
"""Brings the latents to roughly unit RMS, so that the noisiest step still carries position."""

Float32 = NDArray[np.float32]


def encode(video: Float32) -> Float32:
    """Encode video [..., H, W] in 0..1 to latents [..., 16, H / 4, W / 4], float32.

    Raises:
        InputError: a side is not a multiple of 4.
    """
    if video.ndim < 2 or video.shape[-1] % BLOCK or video.shape[-2] % BLOCK:
        raise InputError(
            f"encode: video has shape {video.shape}; the last two axes must be multiples of {BLOCK}"
        )
    *lead, height, width = video.shape
    cut = video.reshape(*lead, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    channels = np.moveaxis(cut, (-3, -1), (-4, -3))  # [..., 4, 4, h, w]
    latents = channels.reshape(*lead, BLOCK * BLOCK, height // BLOCK, width // BLOCK)
    return ((latents - PIXEL_MEAN) * SCALE).astype(np.float32)


def decode(latents: Float32) -> Float32:
    """Decode latents [..., 16, h, w] to video [..., 4h, 4w], float32 clipped to 0..1.

    Raises:
        InputError: the channel axis is not 16.
    """
    if latents.ndim < 3 or latents.shape[-3] != BLOCK * BLOCK:
        raise InputError(
            f"decode: latents have shape {latents.shape}; [..., {BLOCK * BLOCK}, h, w] is needed"
        )
    *lead, _, height, width = latents.shape
    cut = latents.reshape(*lead, BLOCK, BLOCK, height, width)
    pixels = np.moveaxis(cut, (-4, -3), (-3, -1))  # [..., h, 4, w, 4]
    video = pixels.reshape(*lead, height * BLOCK, width * BLOCK) / SCALE + PIXEL_MEAN
    return np.clip(video, 0.0, 1.0).astype(np.float32)
