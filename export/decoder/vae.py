"""The Wan2.1 video decoder, from diffusers, a latent frame at a time with its cache as state.

The first latent frame of a video makes one pixel frame: temporal upsampling begins with the second
(so 21 latent frames make 81 pixel frames, not 84). It has its own graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forcing_kv.export.checkpoint.files import read_tensor_file
from forcing_kv.export.decoder.add import DecoderSource, frames_from_signed, load_strictly
from forcing_kv.runtime_trt.errors import InputError, require

CACHE_FRAMES = 2
"""Frames that a causal convolution of width 3 keeps."""


class _WanGraph(nn.Module):
    """What both decode graphs share: scaling, the cache, and which of its slots are in use."""

    mean: Tensor
    std: Tensor

    def __init__(self, vae: Any, slots: Sequence[int], num_slots: int) -> None:
        super().__init__()
        self.vae = vae
        self._slots, self._num_slots = tuple(slots), num_slots
        for name, values in (("mean", vae.config.latents_mean), ("std", vae.config.latents_std)):
            scale = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, scale, persistent=False)

    def run(self, latents: Tensor, cache: list[Any]) -> Tensor:
        """Decode [1, C, h, w] to pixels [1, 3, k, H, W] in -1..1; `cache` is replaced in place."""
        z = (latents * self.std + self.mean).unsqueeze(2)
        x = self.vae.post_quant_conv(z.to(next(self.vae.parameters()).dtype))
        return self.vae.decoder(x, feat_cache=cache, feat_idx=[0])


class WanDecode(_WanGraph):
    """Every latent frame but the first."""

    def forward(self, latents: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """See `DecoderSource.decode`; four frames."""
        cache: list[Any] = [None] * self._num_slots
        for slot, value in zip(self._slots, state, strict=True):
            cache[slot] = value
        pixels = self.run(latents, cache)
        return frames_from_signed(pixels), [cache[slot] for slot in self._slots]


class WanDecodeFirst(_WanGraph):
    """The first latent frame.

    Its cache is brought to the shape of the others: a missing frame is one of zeros, as the
    convolutions pad. A temporal upsampling has not begun, so its cache stays zeros: it is none of
    `slots` here.
    """

    def forward(self, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See `DecoderSource.decode_first`; one frame."""
        cache: list[Any] = [None] * self._num_slots
        frames = frames_from_signed(self.run(latents, cache))
        state = []
        for slot in self._slots:
            missing = CACHE_FRAMES - cache[slot].shape[2]
            state.append(nn.functional.pad(cache[slot], (0, 0, 0, 0, missing, 0)))
        return frames, state


def wan_decoder(path: Path, latent_size: tuple[int, int], dtype: str = "float32") -> DecoderSource:
    """Load a Wan2.1 VAE for latent frames of one size.

    Args:
        path: a diffusers folder (with `vae`, or of the VAE itself), or `Wan2.1_VAE.pth`.
        latent_size: latent rows and columns.

    Raises:
        InputError: unreadable, or another auto-encoder.
    """
    vae = load_wan_vae(path)
    config = vae.config
    if config.patch_size is not None or config.is_residual:
        raise InputError(f"{path}: the VAE of Wan2.2; give Wan2.1's, which these models use")
    return _source(vae, latent_size, dtype, path.name)


def random_wan_decoder(latent_size: tuple[int, int], dtype: str, **config: Any) -> DecoderSource:
    """Wan2.1's VAE with diffusers' default initialisation, for its speed.

    Args:
        latent_size: latent rows and columns.
        config: entries of diffusers' configuration, where they differ from Wan2.1's.
    """
    vae = require("diffusers").AutoencoderKLWan(**config)
    return _source(vae, latent_size, dtype, "random weights")


def _source(vae: Any, latent_size: tuple[int, int], dtype: str, source: str) -> DecoderSource:
    # Not the model's own `to`, which warns of modules that it does not have.
    nn.Module.to(vae.eval().requires_grad_(False), getattr(torch, dtype))
    vae.encoder = nn.Identity()
    for module in vae.decoder.modules():
        # The same for a factor of 2, and known to every ONNX runtime.
        if isinstance(module, nn.Upsample) and module.mode == "nearest-exact":
            module.mode = "nearest"
    num_slots = vae._cached_conv_counts["decoder"]
    first, second = _cache_shapes(vae, num_slots, latent_size)
    begun = tuple(slot for slot in second if slot in first)
    places = list(second)
    decode, decode_first = WanDecode(vae, places, num_slots), WanDecodeFirst(vae, begun, num_slots)
    states, compute = tuple(second.values()), getattr(torch, dtype)
    kept = tuple(places.index(slot) for slot in begun)
    return DecoderSource("vae", decode, states, compute, decode_first, kept, source=source)


def _cache_shapes(
    vae: Any, num_slots: int, latent_size: tuple[int, int]
) -> list[dict[int, tuple[int, ...]]]:
    """Shape of every cache slot in use after the first and after the second latent frame."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    graph = _WanGraph(vae, (), num_slots)
    cache: list[Any] = [None] * num_slots
    found = []
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        for _ in range(2):
            graph.run(torch.zeros(1, vae.config.z_dim, *latent_size), cache)
            tensors = {i: value for i, value in enumerate(cache) if isinstance(value, Tensor)}
            found.append({i: tuple(value.shape) for i, value in tensors.items()})
    assert all(shape[2] == CACHE_FRAMES for shape in found[1].values())
    return found


def load_wan_vae(path: Path) -> Any:
    """A diffusers `AutoencoderKLWan` from a folder of it, or from Wan2.1's own file.

    Raises:
        InputError: missing, unreadable, or another auto-encoder.
    """
    kind = require("diffusers").AutoencoderKLWan
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        try:
            return kind.from_pretrained(str(folder), low_cpu_mem_usage=False, local_files_only=True)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(
                f"{folder}: diffusers cannot load it as a Wan VAE ({reason})"
            ) from error
    convert = require("diffusers.loaders.single_file_utils").convert_wan_vae_to_diffusers
    original = {k: v for k, v in read_tensor_file(path).items() if isinstance(v, Tensor)}
    if "decoder.conv1.weight" not in original:
        raise InputError(f"{path}: not a Wan2.1 VAE; give Wan2.1_VAE.pth or a diffusers folder")
    state = convert(original)
    vae = kind(
        base_dim=len(state["encoder.conv_in.weight"]), z_dim=len(state["post_quant_conv.weight"])
    )
    load_strictly(vae, state, str(path))
    return vae
