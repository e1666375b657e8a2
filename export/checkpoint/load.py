"""Checkpoints to models: any supported layout, adapters merged, every key checked."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from forcing_kv.export.checkpoint.adapter.adapter import Adapter
from forcing_kv.export.checkpoint.adapter.alpha import AlphaRule
from forcing_kv.export.checkpoint.adapter.file import AdapterFile, RawAdapter
from forcing_kv.export.checkpoint.adapter.merge import Merge
from forcing_kv.export.checkpoint.adapter.names import ModelNames, is_factor
from forcing_kv.export.checkpoint.adapter.read import adapter_of, read_adapters
from forcing_kv.export.checkpoint.files import (
    RawCheckpoint,
    checkpoint_sha256,
    read_checkpoint,
)
from forcing_kv.export.checkpoint.finite import IN_FILE, FiniteCheck
from forcing_kv.export.checkpoint.names import Weights
from forcing_kv.export.checkpoint.quantised import FP8_DTYPES
from forcing_kv.export.checkpoint.shards import find_weights
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.runtime_trt.dtypes import COMPUTE_DTYPES, DType, dtype_name
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import ModelShape

_log = logging.getLogger(__name__)

_MAX_COMPARED, _MAX_LENGTH = 2000, 120
"""Names of a file, and their characters, among which the nearest to a missing one is looked for."""
_OTHER_MODELS = {
    "img_emb.": "an image-to-video Wan model",
    "vace_blocks.": "a VACE Wan model",
    "token_embedding.": "the UMT5 text encoder",
    "encoder.": "an auto-encoder",
    "decoder.": "an auto-encoder",
    "input_blocks.": "a U-Net",
    "transformer_blocks.": "another diffusion transformer",
}
"""First parts of parameter names that give other models away."""


@dataclass(frozen=True)
class CheckpointSource:
    """Where the weights of a model come from."""

    path: Path
    """File, index or folder; see `read_checkpoint`."""
    weights: Weights = "auto"
    """Which state dict, where a trainer saved several."""
    adapters: tuple[AdapterFile, ...] = ()
    """What to merge, in whichever order."""
    alpha: AlphaRule = field(default_factory=AlphaRule)
    """What is said of the adapters' alpha outside of their files."""

    @property
    def label(self) -> str:
        """The checkpoint and what is merged into it, for messages."""
        adapters = ", ".join(f"{file.path}:{file.strength:g}" for file in self.adapters)
        return f"{self.path} with {adapters}" if adapters else str(self.path)


def model_sha256(source: CheckpointSource, adapters: Sequence[Adapter]) -> str:
    """Hash of what a source loads as, hexadecimal: the checkpoint's own if nothing is merged.

    Args:
        adapters: those of the source, in any order.
    """
    checkpoint = checkpoint_sha256(source.path)
    merged = [adapter.identity for adapter in adapters]
    if source.alpha.option is not None and not merged:
        # Of an adapter that is saved in the checkpoint.
        merged.append({"alpha": source.alpha.option})
    if not merged:
        return checkpoint
    parts = [checkpoint, *sorted(json.dumps(each, sort_keys=True) for each in merged)]
    return sha256("\n".join(parts).encode()).hexdigest()


def load_model(
    source: Path | CheckpointSource,
    shape: ModelShape,
    dtype: DType = "float32",
    *,
    checkpoint: RawCheckpoint | None = None,
    known: Mapping[str, ModelShape] = MappingProxyType({}),
    allow_non_finite: bool = False,
) -> CausalWanModel:
    """Load a checkpoint, one tensor at a time: never more than one model in memory.

    Args:
        source: checkpoint, with an adapter or not.
        dtype: dtype of the linear weights; norms, modulation and time embedding stay float32.
        checkpoint: the source's file, if it was read before.
        known: shapes of other models, to say which of them a file of another size is.
        allow_non_finite: take weights that are NaN or infinite as they are.

    Returns:
        The model in eval mode, without gradients. Tensors that the file holds in the wanted dtype
        stay mapped to the file.

    Raises:
        InputError: missing, extra or mis-shaped keys, with the nearest names; or weights that are
            not finite, in the file, with the adapter, or in `dtype`.
    """
    if dtype not in COMPUTE_DTYPES:
        raise InputError(f"dtype is {dtype!r}; allowed are {list(COMPUTE_DTYPES)}")
    if isinstance(source, Path):
        source = CheckpointSource(source)
    checkpoint = checkpoint or read_checkpoint(source.path, source.weights)
    names = ModelNames.of(shape)
    adapters, tensors = _adapters(source, checkpoint, names)
    with torch.device("meta"):
        model = CausalWanModel(shape)
    tensors = dict(tensors)
    check_keys(tensors, model.state_dict(), f"{source.path} ({checkpoint.layout})", known)
    _check_dtypes(tensors, str(source.path))
    merged = Merge(adapters)
    wanted: torch.dtype = getattr(torch, dtype)
    check = FiniteCheck(str(source.path))
    for name in list(tensors):
        compute = checkpoint.packed.get(name)
        given = tensors[name] if compute is None else compute()
        value = merged(name, given)
        tensors[name] = value.to(torch.float32 if model.is_island(name) else wanted)
        stages = {IN_FILE: given}
        if adapters:
            stages[f"once {', '.join(str(adapter.path) for adapter in adapters)} is merged"] = value
        check.look(name, tensors[name], stages)
    merged.finish()
    if not allow_non_finite:
        check.refuse()
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()


