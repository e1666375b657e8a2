"""The decoder of a tiny auto-encoder in TAEHV's format (taew2_1), a latent frame at a time.

Each block of memory sees its input and the input one frame before, so the state is the last input
of every such block. Architecture and file format: taehv.py of madebyollin/taehv at 1f14a56.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forcing_kv.export.checkpoint.files import read_tensor_file
from forcing_kv.export.decoder.add import DecoderSource, load_strictly, named_tensors
from forcing_kv.runtime_trt.errors import InputError

WIDTHS = (256, 128, 64, 64)
"""Channels of the four levels of the Wan2.1 file; others are read off the weights."""
TIME_GROWTH = (1, 2, 2)
"""Frames made of one, at each of the three growing levels."""
MEMORY_BLOCKS = 3
"""Memory blocks per level."""
LATENT_RANGE = 3.0
"""Latents are squeezed softly into plus-minus this."""


class MemoryBlock(nn.Module):
    """A residual block over a frame and the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, frames: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Run over frames [t, width, h, w]; `last` [1, width, h, w] is the frame before them."""
        before = torch.cat([last, frames[:-1]])
        return F.relu(self.conv(torch.cat([frames, before], dim=1)) + frames), frames[-1:]


class Grow(nn.Module):
    """Makes `factor` frames of each."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * factor, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """[t, width, h, w] -> [t * factor, width, h, w], in time order."""
        return self.conv(frames).reshape(-1, *frames.shape[1:])


class TinyDecoder(nn.Module):
    """TAEHV's decoder under the names of its file (`decoder.N...`)."""

    def __init__(self, latent_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        layers: list[nn.Module] = [
            nn.Identity(),
            nn.Conv2d(latent_channels, widths[0], 3, padding=1),
            nn.ReLU(),
        ]
        for width, following, growth in zip(widths, widths[1:], TIME_GROWTH, strict=False):
            layers += [MemoryBlock(width) for _ in range(MEMORY_BLOCKS)]
            layers += [
                nn.Upsample(scale_factor=2),
                Grow(width, growth),
                nn.Conv2d(width, following, 3, padding=1, bias=False),
            ]
        layers += [nn.ReLU(), nn.Conv2d(widths[-1], 3, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)

    def state_shapes(self, height: int, width: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the states for latent frames of this size."""
        shapes, scale = [], 1
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                shapes.append((1, layer.width, height * scale, width * scale))
            elif isinstance(layer, nn.Upsample):
                scale *= 2
        return tuple(shapes)

    def forward(self, latents: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode one latent frame.

        Args:
            latents: [1, C, h, w] float32.
            state: last input of each memory block.

        Returns:
            Frames [4, 3, 8h, 8w] float32, of which 0..1 is to be shown, and the new state.
        """
        dtype = state[0].dtype
        x = torch.tanh(latents / LATENT_RANGE).mul(LATENT_RANGE).to(dtype)
        new_state: list[Tensor] = []
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                x, last = layer(x, state[len(new_state)])
                new_state.append(last.clone())
            else:
                x = layer(x)
        return x.float(), new_state


def tiny_decoder(path: Path, latent_size: tuple[int, int], dtype: str = "float32") -> DecoderSource:
    """Load a TAEHV file for latent frames of one size.

    Args:
        path: `taew2_1.pth` or its `.safetensors` form.
        latent_size: latent rows and columns.

    Raises:
        InputError: unreadable, or not exactly this architecture.
    """
    weights = named_tensors(read_tensor_file(path), str(path))
    state = {name: value for name, value in weights.items() if not name.startswith("encoder.")}
    model = _model_of(state, str(path))
    # Files made for more growth hold the frames in time order; the last ones are wanted.
    for level in range(len(TIME_GROWTH)):
        key = f"decoder.{7 + 6 * level}.conv.weight"
        needed = len(model.get_parameter(key))
        if key in state and state[key].ndim and len(state[key]) % needed == 0:
            state[key] = state[key][-needed:]
    load_strictly(model, state, str(path))
    return _source(model, latent_size, dtype, path, {**weights, **state})


def _model_of(state: Mapping[str, Tensor], where: str) -> TinyDecoder:
    """The decoder of the size that a file has, without weights."""
    sized = [1, *(8 + 6 * level for level in range(len(TIME_GROWTH))), 22]
    convs = [state.get(f"decoder.{layer}.weight") for layer in sized]
    if convs[0] is None or convs[-1] is None:
        raise InputError(f"{where}: not a TAEHV file of Wan2.1 (taew2_1); its decoder is missing")
    found = [conv for conv in convs if conv is not None and conv.ndim == 4 and len(conv)]
    *widths, colours = (len(conv) for conv in found)
    if len(widths) != len(WIDTHS) or colours != 3 or not found[0].shape[1]:
        raise InputError(f"{where}: a TAEHV file of another model; give taew2_1 for Wan2.1")
    with torch.device("meta"):
        return TinyDecoder(found[0].shape[1], widths)


def random_tiny_decoder(
    latent_channels: int, widths: Sequence[int], latent_size: tuple[int, int], dtype: str
) -> DecoderSource:
    """A decoder with PyTorch's default initialisation, for its speed.

    Args:
        latent_channels: C.
        widths: channels of the four levels.
        latent_size: latent rows and columns.
    """
    return _source(TinyDecoder(latent_channels, widths), latent_size, dtype)


def _source(
    model: TinyDecoder,
    latent_size: tuple[int, int],
    dtype: str,
    path: Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> DecoderSource:
    model = model.to(getattr(torch, dtype)).eval().requires_grad_(False)
    num_trimmed = TIME_GROWTH[0] * TIME_GROWTH[1] * TIME_GROWTH[2] - 1
    states, compute = model.state_shapes(*latent_size), getattr(torch, dtype)
    return DecoderSource(
        "tae",
        model,
        states,
        compute,
        model.latent_channels,
        num_trimmed_frames=num_trimmed,
        path=path,
        weights=weights or {},
    )
