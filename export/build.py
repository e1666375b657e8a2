"""Builds the TensorRT engines of a bundle: only what changed, recorded in the manifest.

An engine record is one entry of the manifest's `engines`; every backend uses the same keys:
`backend`, `folder`, `files` (path to hash), `graphs` (inputs and outputs; `file` is the plan),
`environment`, `options`, `build_seconds`, and here `details` by graph. `decoders` holds, by kind,
the `folder`, `files`, `graphs`, `details` and `build_seconds` of a video decoder, and the hash of
what it was made of (`decoder_sha256`); the denoiser and each decoder are opened on their own.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath
from time import perf_counter
from typing import Any

from forcing_kv.export.bundle import replaced_folder, write_manifest
from forcing_kv.export.engine_builder import BuiltPlan, LayerInfo, build_plan
from forcing_kv.export.engine_options import EngineOptions
from forcing_kv.export.stripped_weights import write_stripped
from forcing_kv.runtime_trt.cuda import Cuda, DeviceInfo
from forcing_kv.runtime_trt.engine_record import weight_table
from forcing_kv.runtime_trt.errors import ForcingKvError, InputError, require
from forcing_kv.runtime_trt.fp8 import FP8_MIN_SM, Fp8Scales, check_sm
from forcing_kv.runtime_trt.manifest import (
    WEIGHT_FILE,
    GraphInfo,
    Manifest,
    read_manifest,
    sha256_of,
)

BUILD_VERSION = 2
"""Raised when the same inputs give other engines, or plugins have other tactics."""

ENGINE_FOLDER = "engines"


@dataclass(frozen=True)
class GraphBuild:
    """One graph to be built, or found built."""

    name: str
    info: GraphInfo
    decoder: str | None
    """Kind of the decoder that it belongs to; None for the denoiser's."""
    inputs_sha256: str
    """Hash of everything that the engine depends on."""
    found: Mapping[str, Any] | None
    """Details of the engine that is there, if it was made of the same inputs."""

    @property
    def label(self) -> str:
        """`step`, or `vae.decode`."""
        return self.name if self.decoder is None else f"{self.decoder}.{self.name}"

    @property
    def file(self) -> str:
        """Its plan, relative to the folder of the engines."""
        return f"{self.name}.plan" if self.decoder is None else f"{self.decoder}/{self.name}.plan"


@dataclass(frozen=True)
class BuildPlan:
    """What a build would do."""

    bundle: Path
    manifest: Manifest
    options: EngineOptions
    environment: Mapping[str, str]
    graphs: tuple[GraphBuild, ...]
    source: BuildPlan | None = None
    """Another bundle with engines of the same graphs, which are refitted instead of built."""

    @property
    def target(self) -> str:
        """GPU architecture, or `gpu` while it is not known."""
        return f"sm{self.environment['sm']}" if "sm" in self.environment else "gpu"

    @property
    def folder(self) -> str:
        """Where the engines go, relative to the bundle."""
        return f"{ENGINE_FOLDER}/{self.options.backend}-{self.target}"

    @property
    def timing_cache(self) -> str | None:
        """File of measured tactics, relative to the bundle; TensorRT-RTX measures none."""
        if self.options.backend == "tensorrt-rtx":
            return None
        version = self.environment[self.options.module]
        # Two GPUs of one architecture, such as H100 and H200, measure differently.
        gpu = re.sub("[^a-z0-9]+", "-", self.environment.get("gpu", self.target).lower())
        # The cache knows a plugin's tactics by their numbers alone.
        return f"{ENGINE_FOLDER}/timing-{gpu.strip('-')}-{version}-{BUILD_VERSION}.cache"

    @property
    def to_do(self) -> tuple[GraphBuild, ...]:
        """Graphs whose engine is missing or was made of something else."""
        return tuple(graph for graph in self.graphs if graph.found is None)


