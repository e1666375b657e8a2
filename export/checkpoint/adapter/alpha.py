"""The one rule for alpha: option > file > preset, of the adapter that it names > rank.

In a file, a tensor beside the factors speaks for its layer; without one, safetensors metadata,
entries of a .pt file and PEFT's configuration speak for all, and have to agree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from forcing_kv.export.checkpoint.adapter.file import CONFIG_NAME, RawAdapter
from forcing_kv.export.checkpoint.adapter.peft_config import (
    PeftConfig,
    config_of_denoiser,
    peft_config,
)
from forcing_kv.runtime_trt.bundle.schema import read_json
from forcing_kv.runtime_trt.errors import InputError

_NAMES = ("ss_network_alpha", "network_alpha", "lora_alpha", "alpha")
_DIFFUSERS = "lora_adapter_metadata"
_CONFIGS = ("lora_config", "adapter_config", "peft_config", "config")
_UNSTATED = ("", "none", "dynamic")
"""What kohya writes where a file has no one alpha; its tensors state one a layer."""
FROM_RANK = "the rank, as nothing states it"
"""Origin of an alpha that gives a scale of 1."""


@dataclass(frozen=True)
class PublishedAlpha:
    """What a preset says of the adapter that goes with its checkpoint."""

    alpha: float
    files: tuple[str, ...]
    """The adapter's files as its project names them, folders included."""

    def is_of(self, path: Path) -> bool:
        """Whether a path ends in one of the names."""
        parts = path.absolute().parts
        return any(parts[-len(Path(name).parts) :] == Path(name).parts for name in self.files)


@dataclass(frozen=True)
class AlphaRule:
    """What is said of alpha outside of an adapter's own files."""

    option: float | None = None
    """`--lora-alpha`."""
    published: PublishedAlpha | None = None


@dataclass(frozen=True)
class Scale:
    """What the product of a layer's factors is multiplied by."""

    alpha: float
    rank: int
    origin: str
    """Who states alpha, for people."""
    stabilised: bool = False
    """Divided by the square root of the rank (rsLoRA)."""

    @property
    def value(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)


@dataclass(frozen=True)
class _Whole:
    """An alpha for every layer."""

    origin: str
    alpha: float

    def alpha_of(self, _: str) -> float | None:
        return self.alpha


@dataclass(frozen=True)
class Statements:
    """All that an adapter's files say of its scale."""

    wholes: Sequence[_Whole] = ()
    configs: Sequence[PeftConfig] = ()

    @property
    def stabilised(self) -> bool:
        return any(config.use_rslora for config in self.configs)

    @property
    def of_all_layers(self) -> Mapping[str, float]:
        """What is stated for no layer in particular."""
        said = {each.origin: each.alpha_of("") for each in self.configs}
        found = {short(origin): alpha for origin, alpha in said.items() if alpha is not None}
        return found | {each.origin: each.alpha for each in self.wholes}

    def alpha_of(self, spelled: str, where: str) -> tuple[float, str] | None:
        """What they agree on for a layer, and who states it.

        Raises:
            InputError: they disagree.
        """
        said = {each.origin: each.alpha_of(spelled) for each in self.wholes}
        said |= {each.origin: each.alpha_of(spelled) for each in self.configs}
        stated = {origin: alpha for origin, alpha in said.items() if alpha is not None}
        if len(set(stated.values())) > 1:
            raise InputError(
                f"{where}: alpha of {spelled} is {_listed(stated)}; say which one is right with "
                "--lora-alpha"
            )
        return next(((alpha, origin) for origin, alpha in stated.items()), None)


def read_statements(raw: RawAdapter, config: Path | None, where: str) -> Statements:
    """Collect what stands beside the tensors and in the configuration beside the file.

    Raises:
        InputError: an alpha is no finite number, or a configuration is not readable, or of an
            adapter that cannot be merged.
    """
    wholes, configs = list[_Whole](), list[PeftConfig]()
    for name in _NAMES:
        value = raw.entries.get(name)
        if isinstance(value, str) and value.strip().lower() in _UNSTATED:
            continue
        if value is not None and not isinstance(value, Mapping):
            wholes.append(_Whole(name, _number(value, f"{where}: {name}")))
    if (text := raw.entries.get(_DIFFUSERS)) is not None:
        configs.append(config_of_denoiser(text, f"{where}: {_DIFFUSERS}"))
    for name in _CONFIGS:
        entry = raw.entries.get(name)
        if isinstance(entry, Mapping) and {"lora_alpha", "alpha"} & set(entry):
            configs.append(peft_config(entry, f"{where}: {name}"))
    if config is not None:
        content = read_json(config, "adapter configuration", "save the adapter again, or remove it")
        configs.append(peft_config(content, str(config)))
    return Statements(wholes, configs)


def number_of(value: Tensor, where: str) -> float:
    """The number in a tensor of one element.

    Raises:
        InputError: it holds several, or one that is not finite.
    """
    if value.numel() != 1:
        raise InputError(f"{where} has shape {list(value.shape)}; it must be one number")
    return _number(value.item(), where)


def _number(value: Any, where: str) -> float:
    if isinstance(value, Tensor):
        return number_of(value, where)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise InputError(f"{where} is {str(value)[:60]!r}; alpha must be a finite number")
    return number


def scale_of(
    spelled: str,
    rank: int,
    tensor: tuple[float, str] | None,
    statements: Statements,
    rule: AlphaRule,
    where: Path,
) -> Scale:
    """Apply the rule to one layer.

    Args:
        spelled: the layer as the file calls it.
        rank: of its factors.
        tensor: the layer's own alpha and where it stands, if the file has one.
        where: the file.

    Raises:
        InputError: statements of one standing disagree, or the rank is not the configuration's.
    """
    for config in statements.configs:
        if (stated := config.rank_of(spelled)) not in (None, rank):
            raise InputError(
                f"{config.origin}: gives {spelled} rank {stated}, but {where} has factors of rank "
                f"{rank}; it is of another adapter: correct it or move it away"
            )
    published = rule.published
    if rule.option is not None:
        alpha, origin = rule.option, "--lora-alpha"
    elif found := tensor or statements.alpha_of(spelled, str(where)):
        alpha, origin = found
    elif published is not None and published.is_of(where):
        alpha, origin = published.alpha, "the preset"
    else:
        alpha, origin = float(rank), FROM_RANK
        if statements.stabilised:
            raise InputError(
                f"{where}: use_rslora is set but no alpha is stated; give it with --lora-alpha"
            )
    return Scale(alpha, rank, short(origin), statements.stabilised)


def short(origin: str) -> str:
    """An origin without the path of the file that is named before it anyway."""
    return CONFIG_NAME if origin.endswith(CONFIG_NAME) else origin.rpartition(": ")[2]


def _listed(stated: Mapping[str, Any]) -> str:
    return json.dumps({short(origin): value for origin, value in stated.items()})
