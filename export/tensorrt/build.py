"""Builds the TensorRT engines of a bundle: only what changed, recorded in the manifest.

What an engine record holds is said by `EngineRecord`; the denoiser and each decoder are opened on
their own.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePath
from time import perf_counter
from types import MappingProxyType
from typing import Any

from forcing_kv.export.bundle.edit import (
    base_name,
    changed_bundle,
    discard_engines,
    free_name,
)
from forcing_kv.export.bundle.write import write_manifest
from forcing_kv.export.tensorrt.attention import keep_faster
from forcing_kv.export.tensorrt.builder import BuiltPlan, LayerInfo, build_plan
from forcing_kv.export.tensorrt.plan import BuildPlan, GraphBuild
from forcing_kv.export.tensorrt.stripped import write_stripped
from forcing_kv.runtime_trt.bundle.atomic.files import replaced_folder, scratch_folder, write_file
from forcing_kv.runtime_trt.bundle.engines import (
    DecoderEngines,
    EngineDetail,
    EngineRecord,
    weight_table,
)
from forcing_kv.runtime_trt.bundle.hashes import sha256_of
from forcing_kv.runtime_trt.bundle.manifest import WEIGHT_FILE, Bundle, Manifest
from forcing_kv.runtime_trt.errors import BundleError
from forcing_kv.runtime_trt.rollout.ports import steady_name

Report = Callable[[str, str, float], None]
"""(graph, what the builder does, how much of the graph is done)."""


def run_build(
    plan: BuildPlan, report: Report = lambda _, __, ___: None
) -> tuple[EngineRecord, dict[str, list[LayerInfo]]]:
    """Build what is to do, put all engines in place at once and record them.

    Returns:
        The engine record, and the layers of every graph that was built.

    Raises:
        ForcingKvError: a graph cannot be built; the bundle is then as it was.
    """
    with changed_bundle(plan.bundle) as manifest:
        _require_same_graphs(plan.bundle, manifest, plan.manifest)
        discard_engines(plan.bundle, manifest, plan.folder)
        return _build(plan, report)


def _build(plan: BuildPlan, report: Report) -> tuple[EngineRecord, dict[str, list[LayerInfo]]]:
    """Build what is to do, in the folder that the engines of the bundle do not have."""
    old, place = plan.record, plan.folder
    if not plan.to_do and old is not None:
        return old, {}
    if old is not None:
        place = free_name(plan.folder, [old.folder])
    start = perf_counter()
    for bundle in (plan, plan.source) if plan.source is not None else (plan,):
        with Bundle(bundle.bundle) as opened:
            opened.check_exported()
    details: dict[str, EngineDetail] = {}
    layers = {}
    with _timing_cache(plan) as cache, replaced_folder(plan.bundle / place) as folder:
        for graph in plan.graphs:
            file = folder / graph.file
            file.parent.mkdir(exist_ok=True)
            if graph.found is not None:
                assert old is not None, f"{graph.label} is found and not recorded"
                target = plan.bundle / old.folder
                for kept in (target / graph.file).parent.glob(f"{graph.name}.*"):
                    shutil.copyfile(kept, file.with_name(kept.name))
                details[graph.label] = graph.found
                continue
            begin = perf_counter()
            if plan.source is not None:
                report(graph.label, "refitting", 0.0)
                details[graph.label] = _refit_graph(plan, plan.source, graph, file, begin)
                continue
            built = _build_graph(plan, graph, cache, report)
            file.write_bytes(built.plan)
            if plan.options.strip_weights:
                table = file.with_name(weight_table(file.name))
                write_stripped(table, built.stripped, PurePath(graph.info.file).parent)
            layers[graph.label] = built.log.layers
            details[graph.label] = _detail(graph, built, perf_counter() - begin)
        measured = None if cache is None or not cache.is_file() else cache.read_bytes()
        record = _record(plan, place, details, folder, perf_counter() - start)
        if old is not None:
            record = replace(record, attention_ms=old.attention_ms)
        several = len(plan.options.attentions(plan.manifest.config.dtype)) > 1
        if several and steady_name("step") in record.graphs:
            report("step", "timing its attention", 1.0)
            record = keep_faster(plan.manifest, record, folder)
    write_record(plan.bundle, record, plan.manifest, _keep_timing_cache(plan, measured))
    return record, layers


@contextmanager
def _timing_cache(plan: BuildPlan) -> Iterator[Path | None]:
    """A file of the builder's own with the tactics that the bundle has measured, where it has any.

    The builder parses it natively, so it gets no file but the one whose hash is recorded.
    """
    if plan.timing_cache is None:
        yield None
        return
    with scratch_folder() as folder:
        path = folder / "timing.cache"
        known = plan.timing_cache in plan.manifest.timing_caches
        if known and (plan.bundle / plan.timing_cache).exists():
            with Bundle(plan.bundle) as bundle:
                path.write_bytes(bundle.read(plan.timing_cache))
        yield path


def _keep_timing_cache(plan: BuildPlan, measured: bytes | None) -> Mapping[str, str]:
    """Put measured tactics into the bundle; the file's hash, by its path."""
    if plan.timing_cache is None or measured is None:
        return {}
    write_file(plan.bundle / plan.timing_cache, measured)
    return {plan.timing_cache: hashlib.sha256(measured).hexdigest()}


