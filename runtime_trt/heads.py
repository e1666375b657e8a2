"""Head partition files: the project's `heads.json` and the formats published with the method.

Every format lists, per layer, `static_head` and `dynamic_head`; it is an object with `layers`, or
the bare list of layers. `fkv calibrate heads` writes the first form with more beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.layout import HeadPartition, ModelShape

HEADS_FORMAT = "forcing_kv.heads"
"""`format` entry of the project's own files."""
HEADS_SCHEMA_VERSION = 1
"""Newest `schema_version` that this reader understands."""

_LISTS = ("static_head", "dynamic_head")
_REMEDY = "use the partition made for this model, or make one with `fkv calibrate heads`"


@dataclass(frozen=True)
class HeadFile:
    """A head partition and what its file says about where it comes from."""

    partition: HeadPartition
    sha256: str
    """Hash of the file's bytes, hexadecimal."""
    model_sha256: str | None = None
    """Hash of the checkpoint that was calibrated; None in published files."""
    scores: tuple[tuple[float, ...], ...] | None = None
    """Score of each head [layer][head]; None in published files."""


def read_heads(path: Path, model: ModelShape | None = None) -> HeadFile:
    """Read a head partition file of any known format.

    Args:
        path: JSON file.
        model: the model that it must fit; None accepts any size.

    Raises:
        InputError: the file is not readable as a partition, or is not one of `model`.
    """
    try:
        content = path.read_bytes()
        payload = json.loads(content)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such head partition file; {_REMEDY}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not readable as a JSON head partition ({error}); {_REMEDY}"
        ) from error
    partition = parse_partition(payload, str(path), model)
    sha256 = hashlib.sha256(content).hexdigest()
    if not _is_own(payload):
        return HeadFile(partition, sha256)
    return HeadFile(partition, sha256, *_own_entries(payload, partition, str(path)))


def parse_partition(payload: Any, where: str, model: ModelShape | None = None) -> HeadPartition:
    """Turn the JSON content of a partition file into a partition.

    Args:
        payload: an object with `layers` (a list, or an object keyed by layer), or a list of layers.
        where: name of the source, for messages.
        model: the model that it must fit; None accepts any size.

    Raises:
        InputError: unknown form or version, a missing or repeated layer, a head that is in both
            lists, in neither, or not of this model, or another number of layers or heads.
    """
    _check_version(payload, where)
    declared: Mapping[str, Any] = payload if isinstance(payload, Mapping) else {}
    layers = declared.get("layers") if isinstance(payload, Mapping) else payload
    layers = _layers_by_index(layers, where)
    heads = {index: _read_layer(layer, index, where) for index, layer in layers.items()}
    highest = max((head for lists in heads.values() for head in (*lists[0], *lists[1])), default=0)
    num_layers = model.num_layers if model else _count(declared, "num_layers", len(layers), where)
    num_heads = model.num_heads if model else _count(declared, "num_heads", highest + 1, where)
    if declared and model:
        for name in ("num_layers", "num_heads"):
            _require_equal(declared, name, getattr(model, name), where)
    _check_layers(set(layers), num_layers, where)
    return HeadPartition(
        num_heads,
        tuple(_static_heads(*heads[index], num_heads, index, where) for index in range(num_layers)),
    )


def partition_layers(partition: HeadPartition) -> list[dict[str, Any]]:
    """The `layers` entry of a partition, in the published form."""
    return [
        {
            "layer_idx": layer,
            "static_head": list(partition.static_heads[layer]),
            "dynamic_head": list(partition.dynamic_heads(layer)),
        }
        for layer in range(partition.num_layers)
    ]


def _is_own(payload: Any) -> bool:
    return isinstance(payload, Mapping) and payload.get("format") == HEADS_FORMAT


def _check_version(payload: Any, where: str) -> None:
    if not _is_own(payload):
        return
    version = payload.get("schema_version")
    if version != HEADS_SCHEMA_VERSION:
        raise InputError(
            f"{where}: head partition schema version {version!r}; this release reads "
            f"{HEADS_SCHEMA_VERSION}; upgrade forcing-kv or calibrate again with "
            "`fkv calibrate heads`"
        )


