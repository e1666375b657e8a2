"""Scales of linear layers in FP8 (E4M3), as a bundle records them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forcing_kv.runtime_trt.errors import InputError

FP8_MAX = 448.0
"""Largest E4M3 value."""
MIN_SCALE = 2.0**-14
"""Smallest scale: the smallest normal number of float16."""
FP8_MIN_SM = 89
"""First generation of GPUs with FP8 matrix products (Ada)."""


@dataclass(frozen=True)
class LinearScales:
    """What the 8-bit values of one layer are multiplied by, each a power of two."""

    input: float
    weight: float


@dataclass(frozen=True)
class Fp8Scales:
    """The layers of a model that run in FP8; all others keep the compute dtype."""

    linears: Mapping[str, LinearScales]
    """By official name, such as `blocks.0.ffn.2`."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> Fp8Scales:
        """Read the entry of a manifest.

        Raises:
            InputError: a scale that is not a power of two, or another form.
        """
        try:
            linears = {
                name: LinearScales(float(scales["input"]), float(scales["weight"]))
                for name, scales in data["linears"].items()
            }
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: scales of layers are missing or malformed ({error})") from (
                error
            )
        for name, scales in linears.items():
            for scale in (scales.input, scales.weight):
                if not (scale > 0 and math.isfinite(scale) and math.frexp(scale)[0] == 0.5):
                    raise InputError(f"{where}.{name}: scale {scale} is not a power of two")
        return cls(linears)
