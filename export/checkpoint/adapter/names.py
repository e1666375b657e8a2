"""What a tensor of an adapter is called by each trainer: which parameter it changes, and how.

A name is a wrapper, a module and a role: `diffusion_model.` `blocks.0.ffn.2` `.lora_down.weight`.
Modules are resolved against the model's own names, never guessed at.

Source: the formats are those of PEFT and diffusers (0.42), musubi-tuner, ComfyUI, LightX2V,
DiffSynth-Studio and LyCORIS, as their loaders and savers stood in 2026.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from forcing_kv.export.checkpoint.names import (
    OFFICIAL_OF_MODULE,
    official_from_diffusers,
    strip_wrappers,
)
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.runtime_trt.rollout.layout import ModelShape

_LEADING = ("transformer.", "pipe.dit.", "dit.", "unet.")
"""Names of enclosing modules: diffusers, DiffSynth, older pipelines."""
_FLAT = re.compile(r"(?:lora_unet__?|lora_transformer_|lycoris_)(?=[a-z])")
"""kohya and musubi, Wan-Fun (two underscores), OneTrainer, SimpleTuner: dots are underscores."""
TEXT_ENCODER = re.compile(
    r"(?:lora_(?:prior_)?te\d*_|text_encoders?(?:_\d+)?\.|text_model\.|t5xxl\.)"
)
_NAMED = r"(?:\.(?!weight$|bias$)[\w-]+)?"
"""PEFT's name of the adapter, in files that trainers save themselves."""
_UP = r"(?:\.lora_(?:B|up)|[._]lora\.up|\.lora_linear_layer\.up)" + _NAMED
_DOWN = r"(?:\.lora_(?:A|down)|[._]lora\.down|\.lora_linear_layer\.down)" + _NAMED
_ROLES = {
    "down": _DOWN + r"(?:\.weight)?",
    "up": _UP + r"(?:\.weight)?",
    "up_bias": _UP + r"\.bias",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
    "magnitude": r"\.lora_magnitude_vector" + _NAMED + r"(?:\.weight)?",
    "dora_scale": r"\.dora_scale",
    **{
        part: rf"\.{part}{_NAMED}"
        for kind, numbers in (("hada", ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
                              ("lokr", ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")))
        for part in (f"{kind}_{number}" for number in numbers)
    },
    "diff": r"\.(?:diff|w_norm)",
    "diff_bias": r"\.(?:diff_b|b_norm)",
    "diff_modulation": r"\.diff_m",
    "value": r"\.set_weight",
}  # fmt: skip
ROLES: Mapping[str, re.Pattern[str]] = {
    role: re.compile(rf"(?P<module>.+?){suffix}") for role, suffix in _ROLES.items()
}
"""What a tensor is to its parameter -> names of such tensors."""

_PACKED = ("down", "up", "up_bias", "mid", "alpha", "magnitude", "dora_scale")


@dataclass(frozen=True)
class Part:
    """A tensor of an adapter, understood."""

    key: str
    """Its name in the file."""
    parameter: str
    """Official name of what it changes."""
    role: str
    """One of `ROLES`; `value` also where the file names the parameter itself."""
    spelled: str
    """The module as the file calls it, without wrappers; PEFT's patterns are matched with it."""


class UnknownNameError(ValueError):
    """A name that is no adapter tensor of the model; the message says what it is instead."""


@dataclass(frozen=True)
class ModelNames:
    """The parameters of a denoiser, by which names are resolved."""

    shapes: Mapping[str, Sequence[int]]
    """Official name of every parameter -> its shape."""

    @classmethod
    def of(cls, shape: ModelShape) -> ModelNames:
        """Those of a model of this shape."""
        with torch.device("meta"):
            state = CausalWanModel(shape).state_dict()
        return cls({name: tuple(value.shape) for name, value in state.items()})

    def part(self, key: str) -> Part:
        """Understand the name of an adapter's tensor.

        Raises:
            UnknownNameError: it is none, or one of a layer that the model lacks.
        """
        name = _unwrapped(key)
        for role, pattern in ROLES.items():
            if match := pattern.fullmatch(name):
                return Part(key, self._parameter(match["module"], role), role, match["module"])
        whole = official_from_diffusers(name.replace(".base_layer.", "."))
        if whole not in self.shapes:
            raise UnknownNameError("is no tensor of an adapter")
        return Part(key, whole, "value", name.rpartition(".")[0])

    def _parameter(self, spelled: str, role: str) -> str:
        """Official name of what a tensor with this role changes in a module."""
        module = self._module(spelled.replace(".base_layer", ""))
        kind = {"up_bias": "bias", "diff_bias": "bias", "diff_modulation": "modulation"}.get(role)
        names = (f"{module}.{kind or 'weight'}", module if kind is None else None)
        found = next((name for name in names if name in self.shapes), None)
        if found is None:
            raise UnknownNameError(f"is of {spelled}, which the model does not have")
        return found

    def _module(self, spelled: str) -> str:
        """Official name of a module or parameter, as far as it is one."""
        if flat := _FLAT.match(spelled):
            found = self._flattened.get(spelled[flat.end() :], ())
            return found[0] if len(found) == 1 else spelled
        whole = official_from_diffusers(spelled)
        return whole if whole in self.shapes else _official_module(spelled)

    @cached_property
    def _flattened(self) -> Mapping[str, Sequence[str]]:
        """Names of modules with underscores for dots, official and diffusers' -> official names."""
        theirs = {official: name for name, official in OFFICIAL_OF_MODULE.items()}
        found = defaultdict[str, list[str]](list)
        for module in sorted({name.rpartition(".")[0] for name in self.shapes}):
            block = re.match(r"blocks\.\d+\.", module)
            start = block[0] if block else ""
            renamed = start + theirs.get(module.removeprefix(start), module.removeprefix(start))
            for name in {module, renamed}:
                found[name.replace(".", "_")].append(module)
        return found


def is_factor(name: str) -> bool:
    """Whether a tensor of a checkpoint is one of an adapter that was saved in it, unmerged."""
    return any(ROLES[role].fullmatch(name) for role in _PACKED)


def _official_module(name: str) -> str:
    return official_from_diffusers(f"{name}.weight").removesuffix(".weight")


def _unwrapped(key: str) -> str:
    """A name without what trainers and pipelines put in front of it."""
    while True:
        name = strip_wrappers(key)
        name = next((name.removeprefix(p) for p in _LEADING if name.startswith(p)), name)
        if name == key:
            return name
        key = name
