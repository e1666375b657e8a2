"""A graph to a TensorRT plan from the torch side, through Torch-TensorRT.

Written to the documented interface of `convert_exported_program_to_serialized_trt_engine` (releases
for TensorRT 10 and 11); our operators are converted to our plugins
(`plugins/bind/torch_tensorrt.py`). The engine's tensors carry Torch-TensorRT's names; the runtime
binds them by position.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from forcing_kv.export.tensorrt.builder import BuildLog, BuiltPlan
from forcing_kv.export.tensorrt.options import EngineOptions
from forcing_kv.runtime_trt.bundle.manifest import Manifest
from forcing_kv.runtime_trt.errors import ForcingKvError, MissingDependencyError


def build_plan_from_torch(
    bundle: Path, manifest: Manifest, graph: str, options: EngineOptions
) -> BuiltPlan:
    """Export one graph of the bundle's model again and convert it.

    Args:
        bundle: directory of the bundle, for the weights.
        graph: prompt, step or evict.

    Raises:
        MissingDependencyError: Torch-TensorRT is not installed.
        ForcingKvError: it cannot convert the graph; with its own words.
    """
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise MissingDependencyError(
            "--frontend torch-tensorrt needs the Python package torch-tensorrt, which is not "
            "installed; `pip install torch-tensorrt` (the release that fits your torch), or leave "
            "the option out",
            name="torch_tensorrt",
        )
    import torch
    import torch_tensorrt

    from forcing_kv.export.bundle.read import read_bundle_weights
    from forcing_kv.export.model.capture import graph_sources
    from forcing_kv.export.tensorrt.plugins import register_once
    from forcing_kv.plugins.bind.torch_tensorrt import register_converters

    register_once(register_converters, options)
    model = read_bundle_weights(bundle, manifest).model.to("cuda")
    source = next(s for s in graph_sources(model, manifest.config) if s.name == graph)
    arguments = torch.utils._pytree.tree_map(lambda tensor: tensor.cuda(), source.arguments)
    try:
        plan = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            source.capture(), arg_inputs=arguments, **_settings(options)
        )
    except Exception as error:
        raise ForcingKvError(f"Torch-TensorRT could not convert graph {graph}: {error}") from error
    return BuiltPlan(bytes(plan), BuildLog())


def _settings(options: EngineOptions) -> dict[str, Any]:
    """Our options by Torch-TensorRT's names; those left to it are left out."""
    settings: dict[str, Any] = {
        "use_explicit_typing": True,
        "disable_tf32": not options.tf32,
        "max_aux_streams": 0,
        "require_full_compilation": True,
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware_compatible,
        "immutable_weights": not options.refit,
    }
    if options.optimization_level is not None:
        settings["optimization_level"] = options.optimization_level
    if options.workspace_gb is not None:
        settings["workspace_size"] = int(options.workspace_gb * 2**30)
    return settings
