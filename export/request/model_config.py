"""Model configuration files: the official `config.json` of Wan2.1, and diffusers' form of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forcing_kv.runtime_trt.bundle.schema import load_as
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import ModelShape

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
_FIXED = {"qk_norm": True, "cross_attn_norm": True, "model_type": "t2v"}
_DIFFUSERS_FIELDS = {
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "num_attention_heads": "num_heads",
    **{name: name for name in ("ffn_dim", "freq_dim", "text_dim", "num_layers", "eps")},
    **{name: name for name in ("patch_size", "cross_attn_norm")},
}


def model_shape_from_official(config: Mapping[str, Any], where: str) -> ModelShape:
    """Read the `config.json` of a Wan2.1 model, official (`dim`, ...) or diffusers' form.

    Raises:
        InputError: a field is missing or has a value that this project does not implement.
    """
    if not isinstance(config, Mapping):
        raise InputError(f"{where}: holds no JSON object; give the model's config.json")
    if "num_attention_heads" in config:
        config = _official_from_diffusers(config, where)
    missing = [name for name in ("dim", "ffn_dim", "num_heads", "num_layers") if name not in config]
    if missing:
        raise InputError(f"{where}: fields {missing} are missing; give an official Wan config")
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise InputError(f"{where}: {name} is {config[name]!r}; only {value!r} is supported")
    patch = list(config.get("patch_size", [1, 2, 2]))
    if len(patch) != 3 or patch[0] != 1 or patch[1] != patch[2]:
        raise InputError(f"{where}: patch_size is {patch}; only [1, p, p] is supported")
    known = {ours: config[name] for name, ours in _OFFICIAL_FIELDS.items() if name in config}
    if config.get("out_dim", known.get("in_channels", 16)) != known.get("in_channels", 16):
        raise InputError(f"{where}: out_dim {config['out_dim']} differs from in_dim")
    return load_as(ModelShape, {"patch_size": patch[1], **known}, where)


def _official_from_diffusers(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    if config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
        raise InputError(f"{where}: an image-to-video model; only text-to-video is supported")
    if config.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
        raise InputError(
            f"{where}: qk_norm is {config['qk_norm']!r}; only 'rms_norm_across_heads' is supported"
        )
    official = {ours: config[name] for name, ours in _DIFFUSERS_FIELDS.items() if name in config}
    official["dim"] = config["num_attention_heads"] * config.get("attention_head_dim", 128)
    return official
