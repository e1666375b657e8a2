"""Scales of linear layers in FP8 (E4M3), as a bundle records them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from forcing_kv.runtime_trt.errors import BackendUnavailableError, InputError

FP8_MAX = 448.0
"""Largest E4M3 value."""
MIN_SCALE = 2.0**-14
"""Smallest scale: the smallest normal number of float16."""
LINEARS = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
    "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2",
)  # fmt: skip
"""Layers of a block that FP8 serves: all products of a step but the embeddings and the head. Text
keys and values run once a prompt and stay as they are."""
_NAME = re.compile(rf"blocks\.\d+\.({'|'.join(map(re.escape, LINEARS))})")
FP8_MIN_SM = 89
"""First generation of GPUs with FP8 matrix products (Ada)."""


Fp8Counts = Mapping[str, int]
"""Blocks in which a layer runs in FP8, by its name in `LINEARS`."""


@dataclass(frozen=True)
class LinearScales:
    """What the 8-bit values of one layer are multiplied by, each a power of two."""

    input: float
    weight: float


@dataclass(frozen=True)
class Fp8Scales:
    """The layers of a model that run in FP8; all others keep the compute dtype.

    Raises:
        InputError: a layer that FP8 does not serve, or a scale that is not a power of two.
    """

    linears: Mapping[str, LinearScales]
    """By official name, such as `blocks.0.ffn.2`."""

    def __post_init__(self) -> None:
        for name, scales in self.linears.items():
            if not _NAME.fullmatch(name):
                raise InputError(
                    f"no layer is called {name!r}; names are blocks.N. and one of {list(LINEARS)}"
                )
            for scale in (scales.input, scales.weight):
                if not (scale > 0 and math.isfinite(scale) and math.frexp(scale)[0] == 0.5):
                    raise InputError(f"{name}: scale {scale} is not a power of two")

    @property
    def counts(self) -> Fp8Counts:
        """How many blocks have each layer in FP8."""
        return Counter(name.split(".", 2)[2] for name in self.linears)


def check_sm(fp8: Fp8Scales, sm: int) -> None:
    """Refuse a GPU that has no FP8 products.

    Args:
        fp8: layers of a bundle.
        sm: compute capability, such as 89.

    Raises:
        BackendUnavailableError: the GPU is of an earlier generation than Ada.
    """
    if sm < FP8_MIN_SM:
        raise BackendUnavailableError(
            f"{len(fp8.linears)} linear layers of this bundle run in FP8, which sm{sm} does not "
            f"have; build for sm{FP8_MIN_SM} or later, or export without --fp8"
        )
