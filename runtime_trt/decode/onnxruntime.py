"""A video decoder on ONNX Runtime; the state stays on its device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo
from forcing_kv.runtime_trt.decode.runner import (
    DECODE,
    FRAMES,
    LATENTS,
    DecodeRunner,
    Float32,
    next_state,
    state_inputs,
)
from forcing_kv.runtime_trt.dtypes import DTYPES
from forcing_kv.runtime_trt.errors import BackendUnavailableError, BundleError, require


class OnnxRuntimeDecodeRunner(DecodeRunner):
    """See `DecodeRunner`.

    Args:
        bundle: directory of the bundle; hashes are checked by the caller.
        num_threads: CPU threads; 0 leaves the choice to ONNX Runtime.
        device: `cpu`, or `cuda` where ONNX Runtime has its CUDA provider.

    Raises:
        BackendUnavailableError: ONNX Runtime cannot use the device.
        BundleError: a graph does not load.
    """

    def __init__(
        self, bundle: Path, graphs: Mapping[str, GraphInfo], num_threads: int, device: str
    ) -> None:
        self.name = "onnxruntime" if device == "cpu" else f"onnxruntime-{device}"
        self._graphs, self._device = graphs, device
        self._sessions = {
            name: _session(bundle / graph.file, num_threads, device)
            for name, graph in graphs.items()
        }
        self._state: dict[str, Any] = {}

    def reset(self) -> None:
        values = require("onnxruntime").OrtValue
        self._state = {
            info.name: values.ortvalue_from_numpy(
                np.zeros(info.shape, DTYPES[info.dtype].numpy), self._device, 0
            )
            for info in state_inputs(self._graphs[DECODE])
        }

    def run(self, graph: str, latents: Float32) -> Float32:
        outputs, session = self._graphs[graph].outputs, self._sessions[graph]
        binding = session.io_binding()
        binding.bind_cpu_input(LATENTS, latents)
        for state in state_inputs(self._graphs[graph]):
            binding.bind_ortvalue_input(state.name, self._state[state.name])
        for info in outputs:
            binding.bind_output(info.name, "cpu" if info.name == FRAMES else self._device)
        session.run_with_iobinding(binding)
        made = dict(zip([info.name for info in outputs], binding.get_outputs(), strict=True))
        frames: Float32 = made.pop(FRAMES).numpy()
        self._state |= {next_state(name): value for name, value in made.items()}
        return frames

    def read_state(self, name: str) -> NDArray[Any]:
        copied: NDArray[Any] = self._state[name].numpy().copy()
        return copied

    def close(self) -> None:
        self._sessions.clear()
        self._state.clear()


def _session(path: Path, num_threads: int, device: str) -> Any:
    ort = require("onnxruntime")
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    unavailable = BackendUnavailableError(
        f"ONNX Runtime has no {provider} here; install onnxruntime-gpu in place of onnxruntime, or "
        "decode on the CPU"
    )
    if provider not in ort.get_available_providers():
        raise unavailable
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    # The denoiser's sessions take turns with this one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:
        raise BundleError(
            f"{path}: ONNX Runtime cannot load it ({error}); add the decoder again with "
            "`fkv add-decoder --force`"
        ) from error
    # ONNX Runtime turns to the CPU by itself when a provider does not start.
    if provider not in session.get_providers():
        raise unavailable
    return session
