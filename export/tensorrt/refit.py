"""Engines of one bundle with the weights of another: refitted, not built again.

For a fine-tune of the same model: `fkv build NEW --refit-from OLD` takes the engines that
`fkv build OLD --refit` made. TensorRT knows weights by the names of the graph that the builder was
given, so both graphs are compared first, and every weight is given to the engine under its name.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from forcing_kv.export.bundle.read import weight_entry
from forcing_kv.export.tensorrt.options import EngineOptions
from forcing_kv.runtime_trt.bundle.constants import map_constants
from forcing_kv.runtime_trt.dtypes import BY_ONNX
from forcing_kv.runtime_trt.errors import ForcingKvError, require
from forcing_kv.runtime_trt.tensorrt.engine import EngineLog
from forcing_kv.runtime_trt.tensorrt.refit import NamedWeight, refit

_WAY_OUT = "build it without --refit-from"


def refitted_plan(plan: Path, old: Path, new: Path, options: EngineOptions) -> bytes:
    """An engine with other weights.

    Args:
        plan: the engine, built from `old` as refittable.
        old: ONNX file, as given to its builder.
        new: the same graph with other weights.
        options: those that it was built with.

    Returns:
        The new engine, refittable too.

    Raises:
        ForcingKvError: the graphs differ in more than weights, or in weights that the engine does
            not let be replaced; or TensorRT gives up, with its own words.
    """
    if graph_without_weights(old) != graph_without_weights(new):
        raise ForcingKvError(
            f"{new.name}: it differs from the graph of {plan} in more than weights; {_WAY_OUT}"
        )
    before, after = graph_weights(old), graph_weights(new)
    changed = {
        name
        for name, weight in after.items()
        if not np.array_equal(weight.content, before[name].content)
    }
    if not changed:
        return plan.read_bytes()
    trt = require(options.module)
    log = EngineLog(trt)
    runtime = trt.Runtime(log.logger)
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise ForcingKvError(f"{plan}: it cannot be loaded ({log.last()}); {_WAY_OUT}")
    replaceable = set(trt.Refitter(engine, log.logger).get_all_weights())
    if fixed := sorted(changed - replaceable):
        raise ForcingKvError(
            f"{new.name}: weights have changed that {plan} does not let be replaced: {fixed[:3]} "
            f"({len(fixed)}); {_WAY_OUT}"
        )
    weights = (weight for name, weight in after.items() if name in replaceable)
    if (wrong := refit(trt, engine, log.logger, weights)) is not None:
        raise ForcingKvError(f"{new.name}: {wrong} by {plan} ({log.last()}); {_WAY_OUT}")
    config = engine.create_serialization_config()
    config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    content = engine.serialize_with_config(config)
    if content is None:
        raise ForcingKvError(f"{new.name}: {plan} cannot be written ({log.last()}); {_WAY_OUT}")
    return bytes(content)


def graph_without_weights(path: Path) -> bytes:
    """An ONNX file with nothing but names, shapes and dtypes left of its initializers."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        known = {"name": tensor.name, "dims": tensor.dims, "data_type": tensor.data_type}
        tensor.CopyFrom(onnx.TensorProto(**known))
    return model.SerializeToString(deterministic=True)


def graph_weights(path: Path) -> dict[str, NamedWeight]:
    """Every initializer of a graph; large ones stay mapped to the weight file beside it."""
    found = {}
    for name, value in ir.load(path).graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None, f"initializer {name} has no value"
        shape = tuple(tensor.shape.numpy())
        if isinstance(tensor, ir.ExternalTensor):
            table = {name: weight_entry(tensor, str(tensor.location), shape)}
            ((_, _, content),) = map_constants(path.parent, table)
        else:
            content = np.frombuffer(tensor.tobytes(), np.uint8)
        found[name] = NamedWeight(name, BY_ONNX[tensor.dtype.name].name, prod(shape), content)
    return found
