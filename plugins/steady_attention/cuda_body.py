"""FkSteadyAttention by the fused attention kernels that PyTorch brings for CUDA, named one by one.

A compiler that may choose would choose on the machine that compiles; here the kernel is part of
what is compiled. Both take float16 and bfloat16 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from forcing_kv.plugins.steady_attention.reference import Attend, attend_blocks


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    output: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
    return output


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return output


KERNELS: Mapping[str, Attend] = {"cudnn": _cudnn, "flash": _flash}
"""Dense attention kernels by name."""


def steady_attention(kernel: str) -> Callable[..., Tensor]:
    """The operator by a kernel of `KERNELS`; same as `reference.steady_attention`."""
    return partial(attend_blocks, KERNELS[kernel])
