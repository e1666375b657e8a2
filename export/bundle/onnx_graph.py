"""Exported programs to ONNX files whose weights all lie in one shared file."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import rewriter
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter.rules.common import slice_split_rule
from torch._export import utils as export_utils
from torch.fx import config as fx_config

from forcing_kv.export.model.capture import GraphSource
from forcing_kv.export.model.fp8 import onnx_decomposition as fp8_decomposition
from forcing_kv.plugins.bind.torch_library import onnx_decompositions
from forcing_kv.plugins.op_spec import DOMAIN
from forcing_kv.plugins.registry import OPSET, onnx_functions

INLINE_NBYTES = 1024
"""Larger constants go to the shared weight file."""
ALIGNMENT = 4096
"""Tensors start on a page, so that a runtime can map them."""

_OPTIMIZER_ROUNDS = 2
"""Folding makes rewrites possible and the other way round; as often as the exporter's default."""

_REWRITE_RULES = [
    rule for rule in getattr(rewriter, "_DEFAULT_REWRITE_RULES", ()) if rule is not slice_split_rule
] or None
"""ONNX Script's default rules but the one that tries every pair of slices of the graph for every
slice: half of the time of all rules at four layers, growing with the square of the layers; no graph
of this project has such a pair. Where the private name is gone, the default rules."""

_NOT_FOLDED = ("Cast", "Transpose", "DequantizeLinear")
"""Folding these would copy weights under new names: unshared, and lost to who reads them back."""


