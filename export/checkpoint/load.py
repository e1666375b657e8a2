"""Checkpoints to models: any supported layout, adapters merged, every key checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from forcing_kv.export.checkpoint.files import RawCheckpoint, read_checkpoint
from forcing_kv.export.checkpoint.finite import IN_FILE, FiniteCheck
from forcing_kv.export.checkpoint.lora import (
    Adapter,
    adapter_from_tensors,
    check_adapter,
    read_adapter,
)
from forcing_kv.export.checkpoint.names import Weights
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.runtime_trt.dtypes import COMPUTE_DTYPES, DType
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import ModelShape

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
    lora: Path | None = None
    """Adapter to merge."""
    lora_alpha: float | None = None
    """Alpha of an adapter whose file does not state it; None for its rank (a scale of 1)."""


def load_model(
    source: Path | CheckpointSource,
    shape: ModelShape,
    dtype: DType = "float32",
    *,
    allow_non_finite: bool = False,
) -> CausalWanModel:
    """Load a checkpoint, one tensor at a time: never more than one model in memory.

    Args:
        source: checkpoint, with an adapter or not.
        dtype: dtype of the linear weights; norms, modulation and time embedding stay float32.
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
    checkpoint = read_checkpoint(source.path, source.weights)
    adapter, tensors = _adapter(source, checkpoint)
    with torch.device("meta"):
        model = CausalWanModel(shape)
    check_keys(tensors, model.state_dict(), f"{source.path} ({checkpoint.layout})")
    _check_dtypes(tensors, str(source.path))
    if adapter is not None:
        check_adapter(adapter, tensors)
    wanted: torch.dtype = getattr(torch, dtype)
    check = FiniteCheck(str(source.path))
    for name in list(tensors):
        given = value = tensors[name]
        layer = name.removesuffix(".weight")
        if adapter is not None and name.endswith(".weight") and layer in adapter.down:
            value = value.float() + adapter.delta(layer, source.lora_alpha)
        tensors[name] = value.to(torch.float32 if model.is_island(name) else wanted)
        stages = {IN_FILE: given}
        if adapter is not None:
            stages[f"once {adapter.where} is merged"] = value
        check.look(name, tensors[name], stages)
    if not allow_non_finite:
        check.refuse()
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()


def _adapter(
    source: CheckpointSource, checkpoint: RawCheckpoint
) -> tuple[Adapter | None, dict[str, Tensor]]:
    """The adapter to merge, if any, and the base weights."""
    packed = any(".lora_A." in name for name in checkpoint.tensors)
    if packed and source.lora is not None:
        raise InputError(
            f"{source.path}: holds an adapter already, so {source.lora} cannot be merged too; "
            "leave one of them out"
        )
    if packed:
        return adapter_from_tensors(checkpoint.tensors, str(source.path))
    return (None if source.lora is None else read_adapter(source.lora)), checkpoint.tensors


def check_keys(found: Mapping[str, Tensor], needed: Mapping[str, Tensor], where: str) -> None:
    """Refuse a state dict that is not exactly this model's.

    Raises:
        InputError: one message that lists what is missing, extra and mis-shaped.
    """
    missing, extra = sorted(set(needed) - set(found)), sorted(set(found) - set(needed))
    lines = []
    for key in missing[:5]:
        near = difflib.get_close_matches(key, extra, 1)
        lines.append(f"missing {key}" + (f" (nearest in the file: {near[0]})" if near else ""))
    lines += [f"unknown {key}" for key in extra[:5]]
    shapes = [key for key in needed if key in found and found[key].shape != needed[key].shape]
    lines += [
        f"{key} has shape {list(found[key].shape)}, needed {list(needed[key].shape)}"
        for key in shapes[:5]
    ]
    if lines:
        counts = f"{len(missing)} missing, {len(extra)} unknown, {len(shapes)} mis-shaped keys"
        raise InputError(
            f"{where}: not a checkpoint of this model ({counts}{_guess(found, needed)}): "
            + "; ".join(lines)
            + "; check that the model config belongs to this file"
        )


def _guess(found: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> str:
    """What the file seems to be instead, for the message; empty where it is not known."""
    for part, model in _OTHER_MODELS.items():
        if any(name.startswith(part) for name in found):
            return f"; it looks like {model}"
    width = "patch_embedding.bias"
    if width not in found or width not in needed:
        return ""
    sizes = [
        (len(tensors[width]), len({n.split(".")[1] for n in tensors if n.startswith("blocks.")}))
        for tensors in (found, needed)
    ]
    if sizes[0] == sizes[1]:
        return ""
    (dim, layers), (wanted_dim, wanted_layers) = sizes
    return (
        f"; it is a Wan model of width {dim} with {layers} layers, needed {wanted_dim} with "
        f"{wanted_layers}"
    )


def _check_dtypes(tensors: Mapping[str, Tensor], where: str) -> None:
    allowed = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    wrong = [name for name, value in tensors.items() if value.dtype not in allowed]
    if wrong:
        raise InputError(
            f"{where}: {len(wrong)} tensors are quantised, such as {wrong[0]} "
            f"({tensors[wrong[0]].dtype}); give the unquantised checkpoint"
        )