def plan_build(
    bundle: Path,
    options: EngineOptions,
    *,
    force: bool = False,
    device: DeviceInfo | None = None,
    refit_from: Path | None = None,
) -> BuildPlan:
    """Find out what has to be built; touches no GPU.

    Args:
        bundle: directory written by `fkv export`.
        options: how to build.
        force: build every graph, whatever is there.
        device: the GPU of this machine, where the build is for it.
        refit_from: bundle whose engines are given this one's weights.

    Raises:
        BundleError: the bundle is missing or malformed.
        MissingDependencyError: the builder is not installed.
        InputError: `refit_from` has no such engines.
        ForcingKvError: the builder is known to go wrong with these options.
    """
    manifest = read_manifest(bundle)
    module = require(options.module)
    environment = {options.module: str(module.__version__)}
    _check_builder(options, environment[options.module])
    if options.target is not None:
        environment["sm"] = options.target.removeprefix("sm")
    elif device is not None:
        environment |= {"sm": str(device.sm), "gpu": device.name, "driver": device.driver}
    if manifest.fp8 is not None:
        _check_fp8(manifest.fp8, options, environment.get("sm"))
    plan = BuildPlan(bundle, manifest, options, environment, ())
    record = None if force else _record_of(manifest, plan.folder)
    graphs = _part(plan, record, None, manifest.graphs, manifest.weights_sha256)
    for kind, decoder in manifest.decoders.items():
        part = recorded_part(record or {}, kind)
        graphs += _part(plan, part, kind, decoder.graphs, decoder.weights_sha256)
    plan = replace(plan, graphs=tuple(graphs))
    return plan if refit_from is None else replace(plan, source=_source(plan, refit_from, device))


def _check_builder(options: EngineOptions, version: str) -> None:
    """Refuse what NVIDIA lists as wrong (release notes of TensorRT 11.3.0, known issues)."""
    if options.backend == "tensorrt" and options.refit and version.startswith("11.3."):
        raise ForcingKvError(
            f"TensorRT {version} may drop the bias of a matrix product in a refittable engine; "
            "install another version, or leave out --refit"
        )


def _source(plan: BuildPlan, bundle: Path, device: DeviceInfo | None) -> BuildPlan:
    """The plan of a bundle whose engines can be refitted for another."""
    if bundle.resolve() == plan.bundle.resolve():
        raise InputError(f"--refit-from names {bundle} itself; give the bundle with the engines")
    if not plan.options.refit or plan.options.strip_weights or plan.options.frontend != "onnx":
        raise InputError(
            "--refit-from goes with --refit, and neither with --strip-weights (such engines keep "
            "their small weights) nor with --frontend torch-tensorrt (which has its own names)"
        )
    source = plan_build(bundle, plan.options, device=device)
    there = {graph.label for graph in source.graphs if graph.found is not None}
    if missing := [graph.label for graph in plan.to_do if graph.label not in there]:
        raise InputError(
            f"--refit-from {bundle}: it holds no engines of {missing} built with these options, "
            f"for this GPU and by {plan.options.module} {plan.environment[plan.options.module]}; "
            f"make them with `fkv build {bundle} --backend {plan.options.backend} --refit`, or "
            "leave out --refit-from"
        )
    return source


def _check_fp8(fp8: Fp8Scales, options: EngineOptions, sm: str | None) -> None:
    """Refuse what cannot run layers in FP8."""
    if options.frontend == "torch-tensorrt":
        raise InputError(
            "--frontend torch-tensorrt does not know layers in FP8; take --frontend onnx"
        )
    if options.hardware_compatible:
        raise InputError(
            f"--hardware-compatible includes GPUs without FP8 (before sm{FP8_MIN_SM}); leave it out"
        )
    if sm is not None:
        check_sm(fp8, int(sm))


def _part(
    plan: BuildPlan,
    recorded: Mapping[str, Any] | None,
    decoder: str | None,
    graphs: Mapping[str, GraphInfo],
    weights_sha256: str,
) -> list[GraphBuild]:
    """The graphs of the denoiser or of a decoder, compared with what is recorded of them."""
    details = {} if recorded is None else _intact(plan.bundle, recorded)
    found = []
    for name, info in graphs.items():
        inputs = _inputs_sha256(plan, info, weights_sha256)
        known = details.get(name)
        same = known is not None and known.get("inputs_sha256") == inputs
        found.append(GraphBuild(name, info, decoder, inputs, known if same else None))
    return found


def recorded_part(record: Mapping[str, Any], decoder: str | None) -> Mapping[str, Any] | None:
    """What a record says of the denoiser (None) or of a decoder."""
    part: Mapping[str, Any] | None = record.get("decoders", {}).get(decoder)
    return record if decoder is None else part


def _record_of(manifest: Manifest, folder: str) -> Mapping[str, Any] | None:
    return next((record for record in manifest.engines if record.get("folder") == folder), None)


