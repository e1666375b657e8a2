"""`fkv add-decoder`: latents to pixels, in the bundle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from forcing_kv.export.request.flags import Json, flags
from forcing_kv.runtime_trt.bundle.manifest import Manifest
from forcing_kv.runtime_trt.console import print_json, progress, talk
from forcing_kv.runtime_trt.dtypes import DTYPES, DType
from forcing_kv.runtime_trt.errors import InputError


@flags()
@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """Which decoders are added."""

    vae: Path | None = None
    """Wan2.1 VAE: a diffusers folder, or Wan2.1_VAE.pth."""
    tae: Path | None = None
    """Tiny auto-encoder in TAEHV's format: taew2_1.pth or .safetensors."""
    dtype: DType = "float32"
    """What the decoder computes in."""
    force: bool = False
    """Replace a decoder."""
    allow_non_finite: bool = False
    """Take weights that are NaN or infinite too."""
    as_json: Json = False
    """Print the decoders' entries and the bundle's digest."""


def add_decoder(bundle: Path, /, *, options: DecoderOptions = DecoderOptions()) -> None:
    """Export a video decoder into a bundle, so that a video needs no torch.

    Args:
        bundle: Bundle directory.
    """
    if options.vae is None and options.tae is None:
        raise InputError("give --vae, --tae or both")
    from forcing_kv.export.bundle.edit import changed_bundle

    with changed_bundle(bundle) as manifest:
        manifest = _add_decoders(bundle, manifest, options)
    talk(f"{bundle} is {manifest.digest} now")
    if options.as_json:
        print_json({**manifest.to_json()["decoders"], "digest": manifest.digest})


def _add_decoders(bundle: Path, manifest: Manifest, options: DecoderOptions) -> Manifest:
    """Load the decoders and export them; returns the new manifest."""
    from forcing_kv.export.decoder.add import add_decoder as export_decoder
    from forcing_kv.export.decoder.add import check_decoder_target
    from forcing_kv.export.decoder.tae import tiny_decoder
    from forcing_kv.export.decoder.vae import wan_decoder

    chunk = manifest.config.chunk
    size = (chunk.latent_height, chunk.latent_width)
    dtype, force = options.dtype, options.force
    wanted = [("vae", options.vae, wan_decoder), ("tae", options.tae, tiny_decoder)]
    loaders = [(kind, path, load) for kind, path, load in wanted if path is not None]
    for kind, _, _ in loaders:
        check_decoder_target(manifest, bundle, kind, force=force)
    sources = [load(path, size, dtype) for _, path, load in loaders]
    allowed = options.allow_non_finite
    for source in sources:
        source.check(manifest.config.model.in_channels, allow_non_finite=allowed)
    for source in sources:
        with progress(f"exporting {source.kind}", 3) as bar:

            def report(part: str, kind: str = source.kind) -> None:
                bar.describe(f"exporting {kind}: {part}")
                bar.advance()

            manifest = export_decoder(
                bundle, source, force=force, allow_non_finite=allowed, report=report
            )
        state = sum(math.prod(shape) for shape in source.state_shapes) * DTYPES[dtype].nbytes
        talk(f"added the {source.kind} decoder to {bundle}; its state takes {state / 1e6:.1f} MB")
    return manifest
