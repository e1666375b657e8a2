"""What an operator is, said once: names, shapes, dtypes, attributes, tolerance class.

The reference, the torch operator, the ONNX body, the TensorRT plugin and the tests all read the
same `OpSpec`, so that a shape or an attribute stands in one place.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

DOMAIN = "forcing_kv"
"""ONNX domain, torch library namespace and TensorRT plugin namespace of every operator."""

VERSION = 1
"""Version of every operator in the ONNX domain and in the TensorRT registry."""

PLUGIN_ATTRIBUTES: dict[str, int | str] = {
    "plugin_namespace": DOMAIN,
    "plugin_version": str(VERSION),
    "aot": 1,
}
"""Node attributes by which TensorRT's ONNX parser finds a plugin with embedded kernels."""

DType = Literal["T", "W", "float32", "int32"]
"""T is the compute dtype (float16, bfloat16 or float32); W is a weight's: T or float32."""

Tolerance = Literal["exact", "float"]
"""exact: bytes equal the reference; float: error bounded by the same-dtype torch reference's."""

Sizes = Mapping[str, Any]
"""Axis name to size; an int, or a symbolic dimension that supports `*`, `//`, `+` and `-`."""

Attributes = Mapping[str, int | float]

WIDE_ALIGNMENT = 16
"""Bytes of the widest load: what TensorRT, torch and cudaMalloc align a tensor to at least."""

D = TypeVar("D")
"""A dtype as torch, TensorRT or PTX names it."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of an operator."""

    name: str
    axes: tuple[str, ...]
    """Axis names, outermost first; `A*B` and `A/B` combine the sizes of named axes."""
    dtype: DType

    @property
    def alignment(self) -> int:
        """Bytes that its address is a multiple of, whoever launches a kernel.

        Lengths and indices may be a row of a larger tensor: `hist_len[layer]` begins at any
        multiple of 4 bytes. Everything else is a tensor of its own, or begins where a row of
        channels does.
        """
        return 4 if self.dtype == "int32" else WIDE_ALIGNMENT

    def shape(self, sizes: Sizes) -> tuple[Any, ...]:
        return tuple(_axis_size(axis, sizes) for axis in self.axes)


@dataclass(frozen=True)
class AttributeSpec:
    """One attribute of an operator; its reference says what it means."""

    name: str
    kind: Literal["int", "float"]


@dataclass(frozen=True)
class OpSpec:
    """The contract of one operator: purely functional, every output fresh."""

    name: str
    """Operator type in the ONNX domain and in the TensorRT registry."""
    torch_name: str
    """Operator name in the torch library namespace."""
    summary: str
    """What it computes, in one line."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attributes: tuple[AttributeSpec, ...]
    """Attributes, in the order in which every binding passes them, after the inputs."""
    tolerance: Tolerance
    """How an implementation may differ from the reference."""
    read_sizes: Callable[[Sequence[Sequence[Any]], Attributes], dict[str, Any]]
    """Read the size of every named axis from the input shapes and the attributes."""

    def module(self, name: str) -> Any:
        """Module `name` (such as `kernel`) of the operator's folder."""
        return importlib.import_module(f"forcing_kv.plugins.{self.torch_name}.{name}")

    def compute_dtype(self, input_dtypes: Sequence[D]) -> D:
        """What T is in a call with inputs of these dtypes."""
        pairs = zip(input_dtypes, self.inputs, strict=True)
        return next(dtype for dtype, tensor in pairs if tensor.dtype == "T")

    def output_dtypes(
        self, input_dtypes: Sequence[D], dtype_of: Callable[[str], D]
    ) -> tuple[D, ...]:
        """Dtypes of the outputs.

        Args:
            dtype_of: the dtype of a name such as float32.
        """
        compute = self.compute_dtype(input_dtypes)
        return tuple(
            compute if tensor.dtype == "T" else dtype_of(tensor.dtype) for tensor in self.outputs
        )

    def output_shapes(
        self, input_shapes: Sequence[Sequence[Any]], attributes: Attributes
    ) -> tuple[tuple[Any, ...], ...]:
        sizes = self.read_sizes(input_shapes, attributes)
        return tuple(tensor.shape(sizes) for tensor in self.outputs)

    def check(self, input_shapes: Sequence[Sequence[int]], attributes: Attributes) -> None:
        """Compare every input shape with the contract.

        Raises:
            ValueError: an input has another shape than its axes say; names the input.
        """
        sizes = self.read_sizes(input_shapes, attributes)
        for tensor, found in zip(self.inputs, input_shapes, strict=True):
            if tuple(found) != tensor.shape(sizes):
                raise ValueError(
                    f"{self.name}: input {tensor.name} [{', '.join(tensor.axes)}] must have shape "
                    f"{tensor.shape(sizes)}, found {tuple(found)}; sizes {sizes}"
                )

    def signature(self, tensor: Any, returns: Any, **more: Any) -> inspect.Signature:
        """What a function of this operator takes, for those who read it off a signature.

        Args:
            tensor: type of every input; the attributes follow.
            more: types of further parameters by name.
        """
        kinds: dict[str, Any] = {each.name: tensor for each in self.inputs}
        kinds |= {each.name: {"int": int, "float": float}[each.kind] for each in self.attributes}
        parameters = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
            for name, kind in {**kinds, **more}.items()
        ]
        return inspect.Signature(parameters, return_annotation=returns)

    def split_arguments(self, arguments: Sequence[Any]) -> tuple[list[Any], dict[str, int | float]]:
        """Split positional arguments into the tensors and the attributes by name."""
        count = len(self.inputs)
        names = [attribute.name for attribute in self.attributes]
        return list(arguments[:count]), dict(zip(names, arguments[count:], strict=True))


def result_of(outputs: Sequence[Any]) -> Any:
    """One output alone, several as a tuple: what a call of an operator returns."""
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def _axis_size(axis: str, sizes: Sizes) -> Any:
    """Size of an axis such as `N`, `H*D` or `D/2`."""
    if "*" in axis:
        left, right = axis.split("*")
        return _factor(left, sizes) * _factor(right, sizes)
    if "/" in axis:
        left, right = axis.split("/")
        return _factor(left, sizes) // _factor(right, sizes)
    return _factor(axis, sizes)


def _factor(token: str, sizes: Sizes) -> Any:
    return int(token) if token.isdigit() else sizes[token]
