"""`fkv build`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from forcing_kv.export.request.flags import File, Int, Json, YesNo, flags, given, panel
from forcing_kv.export.tensorrt.options import EngineOptions, TensorRtBackend, TensorRtOptions
from forcing_kv.runtime_trt.bundle.atomic.files import check_file, write_json
from forcing_kv.runtime_trt.console import print_json, progress, talk
from forcing_kv.runtime_trt.errors import InputError

if TYPE_CHECKING:
    from forcing_kv.export.tensorrt.builder import LayerInfo
    from forcing_kv.export.tensorrt.plan import BuildPlan
    from forcing_kv.runtime_trt.bundle.engines import EngineRecord


@flags()
@dataclass(frozen=True, kw_only=True)
class TensorRtBuild(TensorRtOptions):
    """What `fkv build` can be told about either TensorRT."""

    refit_from: Path | None = None
    """Give this bundle's weights to the engines that another bundle of the same model has from a
    build with --refit, instead of building."""
    layer_info: File | None = None
    """Write the layers of the graphs that were built, JSON."""

    def engine(self, backend: TensorRtBackend, attention: Any) -> EngineOptions:
        own = {field.name: getattr(self, field.name) for field in fields(TensorRtOptions)}
        return EngineOptions(
            backend, attention, **own | {"refit": self.refit or self.refit_from is not None}
        )


@flags(panel("Inductor"))
@dataclass(frozen=True, kw_only=True)
class InductorBuild:
    """What `fkv build` can be told about PyTorch's compiler."""

    device: Literal["cuda", "cpu"] = "cuda"
    """The one of this machine."""
    text_rows: Int | None = None
    """Fold a prompt's padding, and attend to this many text rows instead of all; longer prompts are
    refused."""
    autotune: YesNo = True
    """Measure matrix-product kernels and keep the fastest."""


Attention = Literal["auto", "plugin", "native", "triton", "cudnn", "flash"]

ATTENTIONS: Mapping[str, tuple[Attention, ...]] = {
    "tensorrt": ("auto", "plugin", "native"),
    "tensorrt-rtx": ("auto", "native"),
    "inductor": ("auto", "triton", "cudnn", "flash"),
}
"""What each backend can attend with."""


@flags()
@dataclass(frozen=True, kw_only=True)
class BuildRun:
    """What is built at all, and what is said of it."""

    backend: Literal["tensorrt", "tensorrt-rtx", "inductor"]
    """What runs the engines (onnxruntime needs no build)."""
    attention: Attention = "auto"
    """What steady chunks attend with, and every other chunk if it is `plugin` or `triton`, our own
    kernel. TensorRT: plugin, native (NVIDIA's fused layer; a second engine). Inductor on CUDA:
    triton, cudnn, flash. Default: the fastest, measured where that can be."""
    force: bool = False
    """Build what is up to date too."""
    dry_run: bool = False
    """Say what would be built, its size and memory; stop."""
    as_json: Json = False
    """Print the engine record and the bundle's digest."""


def build(
    bundle: Path,
    /,
    *,
    run: BuildRun,
    tensorrt: TensorRtBuild = TensorRtBuild(),
    inductor: InductorBuild = InductorBuild(),
) -> None:
    """Compile engines into a bundle: only what is missing or changed.

    Args:
        bundle: Bundle directory, written by `fkv export`.
    """
    backend = run.backend
    if foreign := given(tensorrt if backend == "inductor" else inductor):
        raise InputError(f"--backend {backend} does not have {', '.join(foreign)}")
    if run.attention not in ATTENTIONS[backend]:
        raise InputError(
            f"--attention {run.attention} is none of --backend {backend}; it has "
            f"{list(ATTENTIONS[backend])}"
        )
    if backend == "inductor":
        _build_inductor(bundle, inductor, run)
    else:
        _build_tensorrt(bundle, tensorrt, tensorrt.engine(backend, run.attention), run)


def _build_tensorrt(
    bundle: Path, wanted: TensorRtBuild, options: EngineOptions, run: BuildRun
) -> None:
    """Build what is missing or changed, with the builder of either TensorRT."""
    from forcing_kv.export.bundle.edit import changed_bundle
    from forcing_kv.export.tensorrt.plan import plan_build, target_device

    if wanted.layer_info is not None:
        check_file(wanted.layer_info, option="--layer-info", force=run.force, make_folder=True)
    if run.dry_run and wanted.refit_from is not None:
        raise InputError("--refit-from needs to know this machine's GPU; leave out --dry-run")
    gpu = None if run.dry_run else target_device(options)
    with ExitStack() as stack:
        if not run.dry_run:
            stack.enter_context(changed_bundle(bundle))
        plan = plan_build(
            bundle, options, force=run.force, device=gpu, refit_from=wanted.refit_from
        )
        talk(describe(plan))
        if not run.dry_run:
            _carry_out(plan, wanted, run)
        elif run.as_json:
            print_json(_dry_record(plan))


