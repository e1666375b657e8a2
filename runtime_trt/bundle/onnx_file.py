"""What an ONNX file says of its inputs, outputs and outside weights, without the `onnx` package.

An ONNX graph names the files of its larger tensors itself, and every engine would open what it
names. So the file is read here first: its ports are compared with the manifest's, and a tensor that
lies anywhere but in the one weight file, whose hash is recorded, is refused. ONNX Runtime is then
given the bytes, and opens nothing.

A file is a tree of protocol-buffer messages (onnx/onnx.proto3 of ONNX 1.18); the few fields that
matter are read, and the others are walked through for tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import PurePosixPath

from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo, TensorInfo
from forcing_kv.runtime_trt.dtypes import BY_ONNX_CODE, ElementType
from forcing_kv.runtime_trt.errors import BundleError

Value = int | memoryview
"""Of a field: a number, or the bytes of a text or a message."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_DEPTH = 32
"""Graphs within graphs."""

_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 20, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_SPARSE = 1, 5, 11, 12, 15
_TENSOR_DIMS, _TENSOR_DTYPE, _TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 8, 13, 14
_NODE_ATTRIBUTE, _FUNCTION_NODE, _FUNCTION_ATTRIBUTE = 5, 7, 11
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE = (22, 23)
_SPARSE_PARTS = (1, 2)