@dataclass
class WeightStore:
    """Writes every distinct tensor once, keyed by its content.

    Args:
        name: its name, relative to the ONNX files.
        folder: where it lies.
    """

    file: BinaryIO
    name: str
    folder: Path
    _entries: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    def holds(self, tensor: ir.TensorProtocol) -> bool:
        """Whether `tensor` is such a reference."""
        return isinstance(tensor, ir.ExternalTensor) and tensor.location == self.name

    def add(self, tensor: ir.TensorProtocol, name: str) -> ir.ExternalTensor:
        """Store `tensor` and return a reference to it."""
        content = tensor.tobytes()
        key = (hashlib.sha256(content).hexdigest(), str(tensor.dtype))
        if key not in self._entries:
            self.file.seek(-(-self.file.tell() // ALIGNMENT) * ALIGNMENT)
            self._entries[key] = (self.file.tell(), len(content))
            self.file.write(content)
        offset, length = self._entries[key]
        shape = ir.Shape(tensor.shape.numpy())
        return ir.ExternalTensor(
            self.name, offset, length, tensor.dtype, shape=shape, name=name, base_dir=self.folder
        )


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's notes on packages and types that this project does not use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


@cache
def _parse_functions_once() -> None:
    """Keep what the exporter reads of ONNX's 557 functions for the next graph.

    That is 0.7 to 1 s of processor time a graph (torch 2.13 on one core of a server). The names
    are private to PyTorch: in a release without them, each graph reads them again.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from torch.onnx._internal._lazy_import import onnxscript_apis  # type: ignore[attr-defined]
        from torch.onnx._internal.exporter import _schemas

        onnxscript_apis.get_torchlib_ops = cache(onnxscript_apis.get_torchlib_ops)
        _schemas.op_signature_from_function = cache(_schemas.op_signature_from_function)


@contextlib.contextmanager
def _lean_tracing() -> Iterator[None]:
    """Spare what PyTorch does for each node and namespace and nobody here reads: a seventh.

    That are stack traces of nodes, and a list of composite operators that it makes again for each
    of its 28 namespaces. Where a release has no such setting or function, all is as it was.
    """
    listed = "_materialize_cpp_cia_ops"
    spared: list[tuple[Any, str, Any]] = [(fx_config, "do_not_emit_stack_traces", True)]
    if hasattr(export_utils, listed):
        spared.append((export_utils, listed, cache(getattr(export_utils, listed))))
    before = [getattr(module, name, None) for module, name, _ in spared]
    try:
        for module, name, value in spared:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(spared, before, strict=True):
            setattr(module, name, value)


class _Captured(torch.export.ExportedProgram):
    """A captured program that takes this project's operators along in any decomposition.

    The exporter decomposes what it is given: a decomposition of one's own before that would trace
    the whole graph once more.
    """

    def run_decompositions(
        self, decomp_table: dict[Any, Callable[..., Any]] | None = None, **options: Any
    ) -> torch.export.ExportedProgram:
        own = onnx_decompositions() | fp8_decomposition()
        table = torch.export.default_decompositions() if decomp_table is None else decomp_table
        return super().run_decompositions({**table, **own}, **options)


def onnx_model(source: GraphSource) -> ir.Model:
    """Translate one graph: custom nodes with function bodies attached, constants folded."""
    _parse_functions_once()
    with _quiet_exporter(), _lean_tracing():
        program = source.capture()
        program.__class__ = _Captured
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            input_names=list(source.input_names),
            output_names=list(source.output_names),
            verbose=False,
        )
    assert exported is not None
    model = exported.model
    _optimize(model, program.graph_signature.parameters)
    attach_functions(model)
    model.producer_name, model.producer_version = "forcing_kv", ""
    _strip_metadata(model)
    return model


def attach_functions(model: ir.Model) -> None:
    """Give the custom nodes their bodies in standard operators, and drop those of no node."""
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    for function in onnx_functions(OPSET):
        if function.name in used:
            body = cast(ir.Function, ir.from_proto(function))
            model.functions[body.identifier()] = body


def _optimize(model: ir.Model, parameters: Collection[str]) -> None:
    """Fold constants, drop what is unused, merge what is equal; all `parameters` keep their names.

    These are the passes of `onnxscript.optimizer.optimize_ir`, which merges parameters too: of two
    that are equal, as biases of zeros are, only one could be read back from the bundle.
    """
    for _ in range(_OPTIMIZER_ROUNDS):
        fold_constants_ir(
            model,
            onnx_shape_inference=True,
            should_fold=lambda node: False if node.op_type in _NOT_FOLDED else None,
        )
        before = list(model.graph)
        rewriter.rewrite(model, _REWRITE_RULES)
        if list(model.graph) == before:
            break
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _merge_equal_constants(model.graph, parameters)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.OutputFixPass()(model)
    passes.NameFixPass()(model)


def _merge_equal_constants(graph: ir.Graph, kept: Collection[str]) -> None:
    """Give equal initializers one name, but for those that are `kept`."""
    seen: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None, f"initializer {name} has no value"
        if name in kept:
            continue
        key = (tensor.dtype.name, tuple(tensor.shape.numpy()), tensor.tobytes())
        first = seen.setdefault(key, value)
        if first is not value and not value.is_graph_output():
            value.replace_all_uses_with(first)
            graph.initializers.pop(name)


def _strip_metadata(model: ir.Model) -> None:
    """Remove what the exporter left: source paths, stack traces, type-system notes."""
    holders: list[Any] = [model, model.graph, *model.functions.values()]
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        holders += [*graph.inputs, *graph.outputs]
        for node in graph:
            holders += [node, *node.outputs]
    holders += list(model.graph.initializers.values())
    for holder in holders:
        holder.metadata_props.clear()
        if hasattr(holder, "doc_string"):
            holder.doc_string = None


def write_onnx(model: ir.Model, path: Path, weights: WeightStore) -> None:
    """Write a model with its large constants in the shared weight file, and check it.

    Raises:
        onnx.checker.ValidationError: the model is not valid ONNX (a defect of the exporter).
    """
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None, f"initializer {name} has no value"
        if tensor.nbytes > INLINE_NBYTES and not weights.holds(tensor):
            value.const_value = weights.add(tensor, name)
    weights.file.flush()
    onnx.save(ir.to_proto(model), path)
    onnx.checker.check_model(path, full_check=False)
