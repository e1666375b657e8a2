"""A file's bytes as tensors, mapped read-only.

PyTorch and the safetensors library map files privately and writable. Linux counts such a mapping
against memory and refuses a file that is larger than it, though that is what mapping is for.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def map_file(path: Path) -> Tensor:
    """Every byte of a file, [n] uint8; nothing is read until it is used.

    Writing into it crashes the process: convert or copy first.
    """
    if path.stat().st_size == 0:
        return torch.empty(0, dtype=torch.uint8)
    return as_tensor(np.memmap(path, np.uint8, "r"))


def as_tensor(array: NDArray[np.generic]) -> Tensor:
    """An array's memory as a tensor, though it is not to be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def bytes_of(content: Tensor, begin: int, end: int) -> bytes:
    """A copy of some of the bytes; fewer where they end earlier."""
    return content[max(begin, 0) : max(end, 0)].numpy().tobytes()


def typed(content: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """The elements in bytes `begin` to `end`, [n] of `dtype`."""
    part = content[begin:end]
    # PyTorch views only what is aligned to the item; few formats promise that.
    return (part.clone() if begin % dtype.itemsize else part).view(dtype)
