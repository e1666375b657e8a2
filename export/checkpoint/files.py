"""Weight files to named tensors: single files, sharded folders, and what trainers nest them in.

Tensors stay mapped to their file, so reading costs no memory until they are converted. They are not
to be written to.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from forcing_kv.export.checkpoint.names import (
    Weights,
    is_diffusers,
    official_from_diffusers,
    strip_wrappers,
)
from forcing_kv.export.checkpoint.safetensors import map_safetensors
from forcing_kv.runtime_trt.bundle.hashes import sha256_of
from forcing_kv.runtime_trt.errors import InputError

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
INDEX_SUFFIX = ".safetensors.index.json"

_WRAPPERS = {
    "auto": ("generator_ema", "generator", "model", "state_dict"),
    "ema": ("generator_ema",),
    "plain": ("generator", "model", "state_dict"),
}


@dataclass(frozen=True)
class RawCheckpoint:
    """Tensors as a file names them, wrappers stripped."""

    path: Path
    layout: str
    """What the file was found to be, for people."""
    tensors: dict[str, Tensor]
    """Under the official names, mapped to the file, in the file's dtype."""


def read_checkpoint(path: Path, weights: Weights = "auto") -> RawCheckpoint:
    """Read a denoiser checkpoint of any supported layout; never unpickles code.

    Args:
        path: `.safetensors` or `.pt` file, a `.safetensors.index.json`, or a folder with one.
        weights: which state dict, where a trainer saved both: the averaged (`ema`) or the `plain`
            one; `auto` takes the averaged one if there is one.

    Raises:
        InputError: missing, unreadable, truncated, or of another type.
    """
    if weights not in get_args(Weights):
        raise InputError(f"weights is {weights!r}; choose one of {list(get_args(Weights))}")
    file = weight_file(path)
    raw: Mapping[str, Any]
    if file.name.endswith(INDEX_SUFFIX):
        raw, container = _read_shards(file)
    else:
        raw, container = read_tensor_file(file), file.suffix
    nesting: list[str] = []
    while key := next((k for k in _WRAPPERS[weights] if isinstance(raw.get(k), Mapping)), None):
        nesting.append(key)
        raw = cast(Mapping[str, Any], raw[key])
    if weights == "ema" and not nesting:
        raise InputError(
            f"{path}: holds no averaged weights (`generator_ema`); use --weights plain"
        )
    tensors = {strip_wrappers(k): v for k, v in raw.items() if isinstance(v, Tensor)}
    names = "official names"
    if is_diffusers(tensors):
        tensors = {official_from_diffusers(name): value for name, value in tensors.items()}
        names = "diffusers names"
    if not tensors:
        raise InputError(
            f"{path}: holds no tensors (entries: {sorted(map(str, raw))[:8]}); give a denoiser "
            "checkpoint"
        )
    layout = ", ".join((container, *(f"entry {key}" for key in nesting), names))
    return RawCheckpoint(path, layout, tensors)


def weight_file(path: Path) -> Path:
    """The file to read: `path`, or the one weight file or index of a folder.

    Raises:
        InputError: there is none, or more than one.
    """
    if path.is_dir():
        for folder in (path, path / "transformer"):
            for pattern in (f"*{INDEX_SUFFIX}", "*.safetensors"):
                found = sorted(folder.glob(pattern))
                if len(found) == 1:
                    return found[0]
        raise InputError(
            f"{path}: this folder has no single .safetensors file and no {INDEX_SUFFIX}; "
            "name the file"
        )
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    return path


def weight_files(path: Path) -> list[Path]:
    """Every file that holds tensors of a checkpoint, shards in order.

    Raises:
        InputError: one is missing.
    """
    file = weight_file(path)
    return _shards(file)[1] if file.name.endswith(INDEX_SUFFIX) else [file]


def checkpoint_sha256(path: Path) -> str:
    """Hash of a checkpoint, hexadecimal; of shards, the hash of their hashes."""
    hashes = [sha256_of(file) for file in weight_files(path)]
    return hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode()).hexdigest()


def read_tensor_file(path: Path) -> Mapping[str, Any]:
    """Read one weight file as it is, mapped rather than loaded.

    Raises:
        InputError: missing, unreadable, truncated, or of another type.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        if path.suffix in SAFETENSORS_SUFFIXES:
            loaded: Any = map_safetensors(path)
        elif path.suffix in TORCH_SUFFIXES:
            mapped = zipfile.is_zipfile(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        else:
            raise InputError(f"{path}: type {path.suffix!r}; give .safetensors or .pt")
    except InputError:
        raise
    except Exception as error:
        # The first sentence: PyTorch goes on to advise loading the file without its safeguard.
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        if "unable to mmap" in reason:
            raise InputError(
                f"{path}: cannot be mapped ({reason}); a {path.suffix} file has to fit into the "
                "memory, save it as .safetensors, which does not"
            ) from error
        raise InputError(
            f"{path}: cannot be read as a checkpoint ({reason}); it may be truncated or hold more "
            "than tensors: download it again and compare its size and checksum"
        ) from error
    if not isinstance(loaded, Mapping):
        raise InputError(f"{path}: holds a {type(loaded).__name__}, not named tensors")
    return loaded


def _shards(index: Path) -> tuple[dict[str, str], list[Path]]:
    """Tensor name -> shard, and the shards, all of them present."""
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
        files = sorted(index.parent / name for name in set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index}: not an index of safetensors shards ({error!r})") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise InputError(f"{index}: shards {missing} are missing beside it; download them too")
    return weight_map, files


def _read_shards(index: Path) -> tuple[dict[str, Tensor], str]:
    """All tensors that an index names, and how many shards there are."""
    weight_map, files = _shards(index)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(read_tensor_file(file))
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise InputError(
            f"{index}: {len(absent)} tensors are in no shard, such as {absent[:3]}; the files are "
            "of different downloads"
        )
    return tensors, f"{len(files)} safetensors shards"
