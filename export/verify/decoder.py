"""A decoder's backend against eager PyTorch on the bundle's own graphs: every output, streaming.

The reference computes in float32. A float16 decoder is allowed what a 16-bit denoiser is: see
`verify_bundle`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from forcing_kv.export.decoder.onnx_module import OnnxModule
from forcing_kv.export.verify.bundle import TensorCheck, plain
from forcing_kv.runtime_trt.bundle.graph_info import TensorInfo
from forcing_kv.runtime_trt.bundle.manifest import DecoderInfo, Manifest
from forcing_kv.runtime_trt.decode.runner import (
    DECODE,
    FRAMES,
    Float32,
    StateDecodeRunner,
    state_inputs,
)
from forcing_kv.runtime_trt.decoder import VideoDecoder
from forcing_kv.runtime_trt.rollout.noise import draw_noise

NUM_FRAMES = 5
"""Latent frames decoded: the first one, and both sets of state twice."""


class EagerDecodeRunner(StateDecodeRunner):
    """The graphs of a bundle's decoder as plain PyTorch.

    Args:
        in_float32: compute in float32, whatever the decoder's dtype.
    """

    name = "eager"

    def __init__(self, bundle: Path, info: DecoderInfo, *, in_float32: bool) -> None:
        super().__init__(info.graphs)
        self._in_float32 = in_float32
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._modules = {
            name: OnnxModule(bundle / graph.file, info.weights_file)
            for name, graph in info.graphs.items()
        }
        for module in self._modules.values():
            (module.in_float32() if in_float32 else module).to(self._device)

    def _zeros(self, info: TensorInfo) -> Tensor:
        dtype = torch.float32 if self._in_float32 else getattr(torch, info.dtype)
        return torch.zeros(info.shape, dtype=dtype, device=self._device)

    @torch.inference_mode()
    def _outputs(self, graph: str, latents: Float32) -> dict[str, Any]:
        info = self._graphs[graph]
        state = [self._state[port.name] for port in state_inputs(info)]
        frames, made = self._modules[graph](torch.from_numpy(latents).to(self._device), state)
        names = [port.name for port in info.outputs if port.name != FRAMES]
        return {FRAMES: frames, **dict(zip(names, made, strict=True))}

    def _to_host(self, array: Tensor) -> NDArray[Any]:
        return array.cpu().numpy()

    def close(self) -> None:
        self._modules.clear()
        super().close()


@dataclass
class DecoderReport:
    """Verdict on one decoder on one backend."""

    bundle: str
    decoder: str
    backend: str
    dtype: str
    tensors: list[TensorCheck] = field(default_factory=list)
    """Frames and every state at their worst, the worst first; `chunk` is the latent frame."""

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.tensors)

    def to_json(self) -> dict[str, Any]:
        return plain({"passed": self.passed, **asdict(self)})


def verify_decoder(
    bundle: Path, manifest: Manifest, kind: str, decoder: VideoDecoder, *, seed: int = 0
) -> DecoderReport:
    """Compare a decoder's backend with eager PyTorch.

    Args:
        kind: vae or tae.
        decoder: opened on it, with `allow_non_finite`; reset, and not closed.
        seed: key of the latents.
    """
    info = manifest.decoders[kind]
    (dtype,) = {port.dtype for port in state_inputs(info.graphs[DECODE])}
    reference, same_dtype = (
        VideoDecoder(
            EagerDecodeRunner(bundle, info, in_float32=in_float32), info, allow_non_finite=True
        )
        for in_float32 in (True, False)
    )
    decoders = (reference, same_dtype, decoder)
    decoder.reset()
    worst: dict[str, TensorCheck] = {}
    for frame in range(NUM_FRAMES):
        latents = draw_noise(seed, frame, 0, (1, *manifest.config.latent_shape[1:]))
        made = [_outputs(each, latents) for each in decoders]
        for name in made[0]:
            place = (kind, name, frame, None)
            check = TensorCheck.of(place, [outputs[name] for outputs in made], dtype)
            if name not in worst or check.rank < worst[name].rank:
                worst[name] = check
    tensors = sorted(worst.values(), key=lambda check: check.rank)
    return DecoderReport(str(bundle), kind, decoder.backend_name, dtype, tensors)


def _outputs(decoder: VideoDecoder, latents: Float32) -> Mapping[str, NDArray[Any]]:
    """Frames and states after one more latent frame."""
    return {FRAMES: decoder.decode(latents), **decoder.read_state()}
