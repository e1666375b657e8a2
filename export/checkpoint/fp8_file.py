"""`fp8.json`: what `fkv calibrate fp8` measured, and what an export takes from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from forcing_kv.runtime_trt.bundle.fp8 import LINEARS
from forcing_kv.runtime_trt.bundle.schema import load_as, read_json
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import ModelShape

FP8_FORMAT = "forcing_kv.fp8"
FP8_SCHEMA_VERSION = 1
_ALIGNMENT = 16
"""Widths of an FP8 product are multiples of this (cuBLASLt)."""
_REMEDY = "make one with `fkv calibrate fp8`"


@dataclass(frozen=True)
class Fp8File:
    """A calibration of linear layers."""

    amax: Mapping[str, float]
    """Largest magnitude of each layer's input, by official name; absent layers are not rounded."""
    model_sha256: str | None = None
    """Hash of the checkpoint that was calibrated."""


@dataclass(frozen=True)
class _Model:
    sha256: str
    shape: ModelShape


@dataclass(frozen=True)
class _Linear:
    amax: float
    headroom: float | None = None
    """How much larger values could be before they are cut off, for people; so is `error`."""
    error: float | None = None


@dataclass(frozen=True)
class _Content:
    """The schema of the file."""

    format: str
    schema_version: int
    model: _Model
    linears: Mapping[str, _Linear]
    tool: Mapping[str, Any] = field(default_factory=dict)
    rollouts: Mapping[str, Any] = field(default_factory=dict)
    """What was observed, for people."""


def read_fp8(path: Path, model: ModelShape) -> Fp8File:
    """Read a calibration file.

    Raises:
        InputError: not readable as one, or made for another model.
    """
    content = read_json(path, "FP8 calibration", _REMEDY)
    found = content.get("format") if isinstance(content, Mapping) else None
    if found != FP8_FORMAT or content.get("schema_version") != FP8_SCHEMA_VERSION:
        raise InputError(
            f"{path}: not a {FP8_FORMAT} file of version {FP8_SCHEMA_VERSION} "
            f"(format {repr(found)[:40]}); {_REMEDY}"
        )
    try:
        loaded = load_as(_Content, content)
    except InputError as error:
        raise InputError(f"{path}: {error}; {_REMEDY}") from error
    source = loaded.model
    if source.shape != model:
        raise InputError(
            f"{path}: was made for a model of shape {asdict(source.shape)}, but this one is "
            f"{asdict(model)}; calibrate it with `fkv calibrate fp8`"
        )
    amax = {name: linear.amax for name, linear in loaded.linears.items()}
    check_amax(amax, model, str(path))
    return Fp8File(amax, source.sha256)


def check_amax(amax: Mapping[str, float], model: ModelShape, where: str) -> None:
    """Refuse layers and values that no FP8 export can serve.

    Raises:
        InputError: unknown layers, values that are not finite, q, k and v of a layer that differ,
            or a model whose widths FP8 products do not take.
    """
    known = {f"blocks.{layer}.{name}" for layer in range(model.num_layers) for name in LINEARS}
    unknown = sorted(set(amax) - known)
    if unknown:
        raise InputError(f"{where}: unknown layers {unknown[:3]}; a block has {list(LINEARS)}")
    bad = [name for name, value in amax.items() if not (math.isfinite(value) and value >= 0)]
    if bad:
        raise InputError(f"{where}: amax of {bad[:3]} is no finite magnitude; {_REMEDY}")
    for layer in range(model.num_layers):
        names = [f"blocks.{layer}.self_attn.{part}" for part in "qkv"]
        if len({amax.get(name) for name in names}) > 1:
            raise InputError(
                f"{where}: q, k and v of layer {layer} read one tensor and are one product, so "
                "they need one amax, or none of them any"
            )
    odd = [width for width in (model.dim, model.ffn_dim) if width % _ALIGNMENT]
    if odd:
        raise InputError(
            f"FP8 needs widths that are multiples of {_ALIGNMENT}; this model has {odd}. Export it "
            "without --fp8"
        )