def _intact(bundle: Path, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Details of those graphs of a record, or of a part of one, whose files are as written."""
    changed = {
        PurePath(file).name.partition(".")[0]
        for file, sha256 in record["files"].items()
        if not (bundle / file).is_file() or sha256_of(bundle / file) != sha256
    }
    return {
        name: detail for name, detail in record.get("details", {}).items() if name not in changed
    }


def _inputs_sha256(plan: BuildPlan, graph: GraphInfo, weights_sha256: str) -> str:
    content = {
        "version": BUILD_VERSION,
        "graph": graph.sha256,
        "weights": weights_sha256,
        "plugin_abi": plan.manifest.plugin_abi,
        "options": plan.options.to_json(),
        # An engine does not depend on the driver, which is recorded for people.
        "environment": {k: v for k, v in plan.environment.items() if k != "driver"},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


Report = Callable[[str, str, float], None]
"""(graph, what the builder does, how much of the graph is done)."""


def run_build(
    plan: BuildPlan, report: Report = lambda _, __, ___: None
) -> tuple[Mapping[str, Any], dict[str, list[LayerInfo]]]:
    """Build what is to do, put all engines in place at once and record them.

    Returns:
        The engine record, and the layers of every graph that was built.

    Raises:
        ForcingKvError: a graph cannot be built; the bundle is then as it was.
    """
    old = _record_of(plan.manifest, plan.folder)
    if not plan.to_do and old is not None:
        return old, {}
    start = perf_counter()
    details, layers = {}, {}
    target = plan.bundle / plan.folder
    with replaced_folder(target) as folder:
        for graph in plan.graphs:
            file = folder / graph.file
            file.parent.mkdir(exist_ok=True)
            if graph.found is not None:
                for kept in (target / graph.file).parent.glob(f"{graph.name}.*"):
                    shutil.copyfile(kept, file.with_name(kept.name))
                details[graph.label] = graph.found
                continue
            begin = perf_counter()
            if plan.source is not None:
                report(graph.label, "refitting", 0.0)
                details[graph.label] = _refit_graph(plan, plan.source, graph, file, begin)
                continue
            built = _build_graph(plan, graph, report)
            file.write_bytes(built.plan)
            if plan.options.strip_weights:
                table = file.with_name(weight_table(file.name))
                write_stripped(table, built.stripped, PurePath(graph.info.file).parent)
            layers[graph.label] = built.log.layers
            details[graph.label] = _detail(graph, built, perf_counter() - begin)
    record = _record(plan, details, perf_counter() - start)
    write_record(plan.bundle, record)
    return record, layers


def _refit_graph(
    plan: BuildPlan, source: BuildPlan, graph: GraphBuild, file: Path, begin: float
) -> dict[str, Any]:
    """Write an engine of the source with this bundle's weights, and describe it."""
    from forcing_kv.export.refit import refitted_plan

    (old,) = (each for each in source.graphs if each.label == graph.label)
    engine = source.bundle / source.folder / old.file
    with _builder_file(source, old) as before, _builder_file(plan, graph) as after:
        content = refitted_plan(engine, before, after, plan.options)
    file.write_bytes(content)
    return {
        **(old.found or {}),
        "inputs_sha256": graph.inputs_sha256,
        "nbytes": len(content),
        "build_seconds": round(perf_counter() - begin, 1),
        "refitted": True,
    }


def _build_graph(plan: BuildPlan, graph: GraphBuild, report: Report) -> BuiltPlan:
    """Build one graph with the plugins, or in the form that needs none."""
    options = plan.options
    cache = None if plan.timing_cache is None else plan.bundle / plan.timing_cache

    def progress(phase: str, fraction: float) -> None:
        report(graph.label, phase, fraction)

    progress("reading the graph", 0.0)
    if graph.decoder is None and options.frontend == "torch-tensorrt":
        from forcing_kv.export.torch_frontend import build_plan_from_torch

        return build_plan_from_torch(plan.bundle, plan.manifest, graph.name, options)
    if graph.decoder is None and options.backend == "tensorrt":
        from forcing_kv.export.plugin_setup import register_once
        from forcing_kv.plugins.registry import register_tensorrt_plugins

        register_once(register_tensorrt_plugins, options)
    with _builder_file(plan, graph) as path:
        return build_plan(path, options, cache, progress)


@contextmanager
def _builder_file(plan: BuildPlan, graph: GraphBuild) -> Iterator[Path]:
    """The graph as the builder is given it, in a file that finds its weights beside it.

    TensorRT reads the bundle's own, for it has our plugins; decoders hold standard operators alone.
    TensorRT-RTX gets the denoiser's in standard operators.
    """
    if graph.decoder is not None or plan.options.backend == "tensorrt":
        yield plan.bundle / graph.info.file
        return
    import onnx
    import onnx_ir as ir

    from forcing_kv.export.rtx_graph import fuse_attention, inline_bodies, read_onnx

    source = plan.bundle / graph.info.file
    model = read_onnx(source)
    if plan.manifest.config.dtype != "float32":
        fuse_attention(model, plan.manifest.config)
    with tempfile.TemporaryDirectory(prefix="fkv-build-") as folder:
        path = Path(folder) / source.name
        onnx.save(ir.to_proto(inline_bodies(model)), path)
        weights = plan.bundle / WEIGHT_FILE
        path.with_name(weights.name).symlink_to(weights.resolve())
        yield path


def _detail(graph: GraphBuild, built: BuiltPlan, seconds: float) -> dict[str, Any]:
    log = built.log
    # They come to the device all the same, whatever the builder counts. Torch-TensorRT tells
    # nothing; a plan is weights for the most part.
    stripped = sum(entry.nbytes for entry in built.stripped.values())
    return {
        "inputs_sha256": graph.inputs_sha256,
        "nbytes": len(built.plan),
        "weight_nbytes": max(log.nbytes.get("weights", len(built.plan)), stripped),
        "scratch_nbytes": log.nbytes.get("activation"),
        "num_layers": len(log.layers),
        "num_fused_attention": log.num_fused_attention,
        "num_fp8_products": log.num_fp8_products,
        "build_seconds": round(seconds, 1),
    }


def _record(
    plan: BuildPlan, details: Mapping[str, Mapping[str, Any]], seconds: float
) -> dict[str, Any]:
    decoders = {}
    for kind, decoder in plan.manifest.decoders.items():
        part = _recorded(plan, kind, details)
        built = sum(detail["build_seconds"] for detail in part["details"].values())
        decoders[kind] = {
            "folder": f"{plan.folder}/{kind}",
            "decoder_sha256": decoder.sha256,
            "build_seconds": round(built, 1),
            **part,
        }
    return {
        "backend": plan.options.backend,
        "target": plan.target,
        "folder": plan.folder,
        "environment": dict(plan.environment),
        "options": plan.options.to_json(),
        "build_seconds": round(seconds, 1),
        **_recorded(plan, None, details),
        "decoders": decoders,
    }


def _recorded(
    plan: BuildPlan, decoder: str | None, details: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Files, graphs and details of the denoiser or of a decoder."""
    files, graphs, described = {}, {}, {}
    for graph in plan.graphs:
        if graph.decoder != decoder:
            continue
        relative = f"{plan.folder}/{graph.file}"
        files[relative] = sha256_of(plan.bundle / relative)
        if plan.options.strip_weights:
            table = weight_table(relative)
            files[table] = sha256_of(plan.bundle / table)
        graphs[graph.name] = asdict(replace(graph.info, file=relative, sha256=files[relative]))
        described[graph.name] = dict(details[graph.label])
    return {"files": files, "graphs": graphs, "details": described}


def write_record(bundle: Path, record: Mapping[str, Any]) -> None:
    """Add an engine record to the manifest, in place of the one of the same folder."""
    # Read again: another build may have added its engines meanwhile.
    manifest = read_manifest(bundle)
    others = [old for old in manifest.engines if old.get("folder") != record["folder"]]
    write_manifest(replace(manifest, engines=(*others, record)), bundle)


def target_device(options: EngineOptions) -> DeviceInfo | None:
    """The GPU of this machine, if the build is for it or runs on it.

    Raises:
        BackendUnavailableError: there is none.
    """
    if not options.needs_gpu:
        return None
    try:
        return Cuda(extra="rtx" if options.backend == "tensorrt-rtx" else "trt").device
    except ForcingKvError as error:
        hint = (
            "give --target (and neither --refit nor --strip-weights) to build without one"
            if options.backend == "tensorrt-rtx"
            else "TensorRT builds on the machine that will run the engine; "
            "--backend tensorrt-rtx --target sm89 builds without a GPU"
        )
        raise type(error)(f"{error}; {hint}") from error