@dataclass(frozen=True)
class OutsideTensor:
    """An initializer whose bytes lie in the weight file."""

    name: str
    element: ElementType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class OnnxFile:
    """Ports and outside weights of a graph."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    weights_file: str
    """Path within the bundle of the file in which they lie."""
    outside: tuple[OutsideTensor, ...]


def read_onnx(
    content: bytes, graph: GraphInfo, weights_file: str, weights_nbytes: int, where: str
) -> OnnxFile:
    """Read a graph and compare it with what the manifest says of it.

    Args:
        content: of the ONNX file.
        weights_file: path within the bundle of the one file that its tensors may lie in.
        weights_nbytes: size of that file.
        where: the file's name, for messages.

    Raises:
        BundleError: it is no ONNX graph, has other inputs or outputs, or needs another file.
    """
    try:
        weights = PurePosixPath(weights_file).relative_to(PurePosixPath(graph.file).parent)
        found = _read_model(memoryview(content), str(weights), weights_file)
        for tensor in found.outside:
            if tensor.offset + tensor.nbytes > weights_nbytes:
                raise ValueError(f"tensor {tensor.name!r} ends beyond the end of {weights_file}")
    except ValueError as error:
        raise BundleError(f"{where}: {error}; export the bundle again") from error
    for kind, has, needs in (
        ("inputs", found.inputs, graph.inputs),
        ("outputs", found.outputs, graph.outputs),
    ):
        if has != needs:
            raise BundleError(
                f"{where}: the {kind} of this graph differ from the manifest: "
                f"{_difference(has, needs)}; export the bundle again"
            )
    return found


def _difference(has: tuple[TensorInfo, ...], needs: tuple[TensorInfo, ...]) -> str:
    if len(has) != len(needs):
        return f"{len(has)} in the file, {len(needs)} in the manifest"
    return next(
        f"{found.name} {list(found.shape)} {found.dtype} in the file, "
        f"{wanted.name} {list(wanted.shape)} {wanted.dtype} in the manifest"
        for found, wanted in zip(has, needs, strict=True)
        if found != wanted
    )


def _read_model(model: memoryview, location: str, weights_file: str) -> OnnxFile:
    fields = _fields(model)
    graph = _fields(_message(_one(fields, _MODEL_GRAPH)))
    outside = []
    for tensor in graph.pop(_GRAPH_INITIALIZER, ()):
        if found := _outside(_fields(_message(tensor)), location):
            outside.append(found)
    _require_inside(graph, 0)
    if _MODEL_TRAINING in fields:
        raise ValueError("a graph for training")
    for function in fields.get(_MODEL_FUNCTIONS, ()):
        parts = _fields(_message(function))
        _require_nodes_inside(parts.get(_FUNCTION_NODE, []), 0)
        _require_attributes_inside(parts.get(_FUNCTION_ATTRIBUTE, []), 0)
    inputs, outputs = (
        tuple(_port(_fields(_message(port))) for port in graph.get(kind, ()))
        for kind in (_GRAPH_INPUT, _GRAPH_OUTPUT)
    )
    return OnnxFile(inputs, outputs, weights_file, tuple(outside))


def _outside(tensor: Mapping[int, list[Value]], location: str) -> OutsideTensor | None:
    """What is said of an initializer; None for one whose bytes lie in the graph."""
    if not (_TENSOR_EXTERNAL in tensor or any(tensor.get(_TENSOR_LOCATION, ()))):
        return None
    name = _text(_one(tensor, _TENSOR_NAME))
    entries = {}
    for entry in tensor.get(_TENSOR_EXTERNAL, ()):
        pair = _fields(_message(entry))
        key = _text(_one(pair, 1))
        if key in entries:
            raise ValueError(f"tensor {name!r} has two entries {key!r}")
        entries[key] = _text(_one(pair, 2))
    if (found := entries.get("location")) != location:
        raise ValueError(
            f"tensor {name!r} lies in {found!r}, but only {location} is of this bundle"
        )
    shape = _dims(tensor.get(_TENSOR_DIMS, ()))
    element = _element(_one(tensor, _TENSOR_DTYPE))
    offset, nbytes = (_natural(entries.get(key, "0")) for key in ("offset", "length"))
    if nbytes != prod(shape) * element.nbytes:
        raise ValueError(
            f"tensor {name!r} has {nbytes} bytes, but is {element.name} of {list(shape)}"
        )
    return OutsideTensor(name, element, shape, offset, nbytes)


def _require_inside(graph: Mapping[int, list[Value]], depth: int) -> None:
    """Refuse tensors of a graph, its nodes and the graphs in them that lie outside."""
    for tensor in graph.get(_GRAPH_INITIALIZER, ()):
        _require_tensor_inside(tensor)
    for sparse in graph.get(_GRAPH_SPARSE, ()):
        _require_sparse_inside(sparse)
    _require_nodes_inside(graph.get(_GRAPH_NODE, []), depth)


def _require_nodes_inside(nodes: list[Value], depth: int) -> None:
    for node in nodes:
        _require_attributes_inside(_fields(_message(node)).get(_NODE_ATTRIBUTE, []), depth)


def _require_attributes_inside(attributes: list[Value], depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"more than {_MAX_DEPTH} graphs within one another")
    for attribute in attributes:
        parts = _fields(_message(attribute))
        for kind in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
            for tensor in parts.get(kind, ()):
                _require_tensor_inside(tensor)
        for kind in _ATTRIBUTE_SPARSE:
            for sparse in parts.get(kind, ()):
                _require_sparse_inside(sparse)
        for kind in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
            for graph in parts.get(kind, ()):
                _require_inside(_fields(_message(graph)), depth + 1)


def _require_sparse_inside(sparse: Value) -> None:
    parts = _fields(_message(sparse))
    for kind in _SPARSE_PARTS:
        for tensor in parts.get(kind, ()):
            _require_tensor_inside(tensor)


def _require_tensor_inside(tensor: Value) -> None:
    parts = _fields(_message(tensor))
    if _TENSOR_EXTERNAL in parts or any(parts.get(_TENSOR_LOCATION, ())):
        raise ValueError("a constant within a node lies in another file")


def _port(value_info: Mapping[int, list[Value]]) -> TensorInfo:
    tensor = _fields(_message(_one(_fields(_message(_one(value_info, 2))), 1)))
    shape = _fields(_message(_one(tensor, 2)))
    axes = [_fields(_message(axis)) for axis in shape.get(1, ())]
    sizes = _dims([_one(axis, 1) for axis in axes])
    return TensorInfo(_text(_one(value_info, 1)), sizes, _element(_one(tensor, 1)).name)


def _element(code: Value) -> ElementType:
    if not isinstance(code, int) or code not in BY_ONNX_CODE:
        raise ValueError(f"a tensor has the unknown element type {code!r}")
    return BY_ONNX_CODE[code]


def _dims(values: list[Value] | tuple[()]) -> tuple[int, ...]:
    """Sizes, one by one or packed into bytes."""
    found: list[int] = []
    for value in values:
        if isinstance(value, int):
            found.append(value)
            continue
        at = 0
        while at < len(value):
            size, at = _varint(value, at)
            found.append(size)
    if any(size >= 1 << 50 for size in found):
        raise ValueError(f"a tensor has the shape {found}")
    return tuple(found)


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise ValueError(f"{text[:20]!r} is no number of bytes")
    return int(text)


def _fields(message: memoryview) -> dict[int, list[Value]]:
    """Values of a message by the number of their field, in their order.

    Raises:
        ValueError: it is no message.
    """
    found: dict[int, list[Value]] = {}
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        value: Value
        if kind == _VARINT:
            value, at = _varint(message, at)
        else:
            if kind == _BYTES:
                size, at = _varint(message, at)
            elif kind in (_FIXED32, _FIXED64):
                size = 4 if kind == _FIXED32 else 8
            else:
                raise ValueError(f"no ONNX file: field of kind {kind}")
            value, at = message[at : at + size], at + size
            if at > end:
                raise ValueError("no ONNX file, or a truncated one")
        found.setdefault(number, []).append(value)
    return found


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number that begins at a byte, and where it ends."""
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("no ONNX file, or a truncated one")


def _one(fields: Mapping[int, list[Value]], number: int) -> Value:
    """The value of a field that must be there, once: readers join what is there twice."""
    values = fields.get(number, ())
    if len(values) != 1:
        raise ValueError(f"no ONNX graph: field {number} is there {len(values)} times")
    return values[0]


def _message(value: Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("no ONNX file: a number in place of a message")
    return value


def _text(value: Value) -> str:
    return str(_message(value), "utf-8")
