"""Model configuration files: the official `config.json` of Wan2.1, and diffusers' form of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forcing_kv.runtime_trt.bundle.schema import load_as
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import ModelShape


@dataclass(frozen=True)
class _Official:
    """What is read of the official form; its other entries do not change the model."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = ModelShape.in_channels
    out_dim: int | None = None
    freq_dim: int = ModelShape.freq_dim
    text_dim: int = ModelShape.text_dim
    text_len: int = ModelShape.text_len
    eps: float = ModelShape.eps
    patch_size: tuple[int, int, int] = (1, 2, 2)
    qk_norm: bool = True
    cross_attn_norm: bool = True
    model_type: str = "t2v"

    def shape(self, where: str) -> ModelShape:
        """The model's shape.

        Raises:
            InputError: a value that this project does not implement.
        """
        fixed = {"qk_norm": True, "cross_attn_norm": True, "model_type": "t2v"}
        for name, value in fixed.items():
            if (found := getattr(self, name)) != value:
                raise InputError(
                    f"{where}: {name} is {repr(found)[:40]}; only {value!r} is supported"
                )
        time, height, width = self.patch_size
        if time != 1 or height != width:
            raise InputError(
                f"{where}: patch_size is {list(self.patch_size)}; only [1, p, p] is supported"
            )
        if self.out_dim not in (None, self.in_dim):
            raise InputError(f"{where}: out_dim {self.out_dim} differs from in_dim")
        try:
            return ModelShape(
                self.num_layers, self.dim, self.ffn_dim, self.num_heads, self.in_dim,
                self.text_len, self.text_dim, self.freq_dim, height, self.eps,
            )  # fmt: skip
        except InputError as error:
            raise InputError(f"{where}: {error}") from error


@dataclass(frozen=True)
class _Diffusers:
    """What is read of diffusers' form."""

    num_attention_heads: int
    ffn_dim: int
    num_layers: int
    attention_head_dim: int = 128
    in_channels: int = ModelShape.in_channels
    out_channels: int | None = None
    freq_dim: int = ModelShape.freq_dim
    text_dim: int = ModelShape.text_dim
    eps: float = ModelShape.eps
    patch_size: tuple[int, int, int] = (1, 2, 2)
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None

    def official(self, where: str) -> _Official:
        """The official form of the same.

        Raises:
            InputError: a model that this project does not implement.
        """
        if self.image_dim is not None or self.added_kv_proj_dim is not None:
            raise InputError(f"{where}: an image-to-video model; only text-to-video is supported")
        if self.qk_norm != "rms_norm_across_heads":
            raise InputError(
                f"{where}: qk_norm is {self.qk_norm[:40]!r}; only 'rms_norm_across_heads' is "
                "supported"
            )
        return _Official(
            dim=self.num_attention_heads * self.attention_head_dim,
            ffn_dim=self.ffn_dim,
            num_heads=self.num_attention_heads,
            num_layers=self.num_layers,
            in_dim=self.in_channels,
            out_dim=self.out_channels,
            freq_dim=self.freq_dim,
            text_dim=self.text_dim,
            eps=self.eps,
            patch_size=self.patch_size,
            cross_attn_norm=self.cross_attn_norm,
        )


def model_shape_from_official(config: Any, where: str) -> ModelShape:
    """Read the `config.json` of a Wan2.1 model, official (`dim`, ...) or diffusers' form.

    Args:
        config: the parsed file.
        where: its name, for messages.

    Raises:
        InputError: a field is missing, of another type, or has a value that this project does not
            implement.
    """
    if not isinstance(config, Mapping):
        raise InputError(f"{where}: holds no JSON object; give the model's config.json")
    # Either form has entries that do not change the model; newer versions add some.
    if "num_attention_heads" in config:
        return load_as(_Diffusers, config, where, unknown="ignore").official(where).shape(where)
    missing = [name for name in ("dim", "ffn_dim", "num_heads", "num_layers") if name not in config]
    if missing:
        raise InputError(f"{where}: fields {missing} are missing; give an official Wan config")
    return load_as(_Official, config, where, unknown="ignore").shape(where)
