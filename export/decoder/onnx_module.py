"""A decode graph of a bundle as a PyTorch module again, for PyTorch's own compiler.

The bundle holds a decoder as ONNX graphs alone. Those use a few standard operators with fixed
shapes, so they are read back node by node: what is compiled is what the bundle holds, whatever
model it came from, and its weights are the bundle's bytes.

Nothing else does this. PyTorch reads no ONNX; `onnx.reference` computes with numpy, which cannot be
compiled; and to capture the decoder again, `fkv build` would need its checkpoint and its packages.
`fkv verify --decoder` runs the same module uncompiled as its reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forcing_kv.export.bundle.read import weight_entry
from forcing_kv.runtime_trt.bundle.constants import ConstantEntry
from forcing_kv.runtime_trt.dtypes import BY_ONNX
from forcing_kv.runtime_trt.errors import BundleError


class OnnxModule(nn.Module):
    """Runs an ONNX graph of fixed shapes with PyTorch's operators.

    Args:
        path: ONNX file; its weights lie beside it.
        weights_file: the same weights as a path within the bundle.

    Raises:
        BundleError: the graph has an operator that a decoder has not.
    """

    def __init__(self, path: Path, weights_file: str) -> None:
        super().__init__()
        graph = ir.load(path).graph
        self.entries: dict[str, ConstantEntry] = {}
        """Where each larger weight lies in the bundle, by buffer name."""
        self._inputs = [str(value.name) for value in graph.inputs]
        self._outputs = [str(value.name) for value in graph.outputs]
        self._buffer_of: dict[str, str] = {}
        self._nodes: list[ir.Node] = []
        known: dict[str, Tensor] = {}
        for name, value in graph.initializers.items():
            assert value.const_value is not None, f"initializer {name} has no value"
            tensor = torch.from_numpy(value.const_value.numpy().copy())
            if isinstance(value.const_value, ir.ExternalTensor):
                buffer = _buffer_name(name)
                self._hold(name, buffer, tensor)
                shape = tuple(tensor.shape)
                self.entries[buffer] = weight_entry(value.const_value, weights_file, shape)
            else:
                known[name] = tensor
        for node in graph:
            if node.op_type not in _OPERATORS:
                raise BundleError(
                    f"{path}: node {node.name} is a {node.op_type}, which is no operator of a "
                    f"decoder ({', '.join(_OPERATORS)}); add the decoder again"
                )
            if all(value is None or value.name in known for value in node.inputs):
                known |= self._run(node, known)
            else:
                self._nodes.append(node)
        self._static: dict[str, Any] = {}
        """Shapes, axes and scalars as plain numbers, so that the compiler has none to store."""
        scales = {node.inputs[2].name for node in graph if node.op_type == "Resize"}  # type: ignore[union-attr]
        for name, tensor in known.items():
            if tensor.numel() == 1:
                self._static[name] = tensor.item()
            elif name in scales or not tensor.is_floating_point():
                self._static[name] = tensor.tolist()
            else:
                # Only names of weights mean the same in every graph of a decoder.
                self._hold(name, f"{path.stem}__{_buffer_name(name)}", tensor)

    def in_float32(self) -> OnnxModule:
        """Compute in float32 from now on, whatever the graph says; changes and returns itself."""
        self.float()
        for node in self._nodes:
            if node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
        return self

    def _hold(self, name: str, buffer: str, tensor: Tensor) -> None:
        self._buffer_of[name] = buffer
        self.register_buffer(buffer, tensor)

    def forward(self, latents: Tensor, state: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        """Run the graph.

        Args:
            latents: its first input.
            state: the others, in order.

        Returns:
            Its first output, and the others in order.
        """
        values: dict[str, Any] = dict(self._static)
        values |= {name: self.get_buffer(buffer) for name, buffer in self._buffer_of.items()}
        values |= dict(zip(self._inputs, (latents, *state), strict=True))
        for node in self._nodes:
            values |= self._run(node, values)
        frames, *new_state = (values[name] for name in self._outputs)
        return frames, new_state

    @staticmethod
    def _run(node: ir.Node, values: Mapping[str, Any]) -> dict[str, Any]:
        inputs = [None if value is None else values[str(value.name)] for value in node.inputs]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        attributes["num_outputs"] = len(node.outputs)
        made = _OPERATORS[node.op_type](inputs, attributes)
        outputs = made if isinstance(made, tuple | list) else [made]
        names = [str(value.name) for value in node.outputs]
        return dict(zip(names, outputs, strict=True))


def _buffer_name(name: str) -> str:
    return name.replace(".", "__")


_Operator = Callable[[list[Any], dict[str, Any]], Any]
"""Inputs, of which static ones are tensors while constants are folded and plain numbers later."""


def _numbers(value: Any) -> list[int]:
    """A static shape, axis list or index."""
    plain = value.tolist() if isinstance(value, Tensor) else value
    return [int(number) for number in (plain if isinstance(plain, list) else [plain])]


def _binary(function: Callable[[Any, Any], Tensor]) -> _Operator:
    return lambda inputs, _: function(*inputs)


def _unary(function: Callable[[Any], Tensor]) -> _Operator:
    return lambda inputs, _: function(inputs[0])


def _cast(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    value: Tensor = inputs[0]
    return value.to(getattr(torch, BY_ONNX[ir.DataType(attributes["to"]).name].name))


def _conv(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    x, weight, *bias = inputs
    num_axes = weight.ndim - 2
    pads = list(attributes["pads"])
    begin, end = pads[:num_axes], pads[num_axes:]
    assert attributes.get("auto_pad", "NOTSET") == "NOTSET", "the exporter writes explicit padding"
    if begin != end:
        x = F.pad(x, _both_sides(begin, end))
        begin = [0] * num_axes
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[num_axes - 1]
    steps = {"stride": list(attributes["strides"]), "dilation": list(attributes["dilations"])}
    return function(x, weight, *bias, padding=begin, groups=attributes["group"], **steps)


def _clip(inputs: list[Any], _: dict[str, Any]) -> Tensor:
    x, low, high = [*inputs, None][:3]
    return torch.clamp(x, low, high)


def _expand(inputs: list[Any], _: dict[str, Any]) -> Tensor:
    x: Tensor = inputs[0]
    return x.expand(torch.broadcast_shapes(x.shape, _numbers(inputs[1])))


def _gather(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    x, index = inputs
    (place,) = _numbers(index)
    return x.select(attributes["axis"], place)


def _norm(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    x, axes = inputs
    return torch.linalg.vector_norm(x, dim=_numbers(axes), keepdim=bool(attributes["keepdims"]))


def _pad(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    assert attributes["mode"] == "constant", "decoders pad with zeros"
    pads = _numbers(inputs[1])
    num_axes = len(pads) // 2
    return F.pad(inputs[0], _both_sides(pads[:num_axes], pads[num_axes:]))


def _both_sides(begin: Sequence[int], end: Sequence[int]) -> list[int]:
    """Padding as PyTorch takes it: last axis first."""
    pairs = zip(reversed(begin), reversed(end), strict=True)
    return [number for pair in pairs for number in pair]


def _reshape(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    x, shape = inputs[0], _numbers(inputs[1])
    if not attributes.get("allowzero", 0):
        shape = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return x.reshape(shape)


def _resize(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    names = ("mode", "coordinate_transformation_mode", "nearest_mode")
    how = tuple(attributes[name] for name in names)
    assert how == ("nearest", "asymmetric", "floor"), f"decoders do not resize by {how}"
    factors = inputs[2]
    assert factors[:2] == [1.0, 1.0], "batch and channels are not resized"
    return F.interpolate(inputs[0], scale_factor=factors[2:], mode="nearest")


def _slice(inputs: list[Any], _: dict[str, Any]) -> Tensor:
    x, starts, ends, axes, *steps = inputs
    index = [slice(None)] * x.ndim
    strides = _numbers(steps[0]) if steps else [1] * len(_numbers(axes))
    for start, end, axis, step in zip(
        _numbers(starts), _numbers(ends), _numbers(axes), strides, strict=True
    ):
        index[axis] = slice(start, end, step)
    return x[tuple(index)]


def _split(inputs: list[Any], attributes: dict[str, Any]) -> Sequence[Tensor]:
    x, *sizes = inputs
    axis, count = attributes["axis"], attributes["num_outputs"]
    return x.split(_numbers(sizes[0]), axis) if sizes else x.split(-(-x.shape[axis] // count), axis)


def _squeeze(inputs: list[Any], _: dict[str, Any]) -> Tensor:
    x: Tensor = inputs[0]
    return x.squeeze(_numbers(inputs[1]))


def _unsqueeze(inputs: list[Any], _: dict[str, Any]) -> Tensor:
    x: Tensor = inputs[0]
    axes = _numbers(inputs[1])
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


_OPERATORS: Mapping[str, _Operator] = {
    "Add": _binary(torch.add),
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda inputs, attributes: torch.cat(inputs, attributes["axis"]),
    "Conv": _conv,
    "Div": _binary(torch.div),
    "Expand": _expand,
    "Gather": _gather,
    "MatMul": _binary(torch.matmul),
    "Max": lambda inputs, _: torch.clamp(inputs[0], min=inputs[1]),
    "Min": lambda inputs, _: torch.clamp(inputs[0], max=inputs[1]),
    "Mul": _binary(torch.mul),
    "Pad": _pad,
    "ReduceL2": _norm,
    "Relu": _unary(torch.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Sigmoid": _unary(torch.sigmoid),
    "Slice": _slice,
    "Softmax": lambda inputs, attributes: torch.softmax(inputs[0], attributes["axis"]),
    "Split": _split,
    "Sqrt": _unary(torch.sqrt),
    "Squeeze": _squeeze,
    "Tanh": _unary(torch.tanh),
    "Transpose": lambda inputs, attributes: inputs[0].permute(*attributes["perm"]),
    "Unsqueeze": _unsqueeze,
}
