"""A video decoder on ONNX Runtime; the state stays on its device."""

from __future__ import annotations

from typing import Any

import numpy as np

from forcing_kv.runtime_trt.backends.onnxruntime import onnx_sessions
from forcing_kv.runtime_trt.bundle.graph_info import TensorInfo
from forcing_kv.runtime_trt.bundle.manifest import Bundle
from forcing_kv.runtime_trt.decode.runner import (
    FRAMES,
    LATENTS,
    Float32,
    StateDecodeRunner,
    state_inputs,
)
from forcing_kv.runtime_trt.dtypes import DTYPES
from forcing_kv.runtime_trt.errors import BackendUnavailableError, require


class OnnxRuntimeDecodeRunner(StateDecodeRunner):
    """See `DecodeRunner`.

    Args:
        kind: which decoder of the bundle.
        num_threads: CPU threads; 0 leaves the choice to ONNX Runtime.
        device: `cpu`, or `cuda` where ONNX Runtime has its CUDA provider.

    Raises:
        BackendUnavailableError: ONNX Runtime cannot use the device.
        BundleError: a file is missing or altered, or a graph does not load.
    """

    def __init__(self, bundle: Bundle, kind: str, num_threads: int, device: str) -> None:
        super().__init__(bundle.manifest.decoders[kind].graphs)
        self.name = "onnxruntime" if device == "cpu" else f"onnxruntime-{device}"
        self._device = device
        self._sessions = _sessions(bundle, kind, num_threads, device)

    def _zeros(self, info: TensorInfo) -> Any:
        zeros = np.zeros(info.shape, DTYPES[info.dtype].numpy)
        return require("onnxruntime").OrtValue.ortvalue_from_numpy(zeros, self._device, 0)

    def _outputs(self, graph: str, latents: Float32) -> dict[str, Any]:
        outputs, session = self._graphs[graph].outputs, self._sessions[graph]
        binding = session.io_binding()
        binding.bind_cpu_input(LATENTS, latents)
        for state in state_inputs(self._graphs[graph]):
            binding.bind_ortvalue_input(state.name, self._state[state.name])
        for info in outputs:
            binding.bind_output(info.name, "cpu" if info.name == FRAMES else self._device)
        session.run_with_iobinding(binding)
        return dict(zip([info.name for info in outputs], binding.get_outputs(), strict=True))

    def close(self) -> None:
        self._sessions.clear()
        super().close()


def _sessions(bundle: Bundle, kind: str, num_threads: int, device: str) -> dict[str, Any]:
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    unavailable = BackendUnavailableError(
        f"ONNX Runtime has no {provider} here; install onnxruntime-gpu in place of onnxruntime, or "
        "decode on the CPU"
    )
    if provider not in require("onnxruntime").get_available_providers():
        raise unavailable
    remedy = "add the decoder again with `fkv add-decoder --force`"
    graphs, files = bundle.manifest.decoders[kind].graphs, bundle.check_decoder(kind)
    sessions = onnx_sessions(bundle, graphs, files, num_threads, provider, remedy)
    # ONNX Runtime turns to the CPU by itself when a provider does not start.
    if not all(provider in session.get_providers() for session in sessions.values()):
        raise unavailable
    return sessions
