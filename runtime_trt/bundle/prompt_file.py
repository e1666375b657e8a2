"""Files of encoded prompts, read and written with numpy alone: safetensors, or plain arrays.

Layout of safetensors: an unsigned 64-bit little-endian header length, a JSON header, the raw
tensors. The one tensor is `prompt_embeds` [prompts, text_len, text_dim]; the metadata holds the
texts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.bundle.arrays import MAX_NBYTES, read_arrays
from forcing_kv.runtime_trt.bundle.atomic.files import replaced_file
from forcing_kv.runtime_trt.bundle.hashes import open_regular
from forcing_kv.runtime_trt.bundle.schema import load_as, parse_json
from forcing_kv.runtime_trt.dtypes import COMPUTE_DTYPES, DTYPES, widened
from forcing_kv.runtime_trt.errors import InputError, shown
from forcing_kv.runtime_trt.rollout.arguments import file_path, float_array

Float32 = NDArray[np.float32]

TENSOR = "prompt_embeds"
FORMAT = "forcing_kv.prompts"
_CODES = {DTYPES[name].safetensors: DTYPES[name] for name in COMPUTE_DTYPES}
_MAX_HEADER_NBYTES = 1 << 20
_REMEDY = "encode the prompts again with `fkv encode-prompt`"


@dataclass(frozen=True)
class _Tensor:
    """What a safetensors header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    def array(self, data: bytes) -> Float32:
        """The tensor as float32, given all data of the file.

        Raises:
            ValueError: it is of another type, or its place is not that of so many elements.
        """
        if self.dtype not in _CODES:
            raise ValueError(f"{TENSOR} is {self.dtype}; needed is one of {list(_CODES)}")
        dtype = _CODES[self.dtype]
        stored = np.dtype(dtype.numpy).newbyteorder("<")
        begin, end = self.data_offsets
        nbytes = prod(self.shape) * stored.itemsize
        if min(self.shape, default=0) < 0 or not 0 <= begin <= end <= len(data):
            raise ValueError(f"{self.data_offsets} are no part of {len(data)} bytes")
        if end - begin != nbytes:
            raise ValueError(f"{self.shape} has {nbytes} bytes, not {end - begin}")
        array = np.frombuffer(data[begin:end], stored).reshape(self.shape)
        return widened(array, dtype.name).astype(np.float32)


@dataclass(frozen=True)
class _Metadata:
    """Our entries of a safetensors header's metadata."""

    prompts: str = "[]"
    """The texts, a JSON list."""
    text_encoder: str = ""


@dataclass(frozen=True)
class PromptFile:
    """Encoded prompts and what they were."""

    prompts: tuple[str, ...]
    """The texts; empty strings where the file does not hold them."""
    embeds: Float32
    """[prompts, text_len, text_dim], padding rows zero."""
    text_encoder: str = ""
    """Kind of encoder that made them, such as umt5-xxl."""


def write_prompts(path: str | os.PathLike[str], content: PromptFile, *, force: bool = True) -> None:
    """Write encoded prompts, whole or not at all.

    Args:
        path: `.safetensors` file.
        content: what to write, as float32.
        force: replace a file that is there; otherwise that is an error.

    Raises:
        InputError: the content is none that `read_prompts` would read.
    """
    path = file_path("path", path)
    if not isinstance(content, PromptFile):
        raise InputError(f"content is {shown(content)}; give a PromptFile")
    embeds = float_array("embeds", content.embeds).astype("<f4", copy=False)
    _check_array(embeds, "embeds", None)
    if embeds.ndim != 3:
        raise InputError(f"embeds has shape {embeds.shape}; give [prompts, text_len, text_dim]")
    texts = content.prompts
    if not isinstance(texts, (tuple, list)) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"prompts is {shown(texts)}; give a tuple of the texts")
    _check_count(str(path), embeds, texts, "give one text each")
    metadata = {
        "format": FORMAT,
        "prompts": json.dumps(list(content.prompts)),
        "text_encoder": content.text_encoder,
    }
    tensor = {"dtype": "F32", "shape": list(embeds.shape), "data_offsets": [0, embeds.nbytes]}
    header = json.dumps({"__metadata__": metadata, TENSOR: tensor}).encode()
    header += b" " * (-len(header) % 8)
    with replaced_file(path, force=force) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(embeds.tobytes())


