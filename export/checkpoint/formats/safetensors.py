"""Tensors of a `.safetensors` file, mapped read-only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forcing_kv.export.checkpoint.formats.mapped import bytes_of, map_file, typed
from forcing_kv.runtime_trt.bundle.schema import parse_json
from forcing_kv.runtime_trt.dtypes import BY_SAFETENSORS
from forcing_kv.runtime_trt.errors import InputError, require

MAX_HEADER_NBYTES = 32 << 20
"""Longest header that is read; one of 1,000 tensors has some 100 KB."""
_LENGTH_NBYTES = 8
_METADATA = "__metadata__"


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """Map every tensor of a file; nothing is read until it is used.

    Returns:
        Tensors by name. Writing into one crashes the process: convert or copy first.

    Raises:
        InputError: a dtype that is not known.
        ValueError: the header is malformed or too long, or has a name twice.
        SafetensorError: the library finds the header broken, a hole or an overlap among the
            tensors, or the file truncated or continued.
    """
    content = map_file(path)
    begin = _LENGTH_NBYTES + int.from_bytes(bytes_of(content, 0, _LENGTH_NBYTES), "little")
    if begin > MAX_HEADER_NBYTES:
        raise ValueError(f"its header would have {begin:,} bytes")
    with require("safetensors").safe_open(path, framework="numpy"):
        pass
    # The library keeps the last of several entries of one name; parse_json refuses them.
    header = parse_json(bytes_of(content, _LENGTH_NBYTES, begin))
    header.pop(_METADATA, None)
    for name, entry in header.items():
        if entry["dtype"] not in BY_SAFETENSORS:
            raise InputError(
                f"{path}: {name} is of dtype {entry['dtype']}; known are {list(BY_SAFETENSORS)}; "
                "give the unquantised checkpoint"
            )
    return {name: _tensor(content[begin:], entry) for name, entry in header.items()}


def _tensor(content: Tensor, entry: dict[str, Any]) -> Tensor:
    """One tensor of the data [bytes]."""
    dtype: torch.dtype = getattr(torch, BY_SAFETENSORS[entry["dtype"]].name)
    begin, end = entry["data_offsets"]
    return typed(content, begin, end, dtype).view(entry["shape"])
