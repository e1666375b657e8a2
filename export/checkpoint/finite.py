"""Weights that no bundle may hold: NaN, infinities, and numbers that their dtype cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from forcing_kv.export.model.fp8 import Fp8Linear
from forcing_kv.runtime_trt.dtypes import dtype_name
from forcing_kv.runtime_trt.errors import InputError

IN_FILE = "in the file"


@dataclass
class FiniteCheck:
    """Looks at weights one after another, and refuses them all at the end, naming the first."""

    where: str
    """File, or what else is to be blamed, for the message."""
    faults: dict[str, str] = field(default_factory=dict)
    """What is wrong with each tensor that is not finite, by name."""

    def look(self, name: str, used: Tensor, before: Mapping[str, Tensor] | None = None) -> None:
        """Look at one tensor: a single pass over it, 7 GB/s on one core.

        Args:
            used: what becomes a weight.
            before: the same tensor at earlier stages, by the words for where it is then, such as
                "in the file"; read only if `used` is at fault, to say where that comes from.
        """
        if is_finite(used):
            return
        for stage, tensor in (before or {}).items():
            if not is_finite(tensor):
                self.faults[name] = f"{_count(tensor)} {stage}"
                return
        self.faults[name] = f"{_count(used)} {_as(used, before or {})}"

    def look_at(self, module: nn.Module, before: Mapping[str, Tensor] | None = None) -> None:
        """Look at every weight of a module that is ready for export, constants included.

        Args:
            before: tensors as a file has them, by the module's names; those that the module does
                not have are looked at too, for they tell that the file is damaged.
        """
        before = before or {}
        named = {**dict(module.named_buffers()), **dict(module.named_parameters())}
        for name, value in named.items():
            self.look(name, value, {IN_FILE: before[name]} if name in before else {})
        for name, value in before.items():
            if name not in named:
                self.look(name, value, {IN_FILE: value})
        for name, layer in module.named_modules():
            if isinstance(layer, Fp8Linear):
                self._look_at_fp8(name, layer)

    def _look_at_fp8(self, name: str, layer: Fp8Linear) -> None:
        """What an FP8 layer multiplies its 8-bit values with, and what comes of its weight."""
        dtype, scales = layer.bias.dtype, layer.scales
        products = layer.weight.float() * scales.weight
        self.look(f"{name}.weight", products.to(dtype), {"times its FP8 scale": products})
        scale = torch.tensor(scales.input)
        self.look(f"{name}.input_scale", scale.to(dtype), {"as calibrated": scale})

    def refuse(self) -> None:
        """End the check.

        Raises:
            InputError: tensors were at fault; names the first and how many there are.
        """
        if not self.faults:
            return
        first = min(self.faults)
        others = len(self.faults) - 1
        more = f", and {others} other tensors are not finite" if others else ""
        raise InputError(
            f"{self.where}: tensor {first} holds {self.faults[first]}{more}. Such weights make "
            "black videos: give intact ones, or a dtype of a larger range (bfloat16, float32) "
            "where they overflow; --allow-non-finite exports them as they are"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    values = tensor.detach()
    # PyTorch compares no 8-bit floats. A NaN shows in both ends, which takes one pass.
    low, high = (values.float() if tensor.itemsize == 1 else values).aminmax()
    return bool(low.isfinite() and high.isfinite())


def _count(tensor: Tensor) -> str:
    values = tensor.detach()
    bad = tensor.numel() - int(
        (values.float() if tensor.itemsize == 1 else values).isfinite().sum()
    )
    return f"{bad} NaN or infinite values of {tensor.numel()}"


def _as(used: Tensor, before: Mapping[str, Tensor]) -> str:
    """What a tensor is kept as, and where it was finite before how large its values were."""
    kept = f"as {dtype_name(used.dtype)}"
    if not before:
        return kept
    *_, last = before.values()
    limit, peak = torch.finfo(used.dtype).max, float(last.detach().double().abs().max())
    return f"{kept}, which ends at {limit:.5g}, for they reach {peak:.5g}"
