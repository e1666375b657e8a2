"""`fkv export` and `fkv verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from forcing_kv.export.model_options import (
    Checkpoint,
    ChunkFrames,
    ComputeDType,
    LatentSize,
    Lora,
    LoraAlpha,
    ModelConfig,
    ModelName,
    WeightSet,
)
from forcing_kv.runtime_trt.config import RolloutConfig
from forcing_kv.runtime_trt.console import ExitCode, console, print_json, progress, talk
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.resolution import parse_latent_size

if TYPE_CHECKING:
    from forcing_kv.export.verify import GoldenReport

_POLICY = "Cache policy (default: the model's own)"


def export(
    out: Annotated[Path, typer.Option(help="Bundle directory to write.")],
    model: ModelName = "digits",
    checkpoint: Checkpoint = None,
    config: ModelConfig = None,
    weights: WeightSet = None,
    lora: Lora = None,
    lora_alpha: LoraAlpha = None,
    latent_size: LatentSize = None,
    chunk_frames: ChunkFrames = None,
    dtype: ComputeDType = "float32",
    fp8: Annotated[
        Path | None,
        typer.Option(
            help="fp8.json of `fkv calibrate fp8`: run these linear layers in FP8.",
            rich_help_panel="Model",
        ),
    ] = None,
    heads: Annotated[
        Path | None, typer.Option(help="Head partition file.", rich_help_panel=_POLICY)
    ] = None,
    dense: Annotated[
        bool,
        typer.Option(
            "--dense", help="No compression: the model's own window.", rich_help_panel=_POLICY
        ),
    ] = False,
    dense_window: Annotated[
        int | None,
        typer.Option(
            help="No compression: attend this many frames, sink and own chunk included.",
            rich_help_panel=_POLICY,
        ),
    ] = None,
    sink_frames: Annotated[
        int | None, typer.Option(help="First frames kept for ever.", rich_help_panel=_POLICY)
    ] = None,
    static_frames: Annotated[
        int | None,
        typer.Option(help="Last frames that static heads keep.", rich_help_panel=_POLICY),
    ] = None,
    temporal_frames: Annotated[
        int | None,
        typer.Option(help="Last frames that dynamic heads keep.", rich_help_panel=_POLICY),
    ] = None,
    dynamic_frames: Annotated[
        int | None,
        typer.Option(help="Budget of selected segments, in frames.", rich_help_panel=_POLICY),
    ] = None,
    segments: Annotated[
        int | None, typer.Option(help="Segments per frame.", rich_help_panel=_POLICY)
    ] = None,
    warmup_chunk: Annotated[
        int | None, typer.Option(help="Last chunk before compression.", rich_help_panel=_POLICY)
    ] = None,
    warmup: Annotated[
        str | None, typer.Option(help="exact or steady.", rich_help_panel=_POLICY)
    ] = None,
    selection: Annotated[
        str | None, typer.Option(help="layer1 or per_layer.", rich_help_panel=_POLICY)
    ] = None,
    compress_first_layer: Annotated[
        bool | None,
        typer.Option(help="Split layer 0 into static and dynamic.", rich_help_panel=_POLICY),
    ] = None,
    global_sink: Annotated[
        bool | None,
        typer.Option(help="Keep the sink at a prompt switch.", rich_help_panel=_POLICY),
    ] = None,
    allow_other_checkpoint: Annotated[
        bool,
        typer.Option(
            "--allow-other-checkpoint",
            help="Take heads and FP8 scales that were calibrated on another checkpoint.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would be written, stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest.")] = False,
) -> None:
    """Export a checkpoint as a bundle: prompt, step and evict graphs with fixed shapes."""
    from forcing_kv.export.bundle import check_target, export_bundle
    from forcing_kv.export.request import ExportRequest, resolve

    changes = {
        "num_sink_frames": sink_frames,
        "num_static_frames": static_frames,
        "num_temporal_frames": temporal_frames,
        "num_dynamic_frames": dynamic_frames,
        "num_segments": segments,
        "last_warmup_chunk": warmup_chunk,
        "warmup": warmup,
        "selection": selection,
        "compress_first_layer": compress_first_layer,
        "global_sink": global_sink,
    }
    request = ExportRequest(
        model=model,
        checkpoint=checkpoint,
        config=config,
        weights=cast(Any, weights),
        lora=lora,
        lora_alpha=lora_alpha,
        heads=heads,
        latent_size=None
        if latent_size is None
        else parse_latent_size("--latent-size", latent_size),
        chunk_frames=chunk_frames,
        dense=dense,
        dense_window=dense_window,
        policy_changes=tuple((key, value) for key, value in changes.items() if value is not None),
        dtype=cast(Any, dtype),
        fp8=fp8,
        allow_other_checkpoint=allow_other_checkpoint,
    )
    resolved = resolve(request)
    check_target(out, force=force)
    talk(describe(resolved.name, resolved.config))
    if dry_run:
        talk(f"dry run: {out} would be written")
        return
    num_parts = 4 if resolved.config.evicted_layers else 3
    with progress("loading weights", num_parts + 1) as bar:
        loaded = resolved.load()

        def report(part: str) -> None:
            bar.advance()
            bar.describe(f"exporting {part}")

        manifest = export_bundle(
            loaded, resolved.config, out, resolved.labels, fp8=resolved.fp8_scales(loaded),
            force=force, consume=True, report=report,
        )  # fmt: skip
    talk(f"wrote {out} ({_num_bytes(out) / 1e6:.1f} MB)")
    if as_json:
        print_json(manifest.to_json())


def describe(name: str, config: RolloutConfig) -> str:
    """One paragraph on what a configuration is, for people."""
    model, chunk, policy = config.model, config.chunk, config.policy
    static = sum(len(heads) for heads in config.partition.static_heads)
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


def verify(
    bundle: Annotated[
        Path | None, typer.Argument(help="Bundle: compare with eager PyTorch on its own weights.")
    ] = None,
    golden: Annotated[
        Path | None,
        typer.Option(help="Case directory: config.json and golden.npz, weights beside it."),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="A backend's name. Default: auto for a bundle, onnxruntime for a decoder, eager "
            "for a golden case."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights to use instead of the case's own.")
    ] = None,
    num_chunks: Annotated[
        int | None, typer.Option(min=1, help="Chunks of a bundle's rollout.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Key of a bundle's prompt and noise.")] = 0,
    decoder: Annotated[
        str | None,
        typer.Option(help="vae or tae: check this decoder of the bundle, not the denoiser."),
    ] = None,
    cuda_graph: Annotated[bool, typer.Option(help="Replay captured chunks.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report.")] = False,
) -> None:
    """Compare a backend with numerical truth; exit 0 within tolerance, 1 not, 2 bad use."""
    if (bundle is None) == (golden is None):
        raise InputError("give either a bundle or --golden CASE_DIR")
    if decoder is not None and bundle is None:
        raise InputError("--decoder is for a bundle's decoder; give the bundle")
    if bundle is not None and decoder is not None:
        passed = _verify_decoder(
            bundle, decoder, backend or "onnxruntime", seed, cuda_graph, as_json
        )
    elif bundle is not None:
        passed = _verify_bundle(bundle, backend or "auto", num_chunks, seed, cuda_graph, as_json)
    else:
        assert golden is not None
        passed = _verify_golden(golden, backend or "eager", checkpoint, as_json)
    if not passed:
        raise typer.Exit(ExitCode.CHECK_FAILED)


def _verify_bundle(
    bundle: Path, backend: str, num_chunks: int | None, seed: int, cuda_graph: bool, as_json: bool
) -> bool:
    from forcing_kv.export.verify_bundle import verify_bundle
    from forcing_kv.runtime_trt.backends import open_backend

    opened = open_backend(bundle, backend, use_graphs=cuda_graph)
    try:
        talk(f"{opened.name} ({opened.chosen_because}) against eager PyTorch")
        report = verify_bundle(bundle, opened, num_chunks=num_chunks, seed=seed)
    finally:
        opened.close()
    for check in report.rollout:
        talk(check.line(), style=None if check.passed else "red")
    for note in report.notes:
        talk(note)
    verdict = "PASS" if report.passed else "FAIL"
    console().print(f"[bold]{verdict}[/bold] worst tensor: {report.worst.line()}")
    if as_json:
        print_json(report.to_json())
    return report.passed


def _verify_decoder(
    bundle: Path, kind: str, backend: str, seed: int, cuda_graph: bool, as_json: bool
) -> bool:
    from forcing_kv.export.verify_decoder import verify_decoder
    from forcing_kv.runtime_trt.decoder import VideoDecoder
    from forcing_kv.runtime_trt.manifest import read_manifest

    manifest = read_manifest(bundle)
    with VideoDecoder.open(bundle, manifest, kind, backend, use_graphs=cuda_graph) as decoder:
        talk(f"{kind} on {decoder.backend_name} against eager PyTorch")
        report = verify_decoder(bundle, manifest, kind, decoder, seed=seed)
    verdict = "PASS" if report.passed else "FAIL"
    console().print(f"[bold]{verdict}[/bold] worst tensor: {report.tensors[0].line()}")
    if as_json:
        print_json(report.to_json())
    return report.passed


def _verify_golden(golden: Path, backend: str, checkpoint: Path | None, as_json: bool) -> bool:
    from forcing_kv.export.verify import (
        GoldenCase,
        GoldenReport,
        golden_session,
        schedule_error,
        verify_golden,
    )

    case = GoldenCase.load(golden)
    with golden_session(case, backend, checkpoint) as session:
        report = GoldenReport(
            golden.name, session.backend_name, schedule_error(case, session.config.schedule)
        )
        for check in verify_golden(case, session):
            report.chunks.append(check)
            talk(check.line(), style=None if check.passed else "red")
    _verdict(report)
    if as_json:
        print_json(report.to_json())
    return report.passed


def _verdict(report: GoldenReport) -> None:
    worst = max((check.worst for check in report.chunks), default=0.0)
    verdict = "PASS" if report.passed else "FAIL"
    console().print(
        f"[bold]{verdict}[/bold] {report.case} on {report.backend}: worst error {worst:.2e}"
    )
