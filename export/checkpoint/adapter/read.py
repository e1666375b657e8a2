"""Adapter files to changes of named parameters; every tensor is used, named or refused."""

from __future__ import annotations

import math
from collections.abc import Sequence

from forcing_kv.export.checkpoint.adapter.adapter import Adapter
from forcing_kv.export.checkpoint.adapter.alpha import FROM_RANK, AlphaRule, read_statements
from forcing_kv.export.checkpoint.adapter.assemble import Assembly, parts_of, some
from forcing_kv.export.checkpoint.adapter.file import AdapterFile, RawAdapter, read_raw
from forcing_kv.export.checkpoint.adapter.names import TEXT_ENCODER, ModelNames
from forcing_kv.runtime_trt.bundle.atomic.places import without_links
from forcing_kv.runtime_trt.errors import InputError


def read_adapters(
    files: Sequence[AdapterFile], rule: AlphaRule, names: ModelNames
) -> tuple[Adapter, ...]:
    """Read the adapters that are to be merged together.

    Raises:
        InputError: one cannot be merged, one is named twice, or `--lora-alpha` is of several.
    """
    if rule.option is not None and not math.isfinite(rule.option):
        raise InputError(f"--lora-alpha is {rule.option}; it must be a finite number")
    if rule.option is not None and len(files) > 1:
        raise InputError(
            f"--lora-alpha is of one adapter, but --lora names {len(files)}; give each its "
            "strength, as FILE:STRENGTH"
        )
    paths = [without_links(file.weights) for file in files]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise InputError(f"{twice}: --lora names this file twice; name it once, with its strength")
    return tuple(read_adapter(file, rule, names) for file in files)


def read_adapter(file: AdapterFile, rule: AlphaRule, names: ModelNames) -> Adapter:
    """Read one adapter and check it against a model; only shapes are looked at.

    Raises:
        InputError: unreadable, of another model, or with a tensor that has no known meaning.
    """
    path = file.weights
    raw = read_raw(path)
    left_out = sorted(key for key in raw.tensors if TEXT_ENCODER.match(key))
    own = {key: value for key, value in raw.tensors.items() if key not in left_out}
    raw = RawAdapter(own, raw.entries)
    notes = [
        f"{len(left_out)} tensors are of a text encoder, such as {key}, and are left out: prompts "
        "are encoded without them"
        for key in left_out[:1]
    ]
    return adapter_of(raw, file, rule, names, notes)


def adapter_of(
    raw: RawAdapter,
    file: AdapterFile,
    rule: AlphaRule,
    names: ModelNames,
    notes: Sequence[str] = (),
) -> Adapter:
    """The changes that an adapter's tensors make; see `read_adapter`."""
    path = file.weights
    statements = read_statements(raw, file.config, str(path))
    assembly = Assembly(path, parts_of(raw.tensors, names, path), raw.tensors, statements, rule)
    updates = {name: assembly.update(name, names.shapes[name]) for name in assembly.parts}
    if not updates:
        raise InputError(
            f"{path}: holds no LoRA factors (such as lora_A and lora_B) nor differences; found "
            f"{some(raw.tensors)}"
        )
    scales = [update.scale for update in updates.values() if update.scale]
    if rule.option is not None and not scales:
        raise InputError(f"{path}: has no layer with an alpha; leave --lora-alpha out")
    notes = [*notes, *assembly.disagreement()]
    if rule.published and any(scale.origin == FROM_RANK for scale in scales):
        files = " or ".join(rule.published.files) or "an adapter that it does not name (`lora`)"
        notes.append(f"the preset's alpha, {rule.published.alpha:g}, is of {files}, so not used")
    return Adapter(path, file.strength, updates, notes)