def _refit_graph(
    plan: BuildPlan, source: BuildPlan, graph: GraphBuild, file: Path, begin: float
) -> EngineDetail:
    """Write an engine of the source with this bundle's weights, and describe it."""
    from forcing_kv.export.tensorrt.refit import refitted_plan

    (old,) = (each for each in source.graphs if each.label == graph.label)
    assert source.record is not None, f"{graph.label} is found and not recorded"
    engine = source.bundle / source.record.folder / old.file
    with _builder_file(source, old) as before, _builder_file(plan, graph) as after:
        content = refitted_plan(engine, before, after, plan.options)
    file.write_bytes(content)
    return replace(
        old.found or EngineDetail(),
        inputs_sha256=graph.inputs_sha256,
        nbytes=len(content),
        build_seconds=round(perf_counter() - begin, 1),
        refitted=True,
    )


def _build_graph(
    plan: BuildPlan, graph: GraphBuild, cache: Path | None, report: Report
) -> BuiltPlan:
    """Build one graph with the plugins, or in the form that needs none."""
    options = plan.options

    def progress(phase: str, fraction: float) -> None:
        report(graph.label, phase, fraction)

    progress("reading the graph", 0.0)
    if graph.decoder is None and options.frontend == "torch-tensorrt":
        from forcing_kv.export.tensorrt.torch_frontend import build_plan_from_torch

        return build_plan_from_torch(plan.bundle, plan.manifest, graph.name, options)
    if graph.decoder is None and options.backend == "tensorrt":
        from forcing_kv.export.tensorrt.plugins import register_once
        from forcing_kv.plugins.bind.tensorrt import register_tensorrt_plugins

        register_once(register_tensorrt_plugins, options)
    with _builder_file(plan, graph) as path:
        return build_plan(path, options, cache, progress)


@contextmanager
def _builder_file(plan: BuildPlan, graph: GraphBuild) -> Iterator[Path]:
    """The graph as the builder is given it, in a file that finds its weights beside it.

    TensorRT reads the bundle's own, for it has our plugins; decoders hold standard operators alone.
    TensorRT-RTX gets the denoiser's in standard operators, and TensorRT that of the steady form.
    """
    native = plan.options.backend == "tensorrt-rtx" or graph.name == steady_name("step")
    if graph.decoder is not None or not native:
        yield plan.bundle / graph.info.file
        return
    import onnx
    import onnx_ir as ir

    from forcing_kv.export.tensorrt.rtx_graph import fuse_attention, inline_bodies

    source = plan.bundle / graph.info.file
    model = ir.load(source)
    if plan.manifest.config.dtype != "float32":
        fuse_attention(model, plan.manifest.config)
    with scratch_folder() as folder:
        path = folder / source.name
        if plan.options.backend == "tensorrt-rtx":
            model = inline_bodies(model)
        onnx.save(ir.to_proto(model), path)
        weights = plan.bundle / WEIGHT_FILE
        path.with_name(weights.name).symlink_to(weights.resolve())
        yield path


