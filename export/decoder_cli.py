"""`fkv add-decoder`: latents to pixels, in the bundle."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from forcing_kv.runtime_trt.console import print_json, progress, talk
from forcing_kv.runtime_trt.dtypes import COMPUTE_DTYPES, DTYPES
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.manifest import read_manifest


def add_decoder(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    vae: Annotated[
        Path | None,
        typer.Option(help="Wan2.1 VAE: a diffusers folder, or Wan2.1_VAE.pth."),
    ] = None,
    tae: Annotated[
        Path | None,
        typer.Option(help="Tiny auto-encoder in TAEHV's format: taew2_1.pth or .safetensors."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace a decoder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the decoders' entries.")] = False,
) -> None:
    """Export a video decoder into a bundle, so that a video needs no torch."""
    if vae is None and tae is None:
        raise InputError("give --vae, --tae or both")
    if dtype not in COMPUTE_DTYPES:
        raise InputError(f"--dtype is {dtype!r}; give one of {list(COMPUTE_DTYPES)}")
    manifest = read_manifest(bundle)
    from forcing_kv.export.decoders import add_decoder as export_decoder
    from forcing_kv.export.decoders import check_decoder_target
    from forcing_kv.export.tae import tiny_decoder
    from forcing_kv.export.vae import wan_decoder

    chunk = manifest.config.chunk
    size = (chunk.latent_height, chunk.latent_width)
    wanted = [("vae", vae, wan_decoder), ("tae", tae, tiny_decoder)]
    loaders = [(kind, path, load) for kind, path, load in wanted if path is not None]
    for kind, _, _ in loaders:
        check_decoder_target(manifest, bundle, kind, force=force)
    sources = [load(path, size, dtype) for _, path, load in loaders]
    for source in sources:
        with progress(f"exporting {source.kind}", 3) as bar:

            def report(part: str, kind: str = source.kind) -> None:
                bar.describe(f"exporting {kind}: {part}")
                bar.advance()

            manifest = export_decoder(bundle, source, force=force, report=report)
        state = sum(math.prod(shape) for shape in source.state_shapes) * DTYPES[dtype].nbytes
        talk(f"added the {source.kind} decoder to {bundle}; its state takes {state / 1e6:.1f} MB")
    if as_json:
        print_json(manifest.to_json()["decoders"])