def _adapters(
    source: CheckpointSource, checkpoint: RawCheckpoint, names: ModelNames
) -> tuple[Sequence[Adapter], dict[str, Tensor]]:
    """The adapters to merge and the base weights.

    Raises:
        InputError: the checkpoint holds an adapter and another is given, or `--lora-alpha` is
            given without any.
    """
    factors = {name: value for name, value in checkpoint.tensors.items() if is_factor(name)}
    if not factors and not source.adapters and source.alpha.option is not None:
        raise InputError(
            f"--lora-alpha is of an adapter, but {source.path} holds none and --lora names none"
        )
    if not factors:
        return read_adapters(source.adapters, source.alpha, names), checkpoint.tensors
    others = {name: value for name, value in checkpoint.tensors.items() if name not in factors}
    if source.adapters or not others:
        raise InputError(
            f"{source.path}: holds an adapter already, so {source.adapters[0].path} cannot be "
            "merged too; leave one of them out"
            if source.adapters
            else f"{source.path}: is an adapter; give its base model with --checkpoint, and this "
            "with --lora"
        )
    if checkpoint.packed:
        raise InputError(
            f"{source.path}: holds an adapter to quantised weights; give the unquantised "
            "checkpoint and the adapter with --lora"
        )
    file = AdapterFile(find_weights(source.path).files[0])
    adapter = adapter_of(RawAdapter(factors, {}), file, source.alpha, names)
    for line in adapter.describe():
        _log.warning("%s", line)
    return [adapter], {name.replace(".base_layer.", "."): value for name, value in others.items()}


def check_keys(
    found: Mapping[str, Tensor],
    needed: Mapping[str, Tensor],
    where: str,
    known: Mapping[str, ModelShape] = MappingProxyType({}),
) -> None:
    """Refuse a state dict that is not exactly this model's.

    Raises:
        InputError: one message that lists what is missing, extra and mis-shaped.
    """
    missing, extra = sorted(set(needed) - set(found)), sorted(set(found) - set(needed))
    lines = []
    comparable = [key for key in extra if len(key) <= _MAX_LENGTH][:_MAX_COMPARED]
    for key in missing[:5]:
        near = difflib.get_close_matches(key, comparable, 1)
        lines.append(f"missing {key}" + (f" (nearest in the file: {near[0]})" if near else ""))
    lines += [f"unknown {key[:_MAX_LENGTH]}" for key in extra[:5]]
    shapes = [key for key in needed if key in found and found[key].shape != needed[key].shape]
    lines += [_of_shape(key, found[key], needed[key]) for key in shapes[:5]]
    if lines:
        counts = f"{len(missing)} missing, {len(extra)} unknown, {len(shapes)} mis-shaped keys"
        raise InputError(
            f"{where}: not a checkpoint of this model ({counts}{_guess(found, needed, known)}): "
            + "; ".join(lines)
            + "; check that the model config belongs to this file"
        )


def _of_shape(key: str, found: Tensor, needed: Tensor) -> str:
    turned = found.shape == needed.shape[::-1]
    note = "; it is transposed, give it as PyTorch's Linear has it, [out, in]" if turned else ""
    return f"{key} has shape {list(found.shape)}, needed {list(needed.shape)}{note}"


def _guess(
    found: Mapping[str, Tensor], needed: Mapping[str, Tensor], known: Mapping[str, ModelShape]
) -> str:
    """What the file seems to be instead, for the message; empty where it is not known."""
    for part, model in _OTHER_MODELS.items():
        if any(name.startswith(part) for name in found):
            return f"; it looks like {model}"
    width = "patch_embedding.bias"
    if width not in found or width not in needed:
        return ""
    sizes = [
        (tensors[width].numel(), len({n.split(".")[1] for n in tensors if n.startswith("blocks.")}))
        for tensors in (found, needed)
    ]
    if sizes[0] == sizes[1]:
        return ""
    (dim, layers), (wanted_dim, wanted_layers) = sizes
    fits = [name for name, shape in known.items() if (shape.dim, shape.num_layers) == sizes[0]]
    return (
        f"; it is a Wan model of width {dim} with {layers} layers, needed {wanted_dim} with "
        f"{wanted_layers}" + (f"; it fits --model {' or '.join(fits)}" if fits else "")
    )


def _check_dtypes(tensors: Mapping[str, Tensor], where: str) -> None:
    allowed = (torch.float32, torch.bfloat16, torch.float16, torch.float64, *FP8_DTYPES)
    wrong = [name for name, value in tensors.items() if value.dtype not in allowed]
    if wrong:
        raise InputError(
            f"{where}: {len(wrong)} of {len(tensors)} tensors are quantised or no real numbers, "
            f"such as {wrong[0]} ({dtype_name(tensors[wrong[0]].dtype)}); wanted are "
            f"{[dtype_name(dtype) for dtype in allowed]}; give the unquantised checkpoint"
        )
