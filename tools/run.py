"""`fkv run`: a prompt to a video (or latents) with the torch-free runtime."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from forcing_kv.runtime_trt.console import print_json, progress, talk
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.manifest import Manifest, read_manifest
from forcing_kv.runtime_trt.session import Session
from forcing_kv.tools.digits import codec, text
from forcing_kv.tools.video import Float32, Uint8, check_output, gray_to_rgb, open_writer

Decode = Callable[[Float32], Uint8]
"""Latents [F, C, h, w] -> frames [F', height, width, 3]."""


def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    out: Annotated[Path, typer.Option(help="Video (.mp4, .gif) or latents (.npz).")],
    prompt: Annotated[str | None, typer.Option(help="What to generate.")] = None,
    prompt_embeds: Annotated[
        Path | None, typer.Option(help="Encoded prompt, .npy [text_len, text_dim].")
    ] = None,
    num_chunks: Annotated[int, typer.Option(min=1, help="Chunks to generate.")] = 7,
    seed: Annotated[int, typer.Option(min=0, help="Key of the noise generator.")] = 0,
    fps: Annotated[int, typer.Option(help="Frames per second of the video.")] = 8,
    scale: Annotated[int, typer.Option(min=1, help="Enlarge pixels by this factor.")] = 1,
    decode: Annotated[str, typer.Option(help="auto or none (latents only).")] = "auto",
    backend: Annotated[str, typer.Option(help="auto or a backend's name.")] = "auto",
    num_threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: automatic.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print timings.")] = False,
) -> None:
    """Generate a video from a bundle."""
    check_output(out)
    manifest = read_manifest(bundle)
    embeds = encode(manifest, prompt, prompt_embeds)
    decoder = decoder_of(manifest, decode)
    if decoder is None and out.suffix != ".npz":
        raise InputError(f"{out}: --decode none gives latents; write them to an .npz file")
    opening = time.perf_counter()
    with (
        Session.open(bundle, backend, num_threads=num_threads) as session,
        open_writer(out, fps, scale) as writer,
        progress("generating", num_chunks) as bar,
    ):
        open_s = time.perf_counter() - opening
        session.set_prompt(embeds)
        begin, first_s, chunk_ms = time.perf_counter(), 0.0, []
        for chunk in session.stream(num_chunks, seed=seed):
            chunk_ms.append(sum(chunk.timings_ms.values()))
            writer.write(chunk.latents, decoder(chunk.latents) if decoder else None)
            first_s = first_s or time.perf_counter() - begin
            bar.advance()
        total_s = time.perf_counter() - begin
        name = session.backend_name
        num_frames = session.num_frames
    talk(
        f"wrote {out}: {num_frames} latent frames on {name}, denoiser "
        f"{np.median(chunk_ms):.1f} ms a chunk (median), first chunk after {first_s:.2f} s, "
        f"{total_s:.2f} s in all"
    )
    if as_json:
        print_json({
            "out": out, "backend": name, "seed": seed, "num_latent_frames": num_frames,
            "denoiser_chunk_ms": chunk_ms, "open_s": open_s, "first_chunk_s": first_s,
            "total_s": total_s,
        })  # fmt: skip


def encode(
    manifest: Manifest, prompt: str | None, prompt_embeds: Path | None
) -> NDArray[np.float32]:
    """Prompt embeddings [text_len, text_dim] from text or from a file.

    Raises:
        InputError: neither or both are given, or the bundle's text encoder is not at hand.
    """
    if (prompt is None) == (prompt_embeds is None):
        raise InputError("give one of --prompt and --prompt-embeds")
    if prompt_embeds is not None:
        try:
            loaded: NDArray[np.float32] = np.load(prompt_embeds, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{prompt_embeds}: not readable as .npy ({error})") from error
        return loaded
    assert prompt is not None
    if manifest.text_encoder == "digits":
        return text.encode_prompt(prompt)
    raise InputError(
        f"this bundle's text encoder is {manifest.text_encoder!r}, which does not run here; encode "
        "the prompt beforehand and give --prompt-embeds"
    )


def decoder_of(manifest: Manifest, decode: str) -> Decode | None:
    """The function that turns the bundle's latents into frames, None for `--decode none`.

    Raises:
        InputError: unknown choice, or the bundle's decoder is not at hand.
    """
    if decode not in ("auto", "none"):
        raise InputError(f"--decode is {decode!r}; give auto or none")
    if decode == "none":
        return None
    if manifest.decoder == "digits":
        return lambda latents: gray_to_rgb(codec.decode(latents))
    raise InputError(
        f"this bundle's decoder is {manifest.decoder!r}, which does not run here; give --decode "
        "none and an .npz output"
    )