def _carry_out(plan: BuildPlan, wanted: TensorRtBuild, run: BuildRun) -> None:
    from forcing_kv.export.tensorrt.build import run_build

    with progress(f"building for {plan.target}", float(len(plan.to_do) or 1)) as bar:
        finished: dict[str, float] = {}

        def report(graph: str, phase: str, fraction: float) -> None:
            before = sum(finished.values())
            finished[graph] = max(fraction, finished.get(graph, 0.0))
            bar.describe(f"{graph}: {phase}")
            bar.advance(sum(finished.values()) - before)

        record, layers = run_build(plan, report)
    _summary(plan, record)
    if wanted.layer_info is not None:
        _write_layers(wanted.layer_info, layers)
    _tell_digest(plan.bundle, record, run)


def _build_inductor(bundle: Path, wanted: InductorBuild, run: BuildRun) -> None:
    """Compile with PyTorch's own compiler; always anew, for its cache knows what is unchanged."""
    from forcing_kv.export.inductor.build import build_inductor
    from forcing_kv.export.inductor.compile import InductorOptions, choose_attention
    from forcing_kv.export.model.fusion import FUSED
    from forcing_kv.runtime_trt.bundle.manifest import read_manifest

    fusion = replace(FUSED, text_rows=wanted.text_rows)
    manifest = read_manifest(bundle)
    config = manifest.config
    fusion.check(config.model.text_len)
    decoders = [
        f"{kind}.{name}" for kind, info in manifest.decoders.items() for name in info.graphs
    ]
    added = f", with {', '.join(decoders)}" if decoders else ""
    talk(
        f"{bundle} -> engines/inductor-{wanted.device}, {config.dtype}{added}, for this machine's "
        f"{wanted.device}"
    )
    if run.dry_run:
        return
    attention = choose_attention(cast(Any, run.attention), wanted.device, config)
    fusion = replace(fusion, attention=attention)
    options = InductorOptions(wanted.device, fusion, wanted.autotune)
    num_parts = 3 + len(fusion.ports(config)) + len(decoders)
    with progress("reading the weights", float(num_parts)) as bar:

        def report(part: str) -> None:
            bar.advance()
            bar.describe(part)

        record = build_inductor(bundle, options, report)
    talk(f"recorded {record.folder} in {bundle}/manifest.json ({record.build_seconds} s)")
    _tell_digest(bundle, record, run)


def _tell_digest(bundle: Path, record: EngineRecord, run: BuildRun) -> None:
    """Say what the bundle is now; the engines are part of it."""
    from forcing_kv.runtime_trt.bundle.manifest import read_manifest

    digest = read_manifest(bundle).digest
    talk(f"{bundle} is {digest} now")
    if run.as_json:
        print_json({**record.to_json(), "digest": digest})


def describe(plan: BuildPlan) -> str:
    """What a build would do, for people."""
    from forcing_kv.runtime_trt.cuda.chunk_program import plan_memory
    from forcing_kv.runtime_trt.decode.graph import plan_decoder_memory

    manifest, lines = plan.manifest, []
    name = "this machine's GPU" if plan.target == "gpu" else plan.target
    lines.append(f"{plan.bundle} -> {plan.folder}, {plan.options.backend} for {name}")
    for graph in plan.graphs:
        to_do = "to build" if plan.source is None else f"to refit, from {plan.source.bundle}"
        state = to_do if graph.found is None else "up to date"
        lines.append(f"  {graph.label}: {state} (inputs {graph.inputs_sha256[:12]})")
    buffers = plan_memory(manifest.config, manifest.graphs, {}).nbytes
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


def _summary(plan: BuildPlan, record: EngineRecord) -> None:
    if not plan.to_do:
        talk("nothing to do: every engine is up to date")
        return
    for graph in plan.to_do:
        part = record.part(graph.decoder)
        assert part is not None, f"{graph.label} was built and is not recorded"
        detail = part.details[graph.name]
        scratch = (detail.scratch_nbytes or 0) / 1e6
        fp8 = f"{number} products in FP8, " if (number := detail.num_fp8_products) else ""
        talk(
            f"{graph.label}: {detail.nbytes / 1e6:.1f} MB in {detail.build_seconds:.1f} s, "
            f"{detail.num_layers} layers, {detail.num_fused_attention} of "
            f"{detail.num_attention} attentions fused, {fp8}{scratch:.0f} MB of scratch"
        )
    talk(f"recorded {record.folder} in {plan.bundle}/manifest.json")


def _write_layers(path: Path, layers: Mapping[str, list[LayerInfo]]) -> None:
    content = {graph: [asdict(layer) for layer in found] for graph, found in layers.items()}
    write_json(path, content)
    if not layers:
        talk(f"{path}: empty, for nothing was built; add --force")