def _detail(graph: GraphBuild, built: BuiltPlan, seconds: float) -> EngineDetail:
    log = built.log
    # They come to the device all the same, whatever the builder counts. Torch-TensorRT tells
    # nothing; a plan is weights for the most part.
    stripped = sum(entry.nbytes for entry in built.stripped.values())
    return EngineDetail(
        inputs_sha256=graph.inputs_sha256,
        nbytes=len(built.plan),
        weight_nbytes=max(log.nbytes.get("weights", len(built.plan)), stripped),
        scratch_nbytes=log.nbytes.get("activation"),
        num_layers=len(log.layers),
        num_attention=log.num_attention,
        num_fused_attention=log.num_fused_attention,
        num_fp8_products=log.num_fp8_products,
        build_seconds=round(seconds, 1),
    )


def _record(
    plan: BuildPlan, place: str, details: Mapping[str, EngineDetail], folder: Path, seconds: float
) -> EngineRecord:
    """What the manifest says of the engines in `folder` once they are at `place`."""
    decoders = {
        kind: DecoderEngines(
            **_part(plan, place, kind, details, folder), decoder_sha256=decoder.sha256
        )
        for kind, decoder in plan.manifest.decoders.items()
    }
    part = _part(plan, place, None, details, folder) | {"build_seconds": round(seconds, 1)}
    return EngineRecord(
        **part,
        backend=plan.options.backend,
        target=plan.target,
        environment=dict(plan.environment),
        options=plan.options.to_json(),
        decoders=decoders,
    )


def _part(
    plan: BuildPlan,
    place: str,
    decoder: str | None,
    details: Mapping[str, EngineDetail],
    there: Path,
) -> dict[str, Any]:
    """Fields of an `EnginePart`: the denoiser's, or a decoder's."""
    files, graphs, described = {}, {}, {}
    for graph in plan.graphs:
        if graph.decoder != decoder:
            continue
        relative = f"{place}/{graph.file}"
        files[relative] = sha256_of(there / graph.file)
        if plan.options.strip_weights:
            files[weight_table(relative)] = sha256_of(there / weight_table(graph.file))
        graphs[graph.name] = replace(graph.info, file=relative, sha256=files[relative])
        described[graph.name] = details[graph.label]
    built = sum(detail.build_seconds for detail in described.values())
    folder = place if decoder is None else f"{place}/{decoder}"
    return {
        "folder": folder,
        "build_seconds": round(built, 1),
        "files": files,
        "graphs": graphs,
        "details": described,
    }


def write_record(
    bundle: Path,
    record: EngineRecord,
    built_of: Manifest,
    timing_caches: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Add an engine record to the manifest, in place of the one of the same engines, which go.

    Args:
        built_of: the manifest whose graphs and weights the engine was made of.
        timing_caches: hashes of files that the build wrote too.

    Raises:
        BundleError: the bundle holds other graphs or weights by now.
    """
    name = base_name(record.folder)
    with changed_bundle(bundle) as manifest:
        _require_same_graphs(bundle, manifest, built_of)
        others = [old for old in manifest.engines if base_name(old.folder) != name]
        caches = {**manifest.timing_caches, **timing_caches}
        updated = replace(manifest, engines=(*others, record), timing_caches=caches)
        write_manifest(updated, bundle)
        discard_engines(bundle, updated, name)


def _require_same_graphs(bundle: Path, manifest: Manifest, built_of: Manifest) -> None:
    """Refuse a bundle whose graphs or weights are not those of an engine."""
    if (manifest.hashes, manifest.decoders) != (built_of.hashes, built_of.decoders):
        raise BundleError(f"{bundle}: has changed since the build began; begin again")