def _own_entries(
    payload: Mapping[str, Any], partition: HeadPartition, where: str
) -> tuple[str | None, tuple[tuple[float, ...], ...] | None]:
    model = payload.get("model")
    sha256 = model.get("sha256") if isinstance(model, Mapping) else None
    scores = payload.get("scores")
    if scores is None:
        return sha256, None
    try:
        rows = tuple(tuple(float(score) for score in row) for row in scores)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{where}: `scores` must be numbers by layer and head ({error})"
        ) from error
    if [len(row) for row in rows] != [partition.num_heads] * partition.num_layers:
        raise InputError(
            f"{where}: `scores` must hold {partition.num_layers} layers of {partition.num_heads} "
            "heads; calibrate again with `fkv calibrate heads`"
        )
    return sha256, rows


def _layers_by_index(layers: Any, where: str) -> dict[int, Any]:
    """Layers by index; a layer without `layer_idx` has the index of its place."""
    if isinstance(layers, Mapping):
        places = [(int(key) if str(key).isdecimal() else key, layers[key]) for key in layers]
    elif isinstance(layers, list):
        places = list(enumerate(layers))
    else:
        raise InputError(
            f"{where}: expected a list of layers or an object with `layers`, found "
            f"{type(layers).__name__}; {_REMEDY}"
        )
    found: dict[int, Any] = {}
    for place, layer in places:
        if not isinstance(layer, Mapping):
            raise InputError(f"{where}: layer {place} is not an object; {_REMEDY}")
        index = layer.get("layer_idx", place)
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise InputError(f"{where}: layer index {index!r} must be an integer from 0 on")
        if index in found:
            raise InputError(f"{where}: layer {index} is listed twice; keep one of them")
        found[index] = layer
    return found


def _read_layer(layer: Mapping[str, Any], index: int, where: str) -> tuple[list[int], list[int]]:
    """Static and dynamic heads of a layer, as listed."""
    if not any(key in layer for key in _LISTS):
        raise InputError(
            f"{where}: layer {index} has neither `static_head` nor `dynamic_head`; found "
            f"{sorted(map(str, layer))}"
        )
    static, dynamic = (_head_list(layer.get(key), key, index, where) for key in _LISTS)
    return static, dynamic


def _head_list(value: Any, key: str, index: int, where: str) -> list[int]:
    if value is None:
        return []
    if not isinstance(value, list) or any(type(head) is not int for head in value):
        raise InputError(f"{where}: layer {index}: `{key}` must be a list of head indices")
    return value


def _count(declared: Mapping[str, Any], name: str, inferred: int, where: str) -> int:
    count = declared.get(name, inferred)
    if type(count) is not int or count < 1:
        raise InputError(f"{where}: `{name}` is {count!r}; it must be an integer >= 1")
    return count


def _require_equal(declared: Mapping[str, Any], name: str, needed: int, where: str) -> None:
    found = _count(declared, name, needed, where)
    if found != needed:
        raise InputError(f"{where}: `{name}` is {found}, but the model has {needed}; {_REMEDY}")


def _check_layers(found: set[int], num_layers: int, where: str) -> None:
    missing, extra = sorted(set(range(num_layers)) - found), sorted(found - set(range(num_layers)))
    if missing or extra:
        problem = f"layers {missing} are missing" if missing else f"layers {extra} are too many"
        raise InputError(
            f"{where}: {problem}: {len(found)} layers found, 0 to {num_layers - 1} needed, each "
            f"once; {_REMEDY}"
        )


def _static_heads(
    static: list[int], dynamic: list[int], num_heads: int, index: int, where: str
) -> tuple[int, ...]:
    """Sorted static heads, once every head is known to be in exactly one list."""
    listed, needed = static + dynamic, set(range(num_heads))
    problems = {
        "in both lists": set(static) & set(dynamic),
        "in neither list": needed - set(listed),
        f"outside 0 to {num_heads - 1}": set(listed) - needed,
        "listed twice": {head for head in listed if listed.count(head) > 1},
    }
    for problem, heads in problems.items():
        if heads:
            raise InputError(
                f"{where}: layer {index}: heads {sorted(heads)} are {problem}; each of the "
                f"{num_heads} heads must be in exactly one of `static_head` and `dynamic_head`; "
                f"{_REMEDY}"
            )
    return tuple(sorted(static))
