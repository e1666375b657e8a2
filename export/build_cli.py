"""`fkv build`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from forcing_kv.export.engine_options import RTX_TARGETS, EngineOptions
from forcing_kv.runtime_trt.console import print_json, progress, talk
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.files import check_folder

if TYPE_CHECKING:
    from forcing_kv.export.engine_builder import LayerInfo
    from forcing_kv.export.planning import BuildPlan

_TENSORRT = "TensorRT"
_INDUCTOR = "Inductor"


def build(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory, written by `fkv export`.")],
    backend: Annotated[str, typer.Option(help="tensorrt, tensorrt-rtx or inductor.")],
    target: Annotated[
        str | None,
        typer.Option(
            help=f"tensorrt-rtx: GPU to build for, {', '.join(RTX_TARGETS)}; needs no GPU here. "
            "Default: the GPU of this machine.",
            rich_help_panel=_TENSORRT,
        ),
    ] = None,
    frontend: Annotated[
        str, typer.Option(help="onnx or torch-tensorrt.", rich_help_panel=_TENSORRT)
    ] = "onnx",
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            help="Run on later versions and on the lean runtime.",
            rich_help_panel=_TENSORRT,
        ),
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible",
            help="Run on every GPU from Ampere on.",
            rich_help_panel=_TENSORRT,
        ),
    ] = False,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit", help="Weights can be replaced (--refit-from).", rich_help_panel=_TENSORRT
        ),
    ] = False,
    refit_from: Annotated[
        Path | None,
        typer.Option(
            help="Give this bundle's weights to the engines that another bundle of the same model "
            "has from a build with --refit, instead of building.",
            rich_help_panel=_TENSORRT,
        ),
    ] = None,
    strip_weights: Annotated[
        bool,
        typer.Option(
            "--strip-weights",
            help="Leave the weights out and read them from the bundle on opening.",
            rich_help_panel=_TENSORRT,
        ),
    ] = False,
    tf32: Annotated[
        bool, typer.Option("--tf32", help="Allow TF32 in float32.", rich_help_panel=_TENSORRT)
    ] = False,
    workspace_gb: Annotated[
        float | None,
        typer.Option(help="Largest scratch of a kernel.", rich_help_panel=_TENSORRT),
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="0 to 5.", rich_help_panel=_TENSORRT)
    ] = None,
    profiling_verbosity: Annotated[
        str, typer.Option(help="detailed, layer-names or none.", rich_help_panel=_TENSORRT)
    ] = "detailed",
    layer_info: Annotated[
        Path | None,
        typer.Option(
            help="Write the layers of the graphs that were built, JSON.", rich_help_panel=_TENSORRT
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cuda or cpu: the one of this machine.", rich_help_panel=_INDUCTOR)
    ] = "cuda",
    text_rows: Annotated[
        int | None,
        typer.Option(
            help="Fold a prompt's padding, and attend to this many text rows instead of all; "
            "longer prompts are refused.",
            rich_help_panel=_INDUCTOR,
        ),
    ] = None,
    autotune: Annotated[
        bool,
        typer.Option(
            help="Measure matrix-product kernels and keep the fastest.", rich_help_panel=_INDUCTOR
        ),
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Build what is up to date too.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be built, its size and memory; stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the engine record.")] = False,
) -> None:
    """Compile engines into a bundle: only what is missing or changed."""
    if backend not in ("tensorrt", "tensorrt-rtx", "inductor"):
        raise InputError(
            f"--backend is {backend!r}; allowed are tensorrt, tensorrt-rtx and inductor "
            "(onnxruntime needs no build)"
        )
    if backend == "inductor":
        foreign: dict[str, Any] = {
            "--target": target, "--frontend": frontend != "onnx", "--refit": refit,
            "--refit-from": refit_from, "--strip-weights": strip_weights, "--tf32": tf32,
            "--version-compatible": version_compatible, "--workspace-gb": workspace_gb,
            "--hardware-compatible": hardware_compatible, "--layer-info": layer_info,
            "--optimization-level": optimization_level is not None,
            "--profiling-verbosity": profiling_verbosity != "detailed",
        }  # fmt: skip
    else:
        foreign = {
            "--device": device != "cuda", "--text-rows": text_rows, "--no-autotune": not autotune
        }  # fmt: skip
    if given := [option for option, value in foreign.items() if value]:
        raise InputError(f"--backend {backend} does not have {', '.join(given)}")
    if backend == "inductor":
        _build_inductor(bundle, device, text_rows, autotune, dry_run=dry_run, as_json=as_json)
        return
    from forcing_kv.export.build import run_build
    from forcing_kv.export.planning import plan_build, target_device

    options = EngineOptions(
        cast(Any, backend), target, cast(Any, frontend), version_compatible, hardware_compatible,
        refit or refit_from is not None, strip_weights, tf32, workspace_gb, optimization_level,
        cast(Any, profiling_verbosity),
    )  # fmt: skip
    if layer_info is not None:
        check_folder(layer_info.absolute().parent, "--layer-info")
    if dry_run and refit_from is not None:
        raise InputError("--refit-from needs to know this machine's GPU; leave out --dry-run")
    gpu = None if dry_run else target_device(options)
    plan = plan_build(bundle, options, force=force, device=gpu, refit_from=refit_from)
    talk(describe(plan))
    if dry_run:
        if as_json:
            print_json(_dry_record(plan))
        return
    with progress(f"building for {plan.target}", float(len(plan.to_do) or 1)) as bar:
        finished: dict[str, float] = {}

        def report(graph: str, phase: str, fraction: float) -> None:
            before = sum(finished.values())
            finished[graph] = max(fraction, finished.get(graph, 0.0))
            bar.describe(f"{graph}: {phase}")
            bar.advance(sum(finished.values()) - before)

        record, layers = run_build(plan, report)
    _summary(plan, record)
    if layer_info is not None:
        _write_layers(layer_info, layers)
    if as_json:
        print_json(record)


def _build_inductor(
    bundle: Path,
    device: str,
    text_rows: int | None,
    autotune: bool,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compile with PyTorch's own compiler; always anew, for its cache knows what is unchanged."""
    from dataclasses import replace

    from forcing_kv.export.build_inductor import build_inductor
    from forcing_kv.export.fusion import FUSED
    from forcing_kv.export.inductor_package import InductorOptions
    from forcing_kv.runtime_trt.manifest import read_manifest

    if device not in ("cpu", "cuda"):
        raise InputError(f"--device is {device!r}; give cpu or cuda")
    fusion = replace(FUSED, text_rows=text_rows)
    manifest = read_manifest(bundle)
    config = manifest.config
    fusion.check(config.model.text_len)
    options = InductorOptions(cast(Any, device), fusion, autotune)
    decoders = [
        f"{kind}.{name}" for kind, info in manifest.decoders.items() for name in info.graphs
    ]
    added = f", with {', '.join(decoders)}" if decoders else ""
    talk(
        f"{bundle} -> engines/inductor-{device}, {config.dtype}{added}, for this machine's {device}"
    )
    if dry_run:
        return
    with progress("reading the weights", 7.0 + len(decoders)) as bar:

        def report(part: str) -> None:
            bar.advance()
            bar.describe(part)

        record = build_inductor(bundle, options, report)
    talk(f"recorded {record['folder']} in {bundle}/manifest.json ({record['build_seconds']} s)")
    if as_json:
        print_json(record)