def read_prompts(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> PromptFile:
    """Read encoded prompts: this project's files, others with `prompt_embeds`, or plain arrays.

    Args:
        path: `.safetensors` with a tensor of float32, float16 or bfloat16; or `.npy`, or `.npz`
            with arrays of any name: floats [text_len, text_dim], or [prompts, text_len, text_dim].
        size: text_len and text_dim that are needed; None takes any.

    Raises:
        InputError: missing, truncated, malformed, of another dtype, rank or size, or not finite.
    """
    path = file_path("path", path)
    if size is not None and not (isinstance(size, tuple) and len(size) == 2):
        raise InputError(f"size is {shown(size)}; give (text_len, text_dim), or None for any")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_arrays(path, size)
    _check_array(content.embeds, f"{path}: {TENSOR}", size)
    return content


def _check_array(array: NDArray[Any], name: str, size: tuple[int, int] | None) -> None:
    floating = np.issubdtype(array.dtype, np.floating) and array.ndim in (2, 3) and array.size > 0
    if floating and np.isfinite(array).all() and size in (None, array.shape[-2:]):
        return
    needed = "[text_len, text_dim]" if size is None else str(list(size))
    wild = floating and not np.isfinite(array).all()
    what = " with values that are NaN or infinite" if wild else ""
    raise InputError(
        f"{name} is {array.dtype} of shape {list(array.shape)}{what}; needed are finite floats of "
        f"shape {needed}, or a stack of such; encode the prompts with `fkv encode-prompt`"
    )


def _check_count(where: str, embeds: Float32, prompts: Sequence[str], remedy: str) -> None:
    if len(prompts) != len(embeds):
        raise InputError(f"{where}: {len(embeds)} embeddings but {len(prompts)} texts; {remedy}")


def _read_arrays(path: Path, size: tuple[int, int] | None) -> PromptFile:
    """Prompts of a `.npy` file, without texts, or of a `.npz` file, by the names of its arrays."""
    arrays = read_arrays(path, "encoded prompts", _REMEDY)
    prompts: list[str] = []
    embeds: list[Float32] = []
    for name, array in arrays.items():
        _check_array(array, f"{path}: {name or 'the array'}", size)
        stack = array if array.ndim == 3 else array[None]
        many = name and len(stack) > 1
        prompts += [f"{name}[{place}]" if many else name for place in range(len(stack))]
        with np.errstate(over="ignore"):  # The caller finds what is infinite now.
            embeds += list(stack.astype(np.float32))
    if len({array.shape for array in embeds}) != 1:
        found = sorted({array.shape for array in embeds}) or "no array"
        raise InputError(
            f"{path}: holds {found}; needed are arrays of one size [text_len, text_dim]; {_REMEDY}"
        )
    return PromptFile(tuple(prompts), np.stack(embeds))


def _read_safetensors(path: Path) -> PromptFile:
    try:
        with open_regular(path) as file:
            content = file.read(MAX_NBYTES)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be read ({reason}); {_REMEDY}") from error
    try:
        header, data = _split(content)
        tensor = load_as(_Tensor, header.get(TENSOR), TENSOR)
        embeds = tensor.array(data)
        metadata = load_as(_Metadata, header.get("__metadata__", {}), unknown="ignore")
        texts = load_as(tuple[str, ...], parse_json(metadata.prompts), "prompts")
    except ValueError as error:
        raise InputError(
            f"{path}: not a file of encoded prompts, or truncated ({error}); {_REMEDY}"
        ) from error
    _check_array(embeds, f"{path}: {TENSOR}", None)
    embeds = embeds[None] if embeds.ndim == 2 else embeds
    prompts = texts or ("",) * len(embeds)
    _check_count(str(path), embeds, prompts, _REMEDY)
    return PromptFile(prompts, embeds, metadata.text_encoder)


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    if not 2 <= length <= min(_MAX_HEADER_NBYTES, len(content) - 8):
        raise ValueError("no safetensors header")
    header = parse_json(content[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    return header, content[8 + length :]
