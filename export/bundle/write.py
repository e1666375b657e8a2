"""Writes a bundle: graphs, weights and manifest, all or nothing."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from forcing_kv.export.bundle.onnx_graph import WeightStore, onnx_model, write_onnx
from forcing_kv.export.bundle.onnxruntime_graph import fuse_attention
from forcing_kv.export.bundle.steady_graph import make_steady_
from forcing_kv.export.checkpoint.finite import FiniteCheck
from forcing_kv.export.model.capture import graph_sources
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.model.fp8_layers import quantize_
from forcing_kv.export.model.fusion import PLAIN
from forcing_kv.export.model.rewrite import sort_heads_
from forcing_kv.runtime_trt.bundle.atomic.files import check_folder, replaced_folder, write_file
from forcing_kv.runtime_trt.bundle.fp8 import Fp8Scales
from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo, TensorInfo
from forcing_kv.runtime_trt.bundle.hashes import sha256_of
from forcing_kv.runtime_trt.bundle.manifest import (
    GRAPH_FOLDER,
    MANIFEST_FILE,
    WEIGHT_FILE,
    Manifest,
)
from forcing_kv.runtime_trt.dtypes import BY_ONNX
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.ports import steady_name

Report = Callable[[str], None]
"""Called with the name of what is being written."""


@dataclass(frozen=True)
class BundleLabels:
    """What a bundle says about itself beside its configuration."""

    name: str
    text_encoder: str | None = None
    decoder: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Hashes and origins of the inputs."""


def check_target(target: Path, *, force: bool) -> None:
    """Refuse a target that is in the way.

    Raises:
        InputError: `target` exists and `force` is off, or it is not a bundle; or it cannot be made.
    """
    if os.path.lexists(target) and not force:
        raise InputError(f"{target}: exists already; choose another path or give --force")
    is_bundle = (target / MANIFEST_FILE).is_file()
    if target.exists() and not is_bundle and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: is not a bundle, so it is not replaced; choose another path")
    check_folder(target.absolute().parent)


@contextmanager
def replaced_directory(target: Path, *, force: bool) -> Iterator[Path]:
    """A temporary directory that becomes `target` if the block ends well.

    Raises:
        InputError: `target` exists and `force` is off, or is not a bundle.
    """
    check_target(target, force=force)
    with replaced_folder(target, force=force) as temporary:
        yield temporary


def export_bundle(
    model: CausalWanModel,
    config: RolloutConfig,
    target: Path,
    labels: BundleLabels,
    *,
    fp8: Fp8Scales | None = None,
    force: bool = False,
    consume: bool = False,
    allow_non_finite: bool = False,
    report: Report = lambda _: None,
) -> Manifest:
    """Export every graph of a deployment.

    Args:
        model: weights under the official names, heads in checkpoint order.
        fp8: layers to round to FP8 (`export.model.fp8.scales_for`); None for none.
        force: replace a bundle that is there.
        consume: rewrite `model` in place instead of copying it (saves its size in memory).
        allow_non_finite: write weights that are NaN or infinite in the bundle's dtype.
        report: told the name of each part when it begins.

    Returns:
        The manifest as written.

    Raises:
        InputError: `target` is in the way, or weights are not finite.
    """
    import torch

    with replaced_directory(target, force=force) as folder:
        model = model if consume else copy.deepcopy(model)
        model = sort_heads_(model, config.partition).cast_(getattr(torch, config.dtype)).eval()
        if fp8 is not None:
            quantize_(model, fp8)
        if not allow_non_finite:
            check = FiniteCheck(labels.name)
            check.look_at(model)
            check.refuse()
        graphs, onnxruntime = _write_graphs(model, config, folder, report)
        report("manifest")
        weights_path = folder / WEIGHT_FILE
        tools = {name: version(name) for name in ("forcing-kv", "torch", "onnx", "onnxscript")}
        manifest = Manifest(
            name=labels.name,
            config=config,
            graphs=graphs,
            onnxruntime=onnxruntime,
            weights_sha256=sha256_of(weights_path),
            weights_nbytes=weights_path.stat().st_size,
            fp8=fp8,
            provenance={**labels.provenance, "tools": tools},
            text_encoder=labels.text_encoder,
            decoder=labels.decoder,
        )
        return write_manifest(manifest, folder)


def _write_graphs(
    model: CausalWanModel, config: RolloutConfig, folder: Path, report: Report
) -> tuple[dict[str, GraphInfo], dict[str, GraphInfo]]:
    """Write graphs and the one file of all their weights.

    Returns:
        What the manifest says of the portable graphs, and of those for ONNX Runtime.
    """
    (folder / GRAPH_FOLDER).mkdir()
    portable: dict[str, GraphInfo] = {}
    fused: dict[str, GraphInfo] = {}
    weights_path = folder / WEIGHT_FILE
    with weights_path.open("wb") as file:
        store = WeightStore(file, weights_path.name, weights_path.parent)

        def write(graph: ir.Model, file: str) -> GraphInfo:
            relative = f"{GRAPH_FOLDER}/{file}"
            write_onnx(graph, folder / relative, store)
            return graph_info(graph, relative, folder)

        # Of the general form the steady one is made without another capture.
        for source in graph_sources(model, config, replace(PLAIN, attention="triton")):
            report(source.name)
            graph = onnx_model(source)
            portable[source.name] = write(graph, f"{source.name}.onnx")
            if source.name != "step":
                continue
            if config.dtype != "bfloat16":  # ONNX Runtime does not run it on a CPU.
                own = graph.clone()
                fuse_attention(own, config)
                fused["step"] = write(own, "step.onnxruntime.onnx")
            steady = steady_name("step")
            portable[steady] = write(make_steady_(graph, config), f"{steady}.onnx")
    return portable, fused


def graph_info(graph: ir.Model, relative: str, folder: Path) -> GraphInfo:
    """What the manifest says about a graph that was written to `folder`."""

    def infos(values: Any) -> tuple[TensorInfo, ...]:
        return tuple(
            TensorInfo(value.name, tuple(value.shape.numpy()), BY_ONNX[value.dtype.name].name)
            for value in values
        )

    inputs, outputs = infos(graph.graph.inputs), infos(graph.graph.outputs)
    return GraphInfo(relative, sha256_of(folder / relative), inputs, outputs)


def write_manifest(manifest: Manifest, folder: Path) -> Manifest:
    """Write `manifest.json` atomically, with its digest.

    Returns:
        The manifest as written.
    """
    sealed = manifest.sealed()
    text = json.dumps(sealed.to_json(), indent=1) + "\n"
    write_file(folder / MANIFEST_FILE, text.encode())
    return sealed
