"""How `fkv run` turns latents into frames: the bundle's decoder, or the small model's codec."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.decoder import VideoDecoder, to_rgb8
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.manifest import Manifest
from forcing_kv.tools.digits import codec
from forcing_kv.tools.video import gray_to_rgb

Float32 = NDArray[np.float32]
Uint8 = NDArray[np.uint8]

CHOICES = ("auto", "vae", "tae", "none")
PIXEL_FRAMES_PER_LATENT = 4
"""Of Wan's auto-encoders; the small model's codec makes one."""
WAN_FPS = 16
DIGITS_FPS = 8


class FrameDecoder(Protocol):
    """Decodes one video after another."""

    name: str

    def decode(self, latents: Float32) -> Uint8:
        """Latents [F, C, h, w] to frames [F', height, width, 3]."""

    def reset(self) -> None:
        """Begin another video."""


class CodecDecoder:
    """The small model's space-to-depth codec."""

    name = "digits codec"

    def decode(self, latents: Float32) -> Uint8:
        """See `FrameDecoder`."""
        return gray_to_rgb(codec.decode(latents))

    def reset(self) -> None:
        """Nothing is kept from frame to frame."""


class BundleDecoder:
    """A decoder that was exported into the bundle."""

    def __init__(self, decoder: VideoDecoder, name: str) -> None:
        self._decoder, self.name = decoder, name

    def decode(self, latents: Float32) -> Uint8:
        """See `FrameDecoder`."""
        return to_rgb8(self._decoder.decode(latents))

    def reset(self) -> None:
        """See `FrameDecoder`."""
        self._decoder.reset()


def open_decoder(
    bundle: Path,
    manifest: Manifest,
    choice: str,
    out: Path,
    num_threads: int,
    device: str = "cpu",
) -> FrameDecoder | None:
    """The decoder that was asked for; None for latents alone.

    Args:
        bundle: directory of the bundle.
        manifest: its manifest.
        choice: one of `CHOICES`; `auto` takes the model's own, else the tiny one, else latents
            where the output is an `.npz`.
        out: output file.
        num_threads: CPU threads of the bundle's decoder.
        device: where the bundle's decoder runs, cpu or cuda.

    Raises:
        InputError: unknown choice, or no such decoder in the bundle.
    """
    if choice not in CHOICES:
        raise InputError(f"--decode is {choice!r}; give one of {list(CHOICES)}")
    latents_only = out.suffix == ".npz"
    if choice == "none" and not latents_only:
        raise InputError(f"{out}: --decode none gives latents; write them to an .npz file")
    if choice == "none":
        return None
    if choice == "auto" and manifest.decoder == "digits":
        return CodecDecoder()
    if choice == "auto":
        found = [kind for kind in ("vae", "tae") if kind in manifest.decoders]
        if not found and latents_only:
            return None
        if not found:
            raise InputError(
                f"{bundle}: holds no decoder, so there are no frames for {out}; add one with "
                f"`fkv add-decoder {bundle} --vae FOLDER` (or --tae FILE), or write latents with "
                "--decode none and an .npz output"
            )
        choice = found[0]
    return BundleDecoder(VideoDecoder.open(bundle, manifest, choice, num_threads, device), choice)


def pixel_frames_per_latent(manifest: Manifest) -> int:
    """Pixel frames that a latent frame stands for, by which FPS are counted."""
    return 1 if manifest.decoder == "digits" else PIXEL_FRAMES_PER_LATENT


def default_fps(manifest: Manifest) -> int:
    """Pixel frames per second that the model was trained on."""
    return DIGITS_FPS if manifest.decoder == "digits" else WAN_FPS
