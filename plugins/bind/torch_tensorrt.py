"""Converters of the torch operators for Torch-TensorRT.

Torch-TensorRT converts an operator by the TensorRT plugin of the same namespace and name, so each
operator is registered a second time, under its torch name. Written to the documented interface of
`torch_tensorrt.dynamo.conversion.plugins.generate_plugin_converter`; operators with several
outputs need a release whose generated converter returns all of them.
"""

from __future__ import annotations

import importlib

from forcing_kv.plugins.bind import torch_library  # noqa: F401 (it defines the operators)
from forcing_kv.plugins.bind.tensorrt import TargetDevice, register_plugin
from forcing_kv.plugins.registry import OPS


def register_converters(device: TargetDevice) -> tuple[str, ...]:
    """Register every operator's plugin and converter, once per process.

    Returns:
        Identifiers of the plugins, which are the torch operators' names.

    Raises:
        MissingDependencyError: TensorRT is not installed.
        ModuleNotFoundError: Torch-TensorRT is not installed.
    """
    plugins = importlib.import_module("torch_tensorrt.dynamo.conversion.plugins")
    registered = []
    for spec in OPS:
        plugin_id = register_plugin(spec, device, spec.torch_name)
        plugins.generate_plugin_converter(
            plugin_id, supports_dynamic_shapes=False, use_aot_if_available=True
        )
        registered.append(plugin_id)
    return tuple(registered)
