"""GGUF files of llama.cpp's format, as ComfyUI-GGUF writes diffusion models.

Dimensions stand reversed in them. Four is the most that GGUF has by its rules, so a tensor of five
stands as it is, or in another shape with its own in the metadata.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from forcing_kv.export.checkpoint.formats.mapped import as_tensor
from forcing_kv.runtime_trt.errors import InputError, require

if TYPE_CHECKING:
    from gguf import ReaderTensor

_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
_MAX_PARTS = 2_000_000
"""Values that a header may have; a vocabulary, which no denoiser has, takes some 200,000."""
_PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}
"""Types that are dtypes of PyTorch's."""


def read_gguf(path: Path) -> tuple[dict[str, Tensor], dict[str, Callable[[], Tensor]], str]:
    """Map every tensor of a file.

    Returns:
        The tensors by name, quantised ones without data; what computes those, in float32; and what
        is in the file, for people.

    Raises:
        InputError: a type that cannot be dequantised, or tensors that do not lie as GGUF has them.
        MissingDependencyError: the `gguf` package is not installed.
        Exception: whatever else a damaged file leads to.
    """
    reader = _reader(path)
    _check_places(reader, path)
    tensors: dict[str, Tensor] = {}
    packed: dict[str, Callable[[], Tensor]] = {}
    for tensor in reader.tensors:
        shape = _shape(reader, tensor, path)
        kind = tensor.tensor_type.name
        if kind in _PLAIN:
            data = as_tensor(tensor.data).reshape(-1).view(_PLAIN[kind])
            tensors[tensor.name] = data.view(shape)
        else:
            tensors[tensor.name] = torch.empty(shape, device="meta")
            packed[tensor.name] = partial(_dequantised, tensor, shape, path)
    counts = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    return tensors, packed, ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def _reader(path: Path) -> Any:
    gguf = require("gguf")

    class Bounded(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        """The library's reader, which reads on beyond the end of a file and without bound."""

        num_parts = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            self.num_parts += 1
            if self.num_parts > _MAX_PARTS:
                raise ValueError("its header has too many values")
            found = super()._get(offset, dtype, count, override_order)
            if len(found) != count:
                raise ValueError("it is cut off")
            return found

    reader = Bounded(path)
    if reader.byte_order != "I":
        raise InputError(f"{path}: is a big-endian file; convert it on a little-endian machine")
    return reader


def _check_places(reader: Any, path: Path) -> None:
    """Refuse tensors that overlap or leave room, as llama.cpp does."""
    place = reader.data_offset
    for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
        if tensor.data_offset != place:
            raise InputError(
                f"{path}: {tensor.name} lies at byte {tensor.data_offset}, where its neighbours "
                f"leave {place}; download it again and compare its size and checksum"
            )
        place = -(-(place + int(tensor.n_bytes)) // int(reader.alignment)) * int(reader.alignment)
    if len(reader.data) > place:
        raise InputError(
            f"{path}: {len(reader.data) - place} bytes follow its tensors; download it again and "
            "compare its size and checksum"
        )


def _shape(reader: Any, tensor: ReaderTensor, path: Path) -> tuple[int, ...]:
    """Dimensions as PyTorch has them."""
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if (field := reader.get_field(f"{_ORIGINAL_SHAPE}{tensor.name}")) is None:
        return shape
    stated = field.contents()
    integers = isinstance(stated, list) and all(type(size) is int and size >= 0 for size in stated)
    if not integers or math.prod(stated) != math.prod(shape):
        raise InputError(
            f"{path}: {tensor.name} has {list(shape)} elements, but {field.name} is {stated!r}; "
            "convert it again"
        )
    return tuple(stated)


def _dequantised(tensor: ReaderTensor, shape: tuple[int, ...], path: Path) -> Tensor:
    kind = tensor.tensor_type
    try:
        values = require("gguf").quants.dequantize(tensor.data, kind)
    except NotImplementedError as error:
        raise InputError(
            f"{path}: {tensor.name} is of type {kind.name}, which the gguf package cannot "
            "dequantise; give a file of another quantisation, such as Q8_0"
        ) from error
    return torch.from_numpy(values).reshape(shape)
