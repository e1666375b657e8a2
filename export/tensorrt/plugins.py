"""Registers our operators as TensorRT plugins for a build, and sees that they are used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from forcing_kv.export.tensorrt.options import EngineOptions
from forcing_kv.plugins.bind.tensorrt import TargetDevice
from forcing_kv.plugins.compile.launch import PORTABLE_SM
from forcing_kv.plugins.op_spec import DOMAIN
from forcing_kv.plugins.registry import NODES
from forcing_kv.runtime_trt.cuda.runtime import Cuda
from forcing_kv.runtime_trt.errors import ForcingKvError

Register = Callable[[TargetDevice], object]

_registered: dict[Register, TargetDevice] = {}


def register_once(register: Register, options: EngineOptions) -> None:
    """Register every operator, once per process, as TensorRT's registry wants it.

    Args:
        register: `register_tensorrt_plugins`, or `register_converters` for Torch-TensorRT.
        options: how to build. The kernels of a hardware-compatible engine are portable too: PTX for
            one architecture does not run on those before it.

    Raises:
        MissingDependencyError: TensorRT or Triton is not installed.
        BackendUnavailableError: there is no GPU to build for.
        ForcingKvError: this process has registered them for other engines.
    """
    device = Cuda().device
    compatible = options.hardware_compatible
    sm = PORTABLE_SM if compatible else device.sm
    portable = compatible or options.portable_kernels
    target = TargetDevice(sm, device.num_sms, portable_only=portable)
    if register not in _registered:
        register(target)
        _registered[register] = target
    if (known := _registered[register]) != target:
        raise ForcingKvError(
            f"this process has registered plugins for {known}, and TensorRT keeps them; build for "
            f"{target} in another"
        )


def check_plugin_layers(trt: Any, network: Any, path: Path) -> int:
    """See that each of our nodes has become a plugin: a parser that knows none takes its body.

    Args:
        trt: TensorRT's module.
        network: what the parser made of the graph.
        path: the graph.

    Returns:
        Number of plugins.

    Raises:
        ForcingKvError: a node has become other layers; names such nodes.
    """
    known = {spec.name for spec in NODES}
    graph = onnx.load(path, load_external_data=False).graph
    wanted = [n.name for n in graph.node if n.domain == DOMAIN and n.op_type in known]
    layers = map(network.get_layer, range(network.num_layers))
    plugins = [layer.name for layer in layers if layer.type == trt.LayerType.PLUGIN_V3]
    if len(plugins) < len(wanted):
        missing = [name for name in wanted if name not in plugins] or wanted
        raise ForcingKvError(
            f"{path.name}: {len(plugins)} of {len(wanted)} custom nodes became plugins; the "
            f"parser took the slow float32 bodies of {missing[:3]} ({len(missing)}). Build with "
            "the TensorRT of `pip install 'forcing-kv[trt]'`, or with --frontend torch-tensorrt"
        )
    return len(plugins)
