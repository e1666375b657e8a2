"""Checkpoint files to models: formats, prefixes and key checks."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forcing_kv.export.denoiser import CausalWanModel
from forcing_kv.runtime_trt.errors import InputError, require
from forcing_kv.runtime_trt.layout import ModelShape

WRAPPER_KEYS = ("generator_ema", "generator", "model", "state_dict")
"""Entries under which trainers nest the denoiser's state dict, best first."""
PREFIXES = ("model.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""Name parts that wrappers leave in keys."""

_OFFICIAL_FIELDS = {
    "in_dim": "in_channels",
    "dim": "dim",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "text_len": "text_len",
    "num_heads": "num_heads",
    "num_layers": "num_layers",
    "eps": "eps",
}


def model_shape_from_official(config: Mapping[str, Any], where: str) -> ModelShape:
    """Read the official `config.json` of a Wan2.1 model (`dim`, `num_layers`, `in_dim`, ...).

    Raises:
        InputError: a field is missing or has a value that this project does not implement.
    """
    missing = [name for name in ("dim", "ffn_dim", "num_heads", "num_layers") if name not in config]
    if missing:
        raise InputError(f"{where}: fields {missing} are missing; give an official Wan config")
    fixed = {"qk_norm": True, "cross_attn_norm": True, "model_type": "t2v"}
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise InputError(f"{where}: {name} is {config[name]!r}; only {value!r} is supported")
    patch = list(config.get("patch_size", [1, 2, 2]))
    if len(patch) != 3 or patch[0] != 1 or patch[1] != patch[2]:
        raise InputError(f"{where}: patch_size is {patch}; only [1, p, p] is supported")
    known = {ours: config[name] for name, ours in _OFFICIAL_FIELDS.items() if name in config}
    if config.get("out_dim", known.get("in_channels", 16)) != known.get("in_channels", 16):
        raise InputError(f"{where}: out_dim {config['out_dim']} differs from in_dim")
    return ModelShape(patch_size=patch[1], **known)


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a `.safetensors` or `.pt` file into the official names; never unpickles code.

    Raises:
        InputError: the file is missing, unreadable, or of another type.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".safetensors":
            raw = require("safetensors.torch").load_file(path)
        elif path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
            raw = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            raise InputError(f"{path}: type {path.suffix!r}; give .safetensors or .pt")
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: cannot be read as a checkpoint ({error})") from error
    return _unwrap(raw)


def _unwrap(raw: Mapping[str, Any]) -> dict[str, Tensor]:
    for key in WRAPPER_KEYS:
        if isinstance(raw.get(key), Mapping):
            return _unwrap(raw[key])
    state: dict[str, Tensor] = {}
    for key, value in raw.items():
        if not isinstance(value, Tensor):
            continue
        for prefix in PREFIXES:
            key = key.replace(prefix, "") if prefix[0] == "_" else key.removeprefix(prefix)
        state[key] = value
    return state


def load_model(path: Path, shape: ModelShape) -> CausalWanModel:
    """Load a checkpoint into a float32 model.

    Raises:
        InputError: missing, extra or mis-shaped keys, with the nearest names.
    """
    state = load_state_dict(path)
    with torch.device("meta"):
        model = CausalWanModel(shape)
    check_keys(state, model.state_dict(), str(path))
    model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return model.requires_grad_(False).eval()


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
            f"{where}: not a checkpoint of this model ({counts}): "
            + "; ".join(lines)
            + "; check that the model config belongs to this file"
        )


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        InputError: missing or malformed.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
