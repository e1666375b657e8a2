"""`--lora FILE[:STRENGTH]`: the file that it names, its tensors, and what it states beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from forcing_kv.export.checkpoint.files import read_tensor_file
from forcing_kv.export.checkpoint.shards import SAFETENSORS_SUFFIXES
from forcing_kv.runtime_trt.errors import InputError, require

CONFIG_NAME = "adapter_config.json"
_PEFT = ("adapter_model.safetensors", "adapter_model.bin")
_DIFFUSERS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
_ENTRIES = (
    "generator_lora",  # LongLive's trainer
    *("lora", "lora_state_dict", "lora_weights", "adapter"),
    *("state_dict", "model_state_dict", "generator", "model", "module"),
)
"""Entries under which trainers nest an adapter, the telling ones first."""
_MAX_DEPTH = 8


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that is asked for."""

    path: Path
    """File, or folder as PEFT and diffusers write them."""
    strength: float = 1.0
    """What its change is multiplied by."""

    @property
    def weights(self) -> Path:
        """The file that holds the tensors.

        Raises:
            InputError: there is none, or more than one.
        """
        if self.path.is_file():
            return self.path
        if not self.path.is_dir():
            raise InputError(f"{self.path}: no such adapter file or folder")
        sets = [[self.path / name for name in names] for names in (_PEFT, _DIFFUSERS)]
        found = [present[0] for names in sets if (present := [n for n in names if n.is_file()])]
        found = found or sorted(self.path.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        raise InputError(
            f"{self.path}: this folder has {[file.name for file in found]}; an adapter's has "
            f"{_PEFT[0]} or {_DIFFUSERS[0]}, or one .safetensors file: name the file"
        )

    @property
    def config(self) -> Path | None:
        """PEFT's configuration beside the file; None if there is none, or it is of another file."""
        file = self.weights
        config = file.with_name(CONFIG_NAME)
        other = any(file.with_name(name).is_file() for name in _PEFT) and file.name not in _PEFT
        return config if config.is_file() and not other else None


def adapter_files(
    given: str | PathLike[str] | Iterable[str | PathLike[str]],
) -> tuple[AdapterFile, ...]:
    """What `--lora` names, once or more often; see `adapter_file`."""
    texts = (given,) if isinstance(given, str | PathLike) else given
    return tuple(adapter_file(text) for text in texts)


def adapter_file(text: str | PathLike[str]) -> AdapterFile:
    """Read `FILE[:STRENGTH]`; a path that exists is taken whole, colons included.

    Raises:
        InputError: there is no such file, or the strength is no finite number.
    """
    whole = Path(text)
    name, colon, number = str(text).rpartition(":")
    if whole.exists() or not colon:
        file = AdapterFile(whole)
    else:
        file = AdapterFile(Path(name), _strength(str(text), number))
    _ = file.weights
    return file


def _strength(text: str, number: str) -> float:
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise InputError(
            f"--lora {text}: no such file, and {number!r} is no finite strength; give "
            "FILE[:STRENGTH], such as style.safetensors:0.8"
        )
    return strength


@dataclass(frozen=True)
class RawAdapter:
    """The content of an adapter file."""

    tensors: Mapping[str, Tensor]
    """By the names of the file, mapped to it."""
    entries: Mapping[str, Any]
    """What stands beside them: safetensors metadata, or the other entries of a .pt file."""


def read_raw(path: Path) -> RawAdapter:
    """Read an adapter file, whatever its tensors are nested in; never unpickles code.

    Raises:
        InputError: unreadable, or it is not clear where its tensors are.
    """
    raw, entries = read_tensor_file(path), dict[str, Any]()
    if path.suffix.lower() in SAFETENSORS_SUFFIXES:
        with require("safetensors").safe_open(path, framework="numpy") as file:
            entries |= file.metadata() or {}
    for _ in range(_MAX_DEPTH):
        raw = {str(key): value for key, value in raw.items()}
        tensors = {key: value for key, value in raw.items() if _is_tensor(key, value)}
        entries |= {key: value for key, value in raw.items() if key not in tensors}
        inner = _nested(raw, sorted(tensors), path)
        if inner is None:
            return RawAdapter(tensors, entries)
        entries.pop(inner)
        raw = raw[inner]
    raise InputError(f"{path}: nested over {_MAX_DEPTH} deep; save the adapter's tensors alone")


def _nested(raw: Mapping[str, Any], tensors: list[str], path: Path) -> str | None:
    """The entry that holds the adapter; None if `raw` is it."""
    filled = [key for key, value in raw.items() if _holds_tensors(value)]
    known = next((key for key in _ENTRIES if key in filled), None)
    if tensors and known is None:
        return None
    if tensors or (known is None and len(filled) > 1):
        places = [*tensors[:2], *filled][:8]
        raise InputError(f"{path}: holds tensors in several places ({places}); save one alone")
    return known or next(iter(filled), None)


def _holds_tensors(value: Any) -> bool:
    """Whether there are tensors in a mapping or in those that it holds, itself maybe among them."""
    waiting, seen = [value], set[int]()
    while waiting:
        mapping = waiting.pop()
        if not isinstance(mapping, Mapping) or id(mapping) in seen:
            continue
        seen.add(id(mapping))
        if any(_is_tensor(str(key), inner) for key, inner in mapping.items()):
            return True
        waiting += mapping.values()
    return False


def _is_tensor(key: str, value: Any) -> bool:
    """A number that a trainer keeps as a tensor, such as its step or alpha, is not one."""
    return isinstance(value, Tensor) and ("." in key or value.numel() != 1)
