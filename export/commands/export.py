"""`fkv export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from forcing_kv.export.request.flags import Json, flags
from forcing_kv.export.request.options import ExportRequest
from forcing_kv.runtime_trt.bundle.atomic.locks import claimed
from forcing_kv.runtime_trt.console import print_json, progress, talk
from forcing_kv.runtime_trt.rollout.config import RolloutConfig

if TYPE_CHECKING:
    from forcing_kv.export.request.request import ResolvedExport
    from forcing_kv.runtime_trt.bundle.manifest import Manifest


@flags()
@dataclass(frozen=True, kw_only=True)
class BundleOutput:
    """Where a bundle goes, and what is said of it."""

    out: Path
    """Bundle directory to write."""
    force: bool = False
    """Replace a bundle."""
    dry_run: bool = False
    """Check everything, say what would be written, stop."""
    as_json: Json = False
    """Print the manifest."""


def export(*, output: BundleOutput, request: ExportRequest = ExportRequest()) -> None:
    """Export a checkpoint as a bundle: prompt, step and evict graphs with fixed shapes."""
    from forcing_kv.export.bundle.write import check_target
    from forcing_kv.export.request.request import resolve

    resolved, out = resolve(request), output.out
    check_target(out, force=output.force)
    talk(describe(resolved.name, resolved.config))
    talk(f"weights: {resolved.checkpoint.description}")
    for line in (line for adapter in resolved.adapters for line in adapter.describe()):
        talk(line)
    if output.dry_run:
        talk(f"dry run: {out} would be written")
        return
    with claimed(out, wait=output.force):
        manifest = _export(resolved, output)
    talk(f"wrote {out} ({_num_bytes(out) / 1e6:.1f} MB), {manifest.digest}")
    if output.as_json:
        print_json(manifest.to_json())


def _export(resolved: ResolvedExport, output: BundleOutput) -> Manifest:
    """Load the weights and write the bundle."""
    from forcing_kv.export.bundle.write import export_bundle

    num_parts = 4 if resolved.config.evicted_layers else 3
    with progress("loading weights", num_parts + 1) as bar:
        loaded = resolved.load()

        def report(part: str) -> None:
            bar.advance()
            bar.describe(f"exporting {part}")

        parts = (loaded, resolved.config, output.out, resolved.labels)
        fp8, force = resolved.fp8_scales(loaded), output.force
        allowed = resolved.allow_non_finite
        return export_bundle(
            *parts, fp8=fp8, force=force, consume=True, report=report, allow_non_finite=allowed
        )


def describe(name: str, config: RolloutConfig) -> str:
    """One paragraph on what a configuration is, for people."""
    model, chunk, policy = config.model, config.chunk, config.policy
    static = config.partition.num_static_heads
    total = model.num_layers * model.num_heads
    kept = (
        f"sink {policy.num_sink_frames}, static heads keep {policy.num_static_frames}, dynamic "
        f"heads {policy.num_temporal_frames} frames + {policy.num_kept_segments} segments"
    )
    return (
        f"{name}: {model.num_layers} layers of {model.num_heads} heads ({static} static, "
        f"{total - static} dynamic), {chunk.latent_height}x{chunk.latent_width} latents, "
        f"{chunk.tokens_per_frame} tokens a frame, {config.dtype}\n"
        f"cache: {kept}; {config.nbytes_kv / 1e6:.2f} MB"
    )


def _num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
