"""Tensors of an adapter to changes of parameters: what belongs together, and at which scale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from forcing_kv.export.checkpoint.adapter.alpha import (
    AlphaRule,
    Scale,
    Statements,
    number_of,
    scale_of,
)
from forcing_kv.export.checkpoint.adapter.names import ModelNames, Part, UnknownNameError
from forcing_kv.export.checkpoint.adapter.products import KINDS, Kind, ShapeError
from forcing_kv.export.checkpoint.adapter.update import MAGNITUDES, Update, Whole
from forcing_kv.runtime_trt.errors import InputError

_WHOLE: Mapping[str, Whole] = {
    **dict.fromkeys(("diff", "diff_bias", "diff_modulation"), "difference"),
    "up_bias": "bias of LoRA",
    "value": "value",
}
"""Kind of the tensors that are as large as their parameter, by role."""
_SHOWN = 3

Parts = Mapping[str, Mapping[str, Part]]
"""Parameter -> role -> the tensor."""


def parts_of(tensors: Mapping[str, Tensor], names: ModelNames, path: Path) -> Parts:
    """Understand every name.

    Raises:
        InputError: a tensor is none of an adapter of this model, is not of a floating type, or
            plays the role of another.
    """
    parts, unknown = defaultdict[str, dict[str, Part]](dict), list[str]()
    for key, value in tensors.items():
        try:
            part = names.part(key)
        except UnknownNameError as error:
            unknown.append(f"{key} {error}")
            continue
        if part.role != "alpha" and not value.dtype.is_floating_point:
            raise InputError(
                f"{path}: tensor {key} is of {value.dtype}; give the adapter in a floating type, "
                "not a quantised one"
            )
        other = parts[part.parameter].setdefault(part.role, part)
        if other is not part:
            raise InputError(f"{path}: {other.key} and {key} are the same tensor of one layer")
    if unknown:
        raise InputError(
            f"{path}: {len(unknown)} of {len(tensors)} tensors cannot be merged: "
            f"{'; '.join(unknown[:_SHOWN])}; use an adapter made for this base model"
        )
    return parts


@dataclass(frozen=True)
class Assembly:
    """An adapter file while its tensors are put together."""

    path: Path
    parts: Parts
    tensors: Mapping[str, Tensor]
    statements: Statements
    rule: AlphaRule

    def update(self, name: str, shape: Sequence[int]) -> Update:
        """The change of a parameter.

        Raises:
            InputError: tensors are missing, do not belong together, or are of another shape.
        """
        roles = self.parts[name]
        kind = self._kind(name, roles)
        if kind == "value":
            self._check_value(name, roles["value"])
        scale = self._scale(name, kind)
        tensors = {role: self.tensors[part.key] for role, part in roles.items() if role != "alpha"}
        keys = {role: part.key for role, part in roles.items()}
        update = Update(str(self.path), shape, kind, tensors, keys, scale)
        try:
            update.check()
        except ShapeError as error:
            raise InputError(
                f"{self.path}: {some(keys.values())}: {error}; use the adapter made for this base "
                "model"
            ) from error
        return update

    def disagreement(self) -> list[str]:
        """What to tell where the file's own alphas are all other than what is stated of it."""
        own = {alpha for roles in self.parts.values() if (alpha := self._own_alpha(roles))}
        if not own or self.rule.option is not None:
            return []
        said = self.statements.of_all_layers
        return [
            f"{origin} states alpha {alpha:g}, but none of the layers' own tensors does, and they "
            "count"
            for origin, alpha in said.items()
            if alpha not in own
        ]

    def _kind(self, name: str, roles: Mapping[str, Part]) -> Kind | Whole:
        if len(roles) == 1 and (whole := _WHOLE.get(next(iter(roles)))):
            return whole
        given = set(roles) - {"alpha", *MAGNITUDES}
        for kind in KINDS:
            if kind.required <= given <= kind.required | kind.optional:
                if len(set(roles) & set(MAGNITUDES)) > 1:
                    break
                return kind
        keys = [part.key for part in roles.values()]
        raise InputError(
            f"{self.path}: the tensors of {name.removesuffix('.weight')} are no LoRA, LoHa, LoKr "
            f"or difference: factors without their partner, or of two kinds ({some(keys, 8)})"
        )

    def _scale(self, name: str, kind: Kind | Whole) -> Scale | None:
        if kind == "bias of LoRA":
            weight = f"{name.removesuffix('.bias')}.weight"
            owner = self._kind(weight, self.parts.get(weight, {}))
            if not isinstance(owner, Kind) or set(MAGNITUDES) & set(self.parts[weight]):
                raise InputError(f"{self.path}: {name} is the bias of a LoRA that is not there")
            return self._scale(weight, owner)
        if not isinstance(kind, Kind):
            return None
        roles = self.parts[name]
        factors = {role: self.tensors[part.key] for role, part in roles.items()}
        part = next(roles[role] for role in sorted(kind.required))
        rank = kind.rank(factors)
        if rank is None:
            rank = next(
                (r for c in self.statements.configs if (r := c.rank_of(part.spelled))), None
            )
        if rank is None:
            return None
        if rank < 1:
            raise InputError(f"{self.path}: tensor {part.key} has rank 0; the file is broken")
        self._check_dora(part, roles)
        own = self._own_alpha(roles)
        stated = None if own is None else (own, "its tensors")
        return scale_of(part.spelled, rank, stated, self.statements, self.rule, self.path)

    def _own_alpha(self, roles: Mapping[str, Part]) -> float | None:
        if (part := roles.get("alpha")) is None:
            return None
        return number_of(self.tensors[part.key], f"{self.path}: {part.key}")

    def _check_dora(self, part: Part, roles: Mapping[str, Part]) -> None:
        if set(roles) & set(MAGNITUDES):
            return
        for config in self.statements.configs:
            if config.use_dora:
                raise InputError(
                    f"{config.origin}: use_dora is set, but {part.spelled} has no magnitudes in "
                    f"{self.path}; the file is incomplete"
                )

    def _check_value(self, name: str, part: Part) -> None:
        """Whole parameters are taken where the adapter means them to be replaced."""
        configs = self.statements.configs
        if part.key.endswith(".set_weight"):
            return
        saved = [module for config in configs for module in config.modules_to_save or ()]
        if any(f".{part.spelled}.".find(f".{module}.") >= 0 for module in saved):
            return
        if name.endswith(".bias") and all(config.bias != "none" for config in configs):
            return
        raise InputError(
            f"{self.path}: {part.key} is a whole parameter, not a change of one; an adapter may "
            f"replace biases and what modules_to_save of adapter_config.json names"
        )


def some(keys: Iterable[str], number: int = _SHOWN) -> str:
    """A few names, for messages."""
    return ", ".join(sorted(keys)[:number]) or "nothing"
