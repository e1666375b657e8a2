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

from forcing_kv.export.decoder.add import DecoderSource, frames_from_signed
from forcing_kv.export.decoder.vae_file import WanVae, load_wan_vae
from forcing_kv.runtime_trt.errors import require

CACHE_FRAMES = 2
"""Frames that a causal convolution of width 3 keeps."""


class _WanGraph(nn.Module):
    """What both decode graphs share: scaling, the cache, and which of its slots are in use."""

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, vae: Any, slots: Sequence[int], num_slots: int) -> None:
        super().__init__()
        self.vae = vae
        self._slots, self._num_slots = tuple(slots), num_slots
        for name in ("latents_mean", "latents_std"):
            values = vae.config[name]
            scale = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, scale, persistent=False)

    def run(self, latents: Tensor, cache: list[Any]) -> Tensor:
        """Decode [1, C, h, w] to pixels [1, 3, k, H, W] in -1..1; `cache` is replaced in place."""
        z = (latents * self.latents_std + self.latents_mean).unsqueeze(2)
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
        InputError: unreadable, or not exactly this auto-encoder.
    """
    return _source(load_wan_vae(path), latent_size, dtype, path)


def random_wan_decoder(latent_size: tuple[int, int], dtype: str, **config: Any) -> DecoderSource:
    """Wan2.1's VAE with diffusers' default initialisation, for its speed.

    Args:
        latent_size: latent rows and columns.
        config: entries of diffusers' configuration, where they differ from Wan2.1's.
    """
    vae = require("diffusers").AutoencoderKLWan(**config)
    return _source(WanVae(vae, {}), latent_size, dtype)


def _source(
    loaded: WanVae, latent_size: tuple[int, int], dtype: str, path: Path | None = None
) -> DecoderSource:
    vae = loaded.module
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
    return DecoderSource(
        "vae",
        decode,
        states,
        compute,
        vae.config.z_dim,
        decode_first,
        kept,
        path=path,
        weights={f"vae.{name}": value for name, value in loaded.weights.items()},
    )


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
