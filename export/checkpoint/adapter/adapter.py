"""An adapter, read and checked: what it changes, and what is said of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from forcing_kv.export.checkpoint.adapter.alpha import Scale
from forcing_kv.export.checkpoint.adapter.update import Update
from forcing_kv.runtime_trt.bundle.hashes import sha256_of

_USUAL_SCALES = (0.1, 4.0)
"""Trainers take alpha from an eighth of the rank to twice it; rsLoRA comes to about four."""


@dataclass(frozen=True)
class Adapter:
    """What a file changes of a model."""

    path: Path
    """The file with the tensors."""
    strength: float
    updates: Mapping[str, Update]
    """By the official name of the parameter."""
    notes: Sequence[str] = ()
    """What a user should know, a clause each."""

    @cached_property
    def sha256(self) -> str:
        """Hash of the file, hexadecimal."""
        return sha256_of(self.path)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells two merges apart: the file, and how strongly each change is applied."""
        scales = {name: each.scale.value for name, each in self.updates.items() if each.scale}
        return {"sha256": self.sha256, "strength": self.strength, "scales": scales}

    @property
    def record(self) -> dict[str, Any]:
        """What a bundle's manifest says of it."""
        return {
            "file": self.path.name,
            "sha256": self.sha256,
            "strength": self.strength,
            "changes": [group.record for group in self._groups],
        }

    def describe(self) -> list[str]:
        """Lines for people: what is merged at which scale, then what is odd about it."""
        what = "; ".join(group.text for group in self._groups)
        notes = [*self.notes, *self._odd_scale()]
        return [
            f"adapter {self.path}: {what}; strength {self.strength:g}",
            *(f"warning: {self.path}: {note}" for note in notes),
        ]

    def _odd_scale(self) -> list[str]:
        least, most = _USUAL_SCALES
        scales = sorted(each.scale.value for each in self.updates.values() if each.scale)
        odd = [scale for scale in scales if not least <= abs(scale) <= most]
        return [
            f"a scale of {scale:g} is far from 1 (usual are {least:g} to {most:g}); if it is not "
            "meant, give the alpha that the adapter was trained with: --lora-alpha"
            for scale in odd[-1:]
        ]

    @cached_property
    def _groups(self) -> list[_Group]:
        found = defaultdict[tuple[str, str], list[Scale | None]](list)
        for update in self.updates.values():
            origin = "" if update.scale is None else update.scale.origin
            found[update.label, origin].append(update.scale)
        return [_Group(*key, scales) for key, scales in sorted(found.items())]


@dataclass(frozen=True)
class _Group:
    """Changes of one kind whose alpha is from one place."""

    label: str
    origin: str
    scales: Sequence[Scale | None]

    @property
    def record(self) -> dict[str, Any]:
        counted: dict[str, Any] = {"kind": self.label, "number": len(self.scales)}
        if any(self.scales):
            counted |= {"alpha_from": self.origin, **self._ranges}
        return counted

    @property
    def text(self) -> str:
        text = f"{len(self.scales)} x {self.label}"
        if any(self.scales):
            ranges = {
                name: "–".join(f"{end:g}" for end in dict.fromkeys(ends))
                for name, ends in self._ranges.items()
            }
            numbers = f"rank {ranges['rank']}, scale {ranges['scale']}"
            text += f", alpha {ranges['alpha']} ({self.origin}), {numbers}"
        return text

    @property
    def _ranges(self) -> dict[str, list[float]]:
        """Least and largest of each number."""
        scales = [scale for scale in self.scales if scale]
        return {
            name: [min(values), max(values)]
            for name, values in (
                ("alpha", [scale.alpha for scale in scales]),
                ("rank", [scale.rank for scale in scales]),
                ("scale", [scale.value for scale in scales]),
            )
        }
