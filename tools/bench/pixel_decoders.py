"""Video decoders with random weights, to time what comes after the denoiser.

Speed does not depend on the weights. A chunk is decoded frame by frame with its state carried on,
as a bundle's decoder is, in PyTorch, without a compiler.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from time import perf_counter

import torch
from torch import Tensor

from forcing_kv.export.decoder.add import DecoderSource
from forcing_kv.export.decoder.tae import WIDTHS, random_tiny_decoder

WARMUP_CHUNKS = 3
MEASURED_CHUNKS = 10


class PixelDecoder:
    """A decoder on a device, in the middle of a video.

    Args:
        source: modules and shapes of states.
        device: where to run.
    """

    def __init__(self, source: DecoderSource, device: str) -> None:
        self.name = source.kind
        """`tae` for the tiny auto-encoder, `vae` for the model's own."""
        self.device = torch.device(device)
        self._decode = source.decode.to(self.device)
        self._state = [value.to(self.device) for value in source.new_state()]

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Tensor:
        """Decode the next frames [F, C, h, w] to pixels [F * 4, 3, 8h, 8w] in 0..1."""
        frames = []
        for latent in latents.split(1):
            pixels, self._state = self._decode(latent, self._state)
            frames.append(pixels)
        return torch.cat(frames)


def random_decoders(
    latent_channels: int,
    latent_size: tuple[int, int],
    device: str,
    widths: tuple[int, ...] = WIDTHS,
) -> Iterator[PixelDecoder]:
    """The tiny decoder, and the Wan VAE's where diffusers is installed; bfloat16 on CUDA.

    Args:
        latent_channels: C.
        latent_size: latent rows and columns.
        device: where to run.
        widths: channels of the tiny decoder's levels.
    """
    dtype = "float32" if device == "cpu" else "bfloat16"
    yield PixelDecoder(random_tiny_decoder(latent_channels, widths, latent_size, dtype), device)
    if importlib.util.find_spec("diffusers"):
        from forcing_kv.export.decoder.vae import random_wan_decoder

        yield PixelDecoder(random_wan_decoder(latent_size, dtype), device)


def time_decoder(decoder: PixelDecoder, latent_shape: tuple[int, ...]) -> list[float]:
    """Time of a chunk's decoding, from latents on the device to pixels on it, in milliseconds.

    Args:
        decoder: what to time.
        latent_shape: [F, C, h, w] of a chunk.
    """
    latents = torch.randn(latent_shape, device=decoder.device)
    times = []
    for _ in range(WARMUP_CHUNKS + MEASURED_CHUNKS):
        begin = perf_counter()
        decoder(latents)
        if decoder.device.type == "cuda":
            torch.cuda.synchronize(decoder.device)
        times.append(1e3 * (perf_counter() - begin))
    return times[WARMUP_CHUNKS:]
