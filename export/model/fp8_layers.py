"""Which layers of a denoiser run in FP8, by which scales, and the model with and without them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from torch import nn

from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.model.fp8 import Fp8Linear
from forcing_kv.export.model.rewrite import linear_of, share_weights
from forcing_kv.runtime_trt.bundle.fp8 import FP8_MAX, LINEARS, MIN_SCALE, Fp8Scales, LinearScales
from forcing_kv.runtime_trt.errors import InputError


@dataclass(frozen=True)
class BlockLinear:
    """A linear layer that FP8 can serve."""

    name: str
    """Official name."""
    parent: nn.Module
    key: str

    @property
    def module(self) -> nn.Module:
        return self.parent.get_submodule(self.key)

    def replace(self, module: nn.Module) -> None:
        self.parent.set_submodule(self.key, module)


def block_linears(model: CausalWanModel) -> Iterator[BlockLinear]:
    """Every layer that FP8 can serve, in order of the blocks."""
    for layer, block in enumerate(model.layers):
        for name in LINEARS:
            yield BlockLinear(f"blocks.{layer}.{name}", block, name)


def weight_scales(model: CausalWanModel) -> dict[str, float]:
    """Scale of each weight; q, k and v of one self-attention share theirs, to be one product.

    Raises:
        InputError: a weight is not finite.
    """
    largest = {
        linear.name: float(cast(nn.Linear, linear.module).weight.detach().abs().max())
        for linear in block_linears(model)
    }
    for layer in range(len(model.layers)):
        names = [f"blocks.{layer}.self_attn.{part}" for part in "qkv"]
        largest |= dict.fromkeys(names, max(largest[name] for name in names))
    if bad := sorted(name for name, amax in largest.items() if not math.isfinite(amax)):
        raise InputError(
            f"the weights of {len(bad)} layers are NaN or infinite, such as {bad[0]}.weight, so "
            "there is no scale that FP8 could hold them by; give intact weights, or leave --fp8 out"
        )
    return {name: scale_of(amax) for name, amax in largest.items()}


def scale_of(amax: float) -> float:
    """The smallest power of two by which values up to `amax` fit E4M3, at least `MIN_SCALE`.

    Raises:
        ValueError: `amax` is not a finite number.
    """
    if not math.isfinite(amax):
        raise ValueError(f"amax is {amax}")
    if amax == 0:
        return MIN_SCALE
    return max(MIN_SCALE, 2.0 ** math.ceil(math.log2(amax / FP8_MAX)))


def quantize_(model: CausalWanModel, scales: Fp8Scales) -> CausalWanModel:
    """Replace the layers that `scales` names by FP8 ones; changes and returns `model`.

    Args:
        model: weights in any dtype, or on the meta device, which gives the layers' form alone.
        scales: of a subset of the layers of `block_linears`.
    """
    for linear in block_linears(model):
        if linear.name in scales.linears:
            own = cast(nn.Linear, linear.module)
            linear.replace(Fp8Linear.of(own, scales.linears[linear.name]))
    return model


def dequantized(model: CausalWanModel) -> CausalWanModel:
    """A model with the same weights whose layers are plain: it rounds no activations.

    It is in float32 where the weights were E4M3; `model` itself if none were.
    """
    if not any(isinstance(linear.module, Fp8Linear) for linear in block_linears(model)):
        return model
    plain = share_weights(model)
    for linear in block_linears(plain):
        own = linear.module
        if isinstance(own, Fp8Linear):
            linear.replace(linear_of(own.weight.float() * own.scales.weight, own.bias.float()))
    return plain


def scales_for(model: CausalWanModel, amax: Mapping[str, float]) -> Fp8Scales:
    """Scales of the layers that a calibration measured.

    Args:
        model: the weights that will be rounded.
        amax: largest magnitude of each layer's input, by official name.
    """
    weights = weight_scales(model)
    return Fp8Scales(
        {name: LinearScales(scale_of(value), weights[name]) for name, value in amax.items()}
    )
