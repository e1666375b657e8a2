"""Element types of tensors: one name for each, and what every library calls it.

The name is PyTorch's. Manifests, constant tables, graphs and options use it, and
`getattr(torch, name)` is the dtype itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

DType = Literal["float32", "float16", "bfloat16"]
"""Dtypes that a model computes in."""
COMPUTE_DTYPES: tuple[str, ...] = get_args(DType)


@dataclass(frozen=True)
class ElementType:
    """One element type."""

    name: str
    nbytes: int
    """Bytes of one element."""
    numpy: str
    """What numpy holds it as. numpy has neither bfloat16 nor FP8: an unsigned integer of the same
    size carries the bits, and `widened` makes numbers of them."""
    onnx: str
    """Member of ONNX's `DataType`."""
    onnx_code: int
    """Its number."""
    safetensors: str
    """Code in the header of a safetensors file."""
    tensorrt: str = ""
    """Member of TensorRT's `DataType`; empty where it has none."""
    plugin: str = ""
    """In the type lists of TensorRT's plugins, for those that our operators take."""
    triton: str = ""
    """In the signatures of Triton's kernels, for the same."""


_TYPES = (
    ElementType("float64", 8, "float64", "DOUBLE", 11, "F64"),
    ElementType("float32", 4, "float32", "FLOAT", 1, "F32", "FLOAT", "FP32", "fp32"),
    ElementType("float16", 2, "float16", "FLOAT16", 10, "F16", "HALF", "FP16", "fp16"),
    ElementType("bfloat16", 2, "uint16", "BFLOAT16", 16, "BF16", "BF16", "BF16", "bf16"),
    ElementType("float8_e4m3fn", 1, "uint8", "FLOAT8E4M3FN", 17, "F8_E4M3", "FP8"),
    ElementType("float8_e5m2", 1, "uint8", "FLOAT8E5M2", 19, "F8_E5M2"),
    ElementType("int64", 8, "int64", "INT64", 7, "I64", "INT64"),
    ElementType("int32", 4, "int32", "INT32", 6, "I32", "INT32", "INT32", "i32"),
    ElementType("int16", 2, "int16", "INT16", 5, "I16"),
    ElementType("int8", 1, "int8", "INT8", 3, "I8", "INT8"),
    ElementType("uint8", 1, "uint8", "UINT8", 2, "U8", "UINT8"),
    ElementType("bool", 1, "bool", "BOOL", 9, "BOOL", "BOOL"),
)
DTYPES: Mapping[str, ElementType] = {each.name: each for each in _TYPES}
"""Every element type by its name."""
BY_ONNX: Mapping[str, ElementType] = {each.onnx: each for each in _TYPES}
BY_ONNX_CODE: Mapping[int, ElementType] = {each.onnx_code: each for each in _TYPES}
BY_SAFETENSORS: Mapping[str, ElementType] = {each.safetensors: each for each in _TYPES}
BY_TENSORRT: Mapping[str, ElementType] = {each.tensorrt: each for each in _TYPES if each.tensorrt}


def dtype_name(dtype: Any) -> str:
    """Name of a dtype of PyTorch's."""
    return str(dtype).removeprefix("torch.")


def widened(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """An array of the bits of bfloat16 as float32; any other dtype as it is."""
    if dtype != "bfloat16":
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)
