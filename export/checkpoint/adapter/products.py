"""What the factors of an adapted layer multiply to: LoRA, LoHa and LoKr.

Letters: o out, i in, r rank, k the axes of a kernel. Source: LoRA (arXiv 2106.09685), FedPara/LoHa
(2108.06098), LoKr and the forms with a core tensor (LyCORIS, 2309.14859), DoRA (2402.09353).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Factors = Mapping[str, Tensor]
"""By role (`names.ROLES`)."""


class ShapeError(ValueError):
    """Factors that do not make a weight of the wanted shape; the message says why."""


@dataclass(frozen=True)
class Kind:
    """A way to write a change of a weight as factors."""

    name: str
    required: frozenset[str]
    optional: frozenset[str]
    rank: Callable[[Factors], int | None]
    """Rank of the factors; None where they are whole, so that alpha has no meaning."""
    product: Callable[[Factors], Tensor]
    """The change of the weight, as `as_weight` takes it."""

    def change(self, factors: Factors, shape: Sequence[int]) -> Tensor:
        """The unscaled change of a weight of this shape.

        Raises:
            ShapeError: the factors do not make one.
        """
        try:
            return as_weight(self.product(factors), shape)
        except RuntimeError as error:
            raise ShapeError(f"the factors do not fit together ({error})") from error

    def check(self, factors: Factors, shape: Sequence[int]) -> None:
        """The same check before anything is computed.

        Raises:
            ShapeError: the factors do not make a weight of this shape.
        """
        self.change({role: each.to("meta") for role, each in factors.items()}, shape)


def _low_rank(factors: Factors) -> Tensor:
    down, up, mid = factors["down"], factors["up"], factors.get("mid")
    _need(min(down.dim(), up.dim()) >= 2, "factors need two axes or more")
    _need(up.shape[1] == down.shape[0], "the two factors differ in rank")
    _need(math.prod(up.shape[2:]) == 1, "the upper factor has a kernel")
    if mid is not None:
        # down [r, i, 1…], mid [r, r, k…], up [o, r, 1…]
        _need(math.prod(down.shape[2:]) == 1, "the lower factor and the core both have a kernel")
        _need(mid.shape[:2] == (up.shape[1], down.shape[0]), "the core differs in rank")
        return torch.einsum("mn...,om,ni->oi...", mid, up.flatten(1), down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _core(factors: Factors, core: str, a: str, b: str) -> Tensor:
    """[o, r] times [r, i…], or [r, o] and [r, i] around a core [r, r, k…]."""
    left, right, middle = factors[a], factors[b], factors.get(core)
    _need(left.dim() == 2 and right.dim() == 2, f"{a} and {b} need two axes")
    if middle is None:
        _need(left.shape[1] == right.shape[0], f"{a} and {b} differ in rank")
        return left @ right
    ranks = (left.shape[0], right.shape[0])
    _need(middle.shape[:2] == ranks, f"{core} differs from {a} and {b} in rank")
    return torch.einsum("mn...,mo,ni->oi...", middle, left, right)


def _hadamard(factors: Factors) -> Tensor:
    one = _core(factors, "hada_t1", "hada_w1_a", "hada_w1_b")
    two = _core(factors, "hada_t2", "hada_w2_a", "hada_w2_b")
    _need(one.shape == two.shape, "the two products differ in shape")
    return one * two


def _kronecker(factors: Factors) -> Tensor:
    sides = [
        factors[whole] if (whole := f"lokr_{side}") in factors
        else _core(factors, "lokr_t2" if side == "w2" else "", f"{whole}_a", f"{whole}_b")
        for side in ("w1", "w2")
    ]  # fmt: skip
    one, two = sides
    _need(one.dim() == 2 and two.dim() >= 2, "lokr_w1 needs two axes, lokr_w2 two or more")
    return torch.kron(one.reshape(*one.shape, *[1] * (two.dim() - 2)), two)


def _kronecker_rank(factors: Factors) -> int | None:
    split = next((name for name in ("lokr_w2_b", "lokr_w1_b") if name in factors), None)
    return None if split is None else factors[split].shape[:1].numel()


_HADA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_SCALED = frozenset({"alpha", "magnitude", "dora_scale"})
LORA = Kind(
    "LoRA",
    frozenset({"down", "up"}),
    _SCALED | {"mid"},
    lambda f: f["down"].shape[:1].numel(),
    _low_rank,
)
KINDS = (
    LORA,
    Kind(
        "LoHa",
        _HADA,
        _SCALED | {"hada_t1", "hada_t2"},
        lambda f: f["hada_w1_b"].shape[:1].numel(),
        _hadamard,
    ),
    *(
        Kind("LoKr", frozenset({*one, *two}), _SCALED | core, _kronecker_rank, _kronecker)
        for one in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for two, core in (
            (("lokr_w2",), frozenset[str]()),
            (("lokr_w2_a", "lokr_w2_b"), frozenset({"lokr_t2"})),
        )
    ),
)
"""Every way, by the roles of its factors."""


def as_weight(change: Tensor, shape: Sequence[int]) -> Tensor:
    """A change in the shape of its weight: kernels may be flat, or lack axes of length 1.

    Raises:
        ShapeError: it is of another size.
    """
    flat = [shape[0], math.prod(shape[1:])]
    if list(change.shape) != flat and _sized(change.shape) != _sized(shape):
        raise ShapeError(f"makes a {list(change.shape)} weight, the model has {list(shape)}")
    return change.reshape(tuple(shape))


def _sized(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ShapeError(otherwise)


def magnitude_axis(role: str, magnitude: Sequence[int], shape: Sequence[int]) -> int:
    """The axis of a weight along which DoRA keeps one length each.

    PEFT keeps one per output. LyCORIS and kohya keep one per output [o, 1…] or, in files of older
    releases, per input [1, i, 1…]; the shape tells.

    Raises:
        ShapeError: it is neither.
    """
    sizes = list(magnitude)
    if math.prod(sizes) == shape[0] and (role == "magnitude" or sizes[0] == shape[0]):
        return 0
    if len(sizes) > 1 and sizes[1] == shape[1] == math.prod(sizes) and role == "dora_scale":
        return 1
    raise ShapeError(f"has magnitudes {sizes}, the weight is {list(shape)}")


def normalised(weight: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """A weight scaled to the given lengths along an axis; float64."""
    others = [each for each in range(weight.dim()) if each != axis]
    length = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return weight * (magnitude.double().reshape(length.shape) / length)
