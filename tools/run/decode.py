"""How `fkv run` turns latents into frames: the bundle's decoder, or the small model's codec."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from forcing_kv.export.request.flags import flags
from forcing_kv.export.request.presets import FPS, PIXEL_FRAMES_PER_LATENT
from forcing_kv.runtime_trt.bundle.manifest import Manifest
from forcing_kv.runtime_trt.console import talk
from forcing_kv.runtime_trt.decoder import VideoDecoder, check_choice, follow_session, to_rgb8
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.tools.digits import codec
from forcing_kv.tools.run.video import gray_to_rgb

Float32 = NDArray[np.float32]
Uint8 = NDArray[np.uint8]

DIGITS = "digits"
"""Kind of decoder of the small model's codec, which is no graph."""
DIGITS_FPS = 8


@flags()
@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How latents become frames."""

    decode: Literal["auto", "vae", "tae", "none"] = "auto"
    """The bundle's decoder, or none for latents only; auto takes the model's own, else the tiny
    one, else none where the output is an .npz file."""
    decode_backend: str = "auto"
    """What runs the bundle's decoder: auto (the session's backend if it has an engine of it, else
    onnxruntime), tensorrt, tensorrt-lean, tensorrt-rtx, inductor, onnxruntime, or onnxruntime-cuda
    with onnxruntime-gpu."""


@dataclass(frozen=True)
class FrameDecoder:
    """Decodes one video after another."""

    name: str
    """Kind, for people."""
    decoder: VideoDecoder | None = None
    """The bundle's; None for the small model's codec, which keeps and holds nothing."""

    @property
    def backend_name(self) -> str | None:
        """What runs it; None for what is no graph."""
        return None if self.decoder is None else self.decoder.backend_name

    def decode(self, latents: Float32) -> Uint8:
        """Latents [F, C, h, w] to frames [F', height, width, 3]."""
        if self.decoder is None:
            return gray_to_rgb(codec.decode(latents))
        return to_rgb8(self.decoder.decode(latents))

    def reset(self) -> None:
        """Begin another video."""
        if self.decoder is not None:
            self.decoder.reset()

    def close(self) -> None:
        """Release everything; may be called twice."""
        if self.decoder is not None:
            self.decoder.close()


@dataclass(frozen=True)
class DecoderChoice:
    """A decoder that was asked for and could be opened once the session's backend is known."""

    bundle: Path
    manifest: Manifest
    kind: str
    """`digits` for the small model's codec, or a decoder of the bundle."""
    backend: str
    """`auto`, or one of `DECODE_BACKENDS`."""

    def open(self, session_backend: str, **options: Any) -> FrameDecoder:
        """Open it, and say where the session's backend was not taken.

        Args:
            session_backend: name of the backend that makes the latents, for `auto`.
            options: those of `VideoDecoder.open`.

        Raises:
            ForcingKvError: see `VideoDecoder.open` and `follow_session`.
        """
        if self.kind == DIGITS:
            return FrameDecoder("digits codec")
        which = (self.bundle, self.manifest, self.kind)
        if self.backend != "auto":
            return FrameDecoder(self.kind, VideoDecoder.open(*which, self.backend, **options))
        decoder = follow_session(*which, session_backend, **options)
        if decoder.backend_name != session_backend:
            talk(f"{self.kind} runs on {decoder.backend_name}; {decoder.chosen_because}")
        return FrameDecoder(self.kind, decoder)


def choose_decoder(
    bundle: Path, manifest: Manifest, options: DecodeOptions, out: Path
) -> DecoderChoice | None:
    """The decoder that was asked for; None for latents alone. Opens nothing.

    Args:
        bundle: directory of the bundle.
        manifest: its manifest.
        options: which decoder, and what runs it.
        out: output file.

    Raises:
        InputError: no such decoder in the bundle, or no such backend.
    """
    kind, backend = _kind(bundle, manifest, options.decode, out), options.decode_backend
    if backend != "auto" and kind in (None, DIGITS):
        raise InputError(
            f"--decode-backend {backend} is for a decoder of the bundle, and none is used; leave "
            "it out, or give --decode vae or tae"
        )
    if kind is None:
        return None
    if kind != DIGITS:
        check_choice(bundle, manifest, kind, "onnxruntime" if backend == "auto" else backend)
    return DecoderChoice(bundle, manifest, kind, backend)


def _kind(bundle: Path, manifest: Manifest, choice: str, out: Path) -> str | None:
    latents_only = out.suffix == ".npz"
    if choice == "none" and not latents_only:
        raise InputError(f"{out}: --decode none gives latents; write them to an .npz file")
    if choice == "none":
        return None
    if choice != "auto":
        return choice
    if manifest.decoder == DIGITS:
        return DIGITS
    found = [kind for kind in ("vae", "tae") if kind in manifest.decoders]
    if not found and not latents_only:
        raise InputError(
            f"{bundle}: holds no decoder, so there are no frames for {out}; add one with "
            f"`fkv add-decoder {bundle} --vae FOLDER` (or --tae FILE), or write latents with "
            "--decode none and an .npz output"
        )
    return found[0] if found else None


def pixel_frames_per_latent(manifest: Manifest) -> int:
    """Pixel frames that a latent frame stands for: the small model's codec makes one."""
    return 1 if manifest.decoder == DIGITS else PIXEL_FRAMES_PER_LATENT


def default_fps(manifest: Manifest) -> int:
    """Pixel frames per second that the model was trained on."""
    return DIGITS_FPS if manifest.decoder == DIGITS else FPS
