"""What an adapter does to one parameter of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from forcing_kv.export.checkpoint.adapter.alpha import Scale
from forcing_kv.export.checkpoint.adapter.products import (
    Kind,
    as_weight,
    magnitude_axis,
    normalised,
)
from forcing_kv.runtime_trt.errors import InputError

Whole = Literal["difference", "bias of LoRA", "value"]
"""One tensor of the parameter's shape: added, added as LoRA's product is, or put in its place."""
MAGNITUDES = ("magnitude", "dora_scale")


@dataclass(frozen=True)
class Update:
    """The tensors that change a parameter."""

    where: str
    """The file, for messages."""
    shape: Sequence[int]
    """Of the parameter."""
    kind: Kind | Whole
    tensors: Mapping[str, Tensor]
    """By role, mapped to the file; a whole one is alone."""
    keys: Mapping[str, str]
    """Their names in the file, by role."""
    scale: Scale | None = None
    """Of a product and of LoRA's bias."""

    @property
    def label(self) -> str:
        """What it is, for people."""
        if not isinstance(self.kind, Kind):
            return self.kind
        return self.kind.name + (" with DoRA" if self._magnitude else "")

    @property
    def replaces(self) -> bool:
        return self.kind == "value"

    @property
    def _magnitude(self) -> str | None:
        return next((role for role in MAGNITUDES if role in self.tensors), None)

    def check(self) -> None:
        """Refuse tensors that do not make a change of the parameter; computes nothing.

        Raises:
            ShapeError: they do not.
        """
        if not isinstance(self.kind, Kind):
            (whole,) = self.tensors.values()
            as_weight(whole.to("meta"), self.shape)
            return
        self.kind.check(self.tensors, self.shape)
        if role := self._magnitude:
            magnitude_axis(role, self.tensors[role].shape, self.shape)

    def change(self, weight: Tensor) -> Tensor:
        """What a strength of 1 adds to the parameter, or its new value where `replaces`.

        Args:
            weight: the parameter in the base model, float64.

        Returns:
            A tensor of the same shape.

        Raises:
            InputError: a tensor of the file holds NaN or infinities.
        """
        tensors = {role: self._finite(role) for role in self.tensors}
        scale = 1.0 if self.scale is None else self.scale.value
        if not isinstance(self.kind, Kind):
            (whole,) = tensors.values()
            return scale * as_weight(whole, self.shape)
        change = scale * self.kind.change(tensors, self.shape)
        if (role := self._magnitude) is None:
            return change
        axis = magnitude_axis(role, tensors[role].shape, self.shape)
        return normalised(weight + change, tensors[role], axis) - weight

    def _finite(self, role: str) -> Tensor:
        tensor = self.tensors[role].float()
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{self.where}: tensor {self.keys[role]} holds NaN or infinite numbers; the "
                "training broke, or the file did: take another copy or an earlier step"
            )
        return tensor
