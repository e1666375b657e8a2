"""Tensors of a `.safetensors` file, mapped read-only.

The library's own loader maps a file privately and writable. Linux counts such a mapping against
memory, so it refuses a file that is larger than the machine's, which is what mapping is for.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from forcing_kv.runtime_trt.dtypes import BY_SAFETENSORS
from forcing_kv.runtime_trt.errors import InputError, require

_LENGTH_NBYTES = 8
_METADATA = "__metadata__"


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """Map every tensor of a file; nothing is read until it is used.

    Returns:
        Tensors by name. Writing into one crashes the process: convert or copy first.

    Raises:
        InputError: a dtype that is not known.
        SafetensorError: the library finds the header broken or the file truncated.
    """
    with require("safetensors").safe_open(path, framework="numpy"):
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_NBYTES), "little")
        header = json.loads(file.read(length))
    header.pop(_METADATA, None)
    if not header:
        return {}
    unknown = sorted({entry["dtype"] for entry in header.values()} - set(BY_SAFETENSORS))
    if unknown:
        raise InputError(
            f"{path}: holds tensors of dtype {unknown}; known are {list(BY_SAFETENSORS)}"
        )
    data = np.memmap(path, np.uint8, "r", offset=_LENGTH_NBYTES + length)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        content = torch.from_numpy(data)
    return {
        name: _tensor(content, entry["dtype"], entry["shape"], *entry["data_offsets"])
        for name, entry in header.items()
    }


def _tensor(content: Tensor, dtype: str, shape: list[int], begin: int, end: int) -> Tensor:
    """One tensor of the data [bytes]."""
    item: torch.dtype = getattr(torch, BY_SAFETENSORS[dtype].name)
    part = content[begin:end]
    # PyTorch views only what is aligned to the item; the format does not promise that.
    return (part.clone() if begin % item.itemsize else part).view(item).view(shape)
