"""Reads Wan2.1's VAE as strictly as a denoiser: every tensor, every entry of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forcing_kv.export.checkpoint.files import read_checkpoint, read_tensor_file
from forcing_kv.export.checkpoint.shards import INDEX_SUFFIX
from forcing_kv.export.decoder.add import load_strictly
from forcing_kv.runtime_trt.bundle.schema import load_as, read_json
from forcing_kv.runtime_trt.errors import InputError, require

CLASS = "AutoencoderKLWan"
_REMEDY = "give the `vae` folder of Wan2.1 in diffusers' layout, or Wan2.1_VAE.pth"
_MOST = 1 << 16
"""Larger numbers are no sizes of an auto-encoder."""
_MOST_BLOCKS = 64
_LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
)  # fmt: skip


@dataclass(frozen=True)
class VaeConfig:
    """`config.json` of diffusers' class (0.42); an entry that is left out is Wan2.1's own.

    Raises:
        InputError: entries that contradict each other, or another model's.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = _LATENTS_MEAN
    latents_std: tuple[float, ...] = _LATENTS_STD
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int | None = 4
    scale_factor_spatial: int | None = 8

    def __post_init__(self) -> None:
        if self.patch_size is not None or self.is_residual:
            raise InputError("the VAE of Wan2.2; give Wan2.1's, which these models use")
        if (self.in_channels, self.out_channels) != (3, 3):
            raise InputError(
                f"in_channels and out_channels are {self.in_channels} and {self.out_channels}; "
                "only 3, red, green and blue, is supported"
            )
        num_levels = len(self.dim_mult)
        bases = (self.base_dim, self.decoder_base_dim or self.base_dim)
        widths = (self.z_dim, *(base * factor for base in bases for factor in (1, *self.dim_mult)))
        if min(widths) < 1 or max(widths) > _MOST or not 1 <= num_levels <= _MOST_BLOCKS:
            raise InputError(
                f"base_dim is {self.base_dim}, z_dim {self.z_dim} and dim_mult of {num_levels} "
                f"levels; widths must be from 1 to {_MOST}"
            )
        if not 1 <= self.num_res_blocks <= _MOST_BLOCKS:
            raise InputError(f"num_res_blocks is {self.num_res_blocks}; it must be 1 to 64")
        if len(self.temperal_downsample) != num_levels - 1:
            raise InputError(
                f"temperal_downsample has {len(self.temperal_downsample)} entries; dim_mult needs "
                f"{num_levels - 1}"
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                found = len(getattr(self, name))
                raise InputError(f"{name} has {found} entries; z_dim needs {self.z_dim}")
        if min(self.latents_std) <= 0:
            raise InputError(f"latents_std holds {min(self.latents_std)}; all must be positive")

    def build(self) -> Any:
        """The auto-encoder without weights, on the meta device: its size costs no memory."""
        entries = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
        with torch.device("meta"):
            return getattr(require("diffusers"), CLASS)(**entries)


@dataclass(frozen=True)
class WanVae:
    """An auto-encoder with its weights."""

    module: Any
    """diffusers' class."""
    weights: Mapping[str, Tensor]
    """As the file has them, under the module's names."""


def load_wan_vae(path: Path) -> WanVae:
    """Load Wan2.1's VAE.

    Args:
        path: a diffusers folder (with `vae`, or of the VAE itself), or Wan2.1's own file.

    Raises:
        InputError: missing, unreadable, or not exactly this auto-encoder.
    """
    if path.is_dir():
        return _from_folder(path / "vae" if (path / "vae").is_dir() else path)
    if not path.exists():
        raise InputError(f"{path}: no such file; {_REMEDY}")
    return _from_original(path)


def _from_folder(folder: Path) -> WanVae:
    config = _read_config(folder / "config.json")
    ends = (".safetensors", f".safetensors{INDEX_SUFFIX}")
    usual = (folder / f"diffusion_pytorch_model{end}" for end in ends)
    file = next((file for file in usual if file.is_file()), folder)
    read = read_checkpoint(file)
    if read.form is not None:
        raise InputError(f"{file}: is quantised ({read.form}); {_REMEDY}, unquantised")
    return _loaded(config, read.tensors, str(file))


def _read_config(path: Path) -> VaeConfig:
    content = read_json(path, "VAE config", _REMEDY)
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds no JSON object; {_REMEDY}")
    if (found := content.get("_class_name", CLASS)) != CLASS:
        raise InputError(f"{path}: describes {str(found)[:80]!r}, not {CLASS}; {_REMEDY}")
    # What begins so are diffusers' notes on the file.
    entries = {name: value for name, value in content.items() if not name.startswith("_")}
    return load_as(VaeConfig, entries, str(path))


def _from_original(path: Path) -> WanVae:
    original = {k: v for k, v in read_tensor_file(path).items() if isinstance(v, Tensor)}
    sizes = [original.get(name) for name in ("encoder.conv1.weight", "conv2.weight")]
    first, last = sizes
    if "decoder.conv1.weight" not in original or not (_is_conv(first) and _is_conv(last)):
        raise InputError(f"{path}: not a Wan2.1 VAE; {_REMEDY}")
    assert first is not None
    assert last is not None
    try:
        convert = require("diffusers.loaders.single_file_utils").convert_wan_vae_to_diffusers
        state = convert(dict(original))
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"{path}: not a Wan2.1 VAE ({error!r}); {_REMEDY}") from error
    try:
        config = VaeConfig(base_dim=len(first), z_dim=len(last))
    except InputError as error:
        raise InputError(f"{path}: not a Wan2.1 VAE: {error}; {_REMEDY}") from error
    return _loaded(config, state, str(path))


def _is_conv(weight: Tensor | None) -> bool:
    return weight is not None and weight.ndim == 5


def _loaded(config: VaeConfig, state: Mapping[str, Tensor], where: str) -> WanVae:
    module = config.build()
    load_strictly(module, state, where)
    return WanVae(module, state)
