"""Where the tensors of a checkpoint lie: one file, or shards with an index or without."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forcing_kv.runtime_trt.bundle.schema import read_json
from forcing_kv.runtime_trt.errors import InputError

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
GGUF_SUFFIX = ".gguf"
SUFFIXES = (*SAFETENSORS_SUFFIXES, *TORCH_SUFFIXES, GGUF_SUFFIX)
INDEX_SUFFIX = ".index.json"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


@dataclass(frozen=True)
class WeightFiles:
    """The files of one checkpoint."""

    files: list[Path]
    """Every file that holds tensors, shards in order."""
    shard_of: Mapping[str, str] | None = None
    """File of each tensor; None without an index."""
    index: Path | None = None


def find_weights(path: Path) -> WeightFiles:
    """The files of a checkpoint.

    Args:
        path: a file, one of its shards, an index of shards, or the folder around one checkpoint.

    Raises:
        InputError: there is none, or more than one, or a shard is missing.
    """
    if path.is_dir():
        return find_weights(_only_one(path))
    if not path.is_file():
        problem = "is no regular file" if path.exists() else "no such checkpoint file"
        raise InputError(f"{path}: {problem}; give the checkpoint's file, index or folder")
    if path.name.endswith(INDEX_SUFFIX):
        return _indexed(path)
    if (match := _SHARD.fullmatch(path.name)) is None:
        return WeightFiles([path])
    index = path.with_name(f"{match[1]}{match[4]}{INDEX_SUFFIX}")
    if index.is_file():
        return _indexed(index)
    shards = [
        path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}{match[4]}")
        for number in range(1, int(match[3]) + 1)
    ]
    _check_present(path, shards)
    return WeightFiles(shards)


def read_shards(found: WeightFiles, read: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """The content of all shards.

    Raises:
        InputError: one of them does not hold what the index says, or two hold the same.
    """
    content: dict[str, Any] = {}
    holder: dict[str, str] = {}
    for file in found.files:
        shard = read(file)
        for name in shard:
            if name in holder:
                raise InputError(
                    f"{file}: {name} is in {holder[name]} too; the files are of different downloads"
                )
            stated = file.name if found.shard_of is None else found.shard_of.get(name, "no shard")
            if stated != file.name:
                raise InputError(
                    f"{file}: holds {name}, which is in {stated} by {found.index}; the files are "
                    "of different downloads"
                )
        holder |= dict.fromkeys(shard, file.name)
        content |= shard
    absent = sorted(set(found.shard_of or ()) - set(content))
    if absent:
        raise InputError(
            f"{found.index}: {len(absent)} tensors are in no shard, such as {absent[:3]}; the "
            "files are of different downloads"
        )
    return content


def _only_one(folder: Path) -> Path:
    """The one checkpoint of a folder, or of diffusers' `transformer` in it."""
    several: list[str] = []
    for endings in ((INDEX_SUFFIX, SAFETENSORS_SUFFIXES), (TORCH_SUFFIXES, GGUF_SUFFIX)):
        for place in (folder, folder / "transformer"):
            files = sorted(file for file in place.glob("*") if file.is_file())
            for ending in endings:
                fitting = [file for file in files if file.name.lower().endswith(ending)]
                # Shards of one checkpoint count as one.
                stems = {_SHARD.sub(r"\1-of-\3\4", file.name): file for file in fitting}
                if len(stems) == 1:
                    return next(iter(stems.values()))
                several += [file.name for file in fitting]
    found = f"; it holds {several[:6]}" if several else ""
    raise InputError(
        f"{folder}: this folder has no single checkpoint ({', '.join(SUFFIXES)}, or an index of "
        f"shards){found}; name the file"
    )


def _indexed(index: Path) -> WeightFiles:
    content = read_json(index, "index of shards", "download it again")
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise InputError(
            f"{index}: not an index of shards: its weight_map (tensor to file) is missing or empty"
        )
    for name, file in shard_of.items():
        plain = isinstance(file, str) and re.fullmatch(r"[^/\\\0]+", file)
        if not plain or not file.lower().endswith((*SAFETENSORS_SUFFIXES, *TORCH_SUFFIXES)):
            raise InputError(
                f"{index}: {name} lies in {str(file)[:80]!r}, which is no weight file beside the "
                "index; download it again"
            )
    files = [index.with_name(name) for name in sorted(set(shard_of.values()))]
    _check_present(index, files)
    return WeightFiles(files, shard_of, index)


def _check_present(path: Path, files: list[Path]) -> None:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(files)} shards are missing beside it, such as "
            f"{missing[:3]}; download them too"
        )
