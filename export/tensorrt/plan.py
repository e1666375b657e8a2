"""What a build of TensorRT engines would do: which graphs of a bundle, with what, for which GPU."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from forcing_kv.export.bundle.edit import base_name
from forcing_kv.export.tensorrt.options import EngineOptions
from forcing_kv.runtime_trt.bundle.atomic.places import without_links
from forcing_kv.runtime_trt.bundle.engines import EngineDetail, EnginePart, EngineRecord
from forcing_kv.runtime_trt.bundle.fp8 import FP8_MIN_SM, Fp8Scales, check_sm
from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo
from forcing_kv.runtime_trt.bundle.hashes import is_intact
from forcing_kv.runtime_trt.bundle.manifest import Manifest, read_manifest
from forcing_kv.runtime_trt.cuda.runtime import Cuda, DeviceInfo
from forcing_kv.runtime_trt.errors import ForcingKvError, InputError, require
from forcing_kv.runtime_trt.rollout.ports import steady_name

BUILD_VERSION = 3
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
    found: EngineDetail | None
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
    def record(self) -> EngineRecord | None:
        """What the bundle records of such engines, which stand in a folder of their own."""
        return record_of(self.manifest, self.folder)

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
    record = None if force else record_of(manifest, plan.folder)
    chosen = _denoiser_graphs(manifest, options, record)
    graphs = _part(plan, record, None, chosen, manifest.weights_sha256)
    for kind, decoder in manifest.decoders.items():
        part = None if record is None else record.part(kind)
        graphs += _part(plan, part, kind, decoder.graphs, decoder.weights_sha256)
    plan = replace(plan, graphs=tuple(graphs))
    return plan if refit_from is None else replace(plan, source=_source(plan, refit_from, device))


def _denoiser_graphs(
    manifest: Manifest, options: EngineOptions, record: EngineRecord | None
) -> Mapping[str, GraphInfo]:
    """Graphs that get an engine: with plugins alone the general form serves every chunk."""
    attentions = options.attentions(manifest.config.dtype)
    times_ms = {} if record is None else record.attention_ms
    if attentions == tuple(times_ms):  # Both were timed, and the slower one was left out.
        attentions = (min(attentions, key=times_ms.__getitem__),)
    if "native" in attentions:
        return manifest.graphs
    return {name: graph for name, graph in manifest.graphs.items() if name != steady_name("step")}


def _check_builder(options: EngineOptions, version: str) -> None:
    """Refuse what NVIDIA lists as wrong (release notes of TensorRT 11.3.0, known issues)."""
    if options.backend == "tensorrt" and options.refit and version.startswith("11.3."):
        raise ForcingKvError(
            f"TensorRT {version} may drop the bias of a matrix product in a refittable engine; "
            "install another version, or leave out --refit"
        )


def _source(plan: BuildPlan, bundle: Path, device: DeviceInfo | None) -> BuildPlan:
    """The plan of a bundle whose engines can be refitted for another."""
    if without_links(bundle) == without_links(plan.bundle):
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
    recorded: EnginePart | None,
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
        same = known is not None and known.inputs_sha256 == inputs
        found.append(GraphBuild(name, info, decoder, inputs, known if same else None))
    return found


def record_of(manifest: Manifest, folder: str) -> EngineRecord | None:
    """The record of the engines of a folder, under either of its names, if there is one."""
    found = (record for record in manifest.engines if base_name(record.folder) == folder)
    return next(found, None)


def _intact(bundle: Path, recorded: EnginePart) -> Mapping[str, EngineDetail]:
    """Details of those graphs whose files are as written."""
    changed = {
        PurePath(file).name.partition(".")[0]
        for file, sha256 in recorded.files.items()
        if not is_intact(bundle / file, sha256)
    }
    return {name: detail for name, detail in recorded.details.items() if name not in changed}


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
