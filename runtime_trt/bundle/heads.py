"""Head partition files: the project's `heads.json` and the formats published with the method.

Every format lists, per layer, `static_head` and `dynamic_head`; it is an object with `layers`, or
the bare list of layers. `fkv calibrate heads` writes the first form with more beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forcing_kv.runtime_trt.bundle.hashes import sha256_of
from forcing_kv.runtime_trt.bundle.schema import load_as, read_json
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import HeadPartition, ModelShape

HEADS_FORMAT = "forcing_kv.heads"
"""`format` entry of the project's own files."""
HEADS_SCHEMA_VERSION = 1
"""Newest `schema_version` that this reader understands."""

_MAX_COUNT = 1 << 16
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


@dataclass(frozen=True)
class _Layer:
    """A layer as every format lists it."""

    layer_idx: int | None = None
    static_head: tuple[int, ...] | None = None
    dynamic_head: tuple[int, ...] | None = None

    @property
    def heads(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.static_head or (), self.dynamic_head or ()


@dataclass(frozen=True)
class _Counts:
    """What a file that is an object may declare."""

    num_layers: int | None = None
    num_heads: int | None = None

    def __post_init__(self) -> None:
        for name, count in asdict(self).items():
            if count is not None and not 1 <= count <= _MAX_COUNT:
                raise InputError(f"`{name}` is {count}; it must be an integer of 1 to {_MAX_COUNT}")


@dataclass(frozen=True)
class _Model:
    sha256: str | None = None


@dataclass(frozen=True)
class _OwnEntries:
    """What the project's own files tell beside the partition."""

    model: _Model = _Model()
    scores: tuple[tuple[float, ...], ...] | None = None


def read_heads(path: Path, model: ModelShape | None = None) -> HeadFile:
    """Read a head partition file of any known format.

    Args:
        model: the model that it must fit; None accepts any size.

    Raises:
        InputError: the file is not readable as a partition, or is not one of `model`.
    """
    payload = read_json(path, "head partition file", _REMEDY)
    partition = parse_partition(payload, str(path), model)
    sha256 = sha256_of(path)
    if not _is_own(payload):
        return HeadFile(partition, sha256)
    return HeadFile(partition, sha256, *_own_entries(payload, partition, str(path)))


def parse_partition(payload: Any, where: str, model: ModelShape | None = None) -> HeadPartition:
    """Turn the JSON content of a partition file into a partition.

    Args:
        payload: an object with `layers` (a list, or an object keyed by layer), or a list of layers.
        model: the model that it must fit; None accepts any size.

    Raises:
        InputError: unknown form or version, a missing or repeated layer, a head that is in both
            lists, in neither, or not of this model, or another number of layers or heads.
    """
    _check_version(payload, where)
    declared = payload if isinstance(payload, Mapping) else {"layers": payload}
    counts = load_as(_Counts, declared, where, unknown="ignore")
    layers = _layers_by_index(declared.get("layers"), where)
    heads = {index: layer.heads for index, layer in layers.items()}
    highest = max((head for lists in heads.values() for head in (*lists[0], *lists[1])), default=0)
    num_layers = counts.num_layers or max(1, len(layers))
    num_heads = counts.num_heads or highest + 1
    if max(highest, len(layers)) >= _MAX_COUNT:
        raise InputError(
            f"{where}: head {highest} and {len(layers)} layers are more than any model has; "
            f"{_REMEDY}"
        )
    if model:
        _check_counts(counts, model, where)
        num_layers, num_heads = model.num_layers, model.num_heads
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
            f"{where}: head partition schema version {repr(version)[:40]}; this release reads "
            f"{HEADS_SCHEMA_VERSION}; upgrade forcing-kv or calibrate again with "
            "`fkv calibrate heads`"
        )


def _own_entries(
    payload: Mapping[str, Any], partition: HeadPartition, where: str
) -> tuple[str | None, tuple[tuple[float, ...], ...] | None]:
    own = load_as(_OwnEntries, payload, where, unknown="ignore")
    sizes = None if own.scores is None else [len(row) for row in own.scores]
    if sizes not in (None, [partition.num_heads] * partition.num_layers):
        raise InputError(
            f"{where}: `scores` must hold {partition.num_layers} layers of {partition.num_heads} "
            "heads; calibrate again with `fkv calibrate heads`"
        )
    return own.model.sha256, own.scores


def _layers_by_index(layers: Any, where: str) -> dict[int, _Layer]:
    """Layers by index; a layer without `layer_idx` has the index of its place."""
    if isinstance(layers, Mapping):
        places = [(_place(key), layers[key]) for key in layers]
    elif isinstance(layers, list):
        places = list(enumerate(layers))
    else:
        raise InputError(
            f"{where}: expected a list of layers or an object with `layers`, found "
            f"{type(layers).__name__}; {_REMEDY}"
        )
    found: dict[int, _Layer] = {}
    for place, content in places:
        layer = _read_layer(content, place, where)
        index = place if layer.layer_idx is None else layer.layer_idx
        if not isinstance(index, int) or index < 0:
            raise InputError(f"{where}: layer index {index!r} must be an integer from 0 on")
        if index in found:
            raise InputError(f"{where}: layer {index} is listed twice; keep one of them")
        found[index] = layer
    return found


def _place(key: str) -> int | str:
    """The layer that a key names; the key itself if it is no such number."""
    return int(key) if key.isdecimal() and len(key) < 10 else key


def _read_layer(content: Any, place: object, where: str) -> _Layer:
    if not isinstance(content, Mapping):
        raise InputError(f"{where}: layer {place} is not an object; {_REMEDY}")
    layer = load_as(_Layer, content, f"{where}: layer {place}", unknown="ignore")
    if layer.static_head is None and layer.dynamic_head is None:
        raise InputError(
            f"{where}: layer {place} has neither `static_head` nor `dynamic_head`; found "
            f"{sorted(content)}"
        )
    return layer


def _check_counts(counts: _Counts, model: ModelShape, where: str) -> None:
    for name, found in asdict(counts).items():
        needed = getattr(model, name)
        if found not in (None, needed):
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
    static: Sequence[int], dynamic: Sequence[int], num_heads: int, index: int, where: str
) -> tuple[int, ...]:
    """Sorted static heads, once every head is known to be in exactly one list."""
    listed, needed = Counter([*static, *dynamic]), set(range(num_heads))
    problems = {
        "in both lists": set(static) & set(dynamic),
        "in neither list": needed - set(listed),
        f"outside 0 to {num_heads - 1}": set(listed) - needed,
        "listed twice": {head for head, count in listed.items() if count > 1},
    }
    for problem, heads in problems.items():
        if heads:
            raise InputError(
                f"{where}: layer {index}: heads {sorted(heads)} are {problem}; each of the "
                f"{num_heads} heads must be in exactly one of `static_head` and `dynamic_head`; "
                f"{_REMEDY}"
            )
    return tuple(sorted(static))