def describe(plan: BuildPlan) -> str:
    """What a build would do, for people."""
    from forcing_kv.runtime_trt.backends.decode_graph import plan_decoder_memory
    from forcing_kv.runtime_trt.chunk_program import plan_memory

    manifest, lines = plan.manifest, []
    name = "this machine's GPU" if plan.target == "gpu" else plan.target
    lines.append(f"{plan.bundle} -> {plan.folder}, {plan.options.backend} for {name}")
    for graph in plan.graphs:
        to_do = "to build" if plan.source is None else f"to refit, from {plan.source.bundle}"
        state = to_do if graph.found is None else "up to date"
        lines.append(f"  {graph.label}: {state} (inputs {graph.inputs_sha256[:12]})")
    buffers = plan_memory(manifest.config, manifest.graphs, 0).nbytes
    lines.append(_expected(plan, "denoiser", manifest.weights_nbytes, buffers))
    for kind, decoder in manifest.decoders.items():
        nbytes = (plan.bundle / decoder.weights_file).stat().st_size
        # Every graph of a decoder has most of the weights in its plan.
        buffers = plan_decoder_memory(decoder.graphs, 0).nbytes
        lines.append(_expected(plan, kind, len(decoder.graphs) * nbytes, buffers))
    return "\n".join(lines)


def _expected(plan: BuildPlan, part: str, weight_nbytes: int, buffer_nbytes: int) -> str:
    """What a part of the engines takes on disk and on the GPU."""
    weights, buffers = weight_nbytes / 1e6, buffer_nbytes / 1e6
    held = 0.0 if plan.options.strip_weights else weights
    return (
        f"  {part}: {held:.1f} MB of weights in the engines beside the kernels (about 10 MB a "
        f"graph); on the GPU {weights:.1f} MB of weights, {buffers:.1f} MB of buffers, and the "
        "scratch that the builder finds"
    )


def _dry_record(plan: BuildPlan) -> dict[str, Any]:
    return {
        "folder": plan.folder,
        "environment": dict(plan.environment),
        "options": plan.options.to_json(),
        "to_build": [graph.label for graph in plan.to_do],
        "up_to_date": [graph.label for graph in plan.graphs if graph.found is not None],
    }


def _summary(plan: BuildPlan, record: Mapping[str, Any]) -> None:
    from forcing_kv.export.planning import recorded_part

    if not plan.to_do:
        talk("nothing to do: every engine is up to date")
        return
    for graph in plan.to_do:
        part = recorded_part(record, graph.decoder)
        assert part is not None, f"{graph.label} was built and is not recorded"
        detail = part["details"][graph.name]
        scratch = (detail["scratch_nbytes"] or 0) / 1e6
        fp8 = detail.get("num_fp8_products")
        talk(
            f"{graph.label}: {detail['nbytes'] / 1e6:.1f} MB in {detail['build_seconds']:.1f} s, "
            f"{detail['num_layers']} layers, {detail['num_fused_attention']} of them fused "
            f"attention, {f'{fp8} products in FP8, ' if fp8 else ''}{scratch:.0f} MB of scratch"
        )
    talk(f"recorded {plan.folder} in {plan.bundle}/manifest.json")


def _write_layers(path: Path, layers: Mapping[str, list[LayerInfo]]) -> None:
    from dataclasses import asdict

    content = {graph: [asdict(layer) for layer in found] for graph, found in layers.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    if not layers:
        talk(f"{path}: empty, for nothing was built; add --force")
