"""Latents to pixels without torch: a bundle's decoder, a latent frame at a time, state explicit.

A causal video decoder keeps the last activations of its convolutions. They are inputs and outputs
of the graph, so decoding a stream equals decoding the whole clip.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.errors import BackendUnavailableError, BundleError, InputError, require
from forcing_kv.runtime_trt.manifest import (
    DecoderInfo,
    GraphInfo,
    Manifest,
    check_decoder_files,
)

Float32 = NDArray[np.float32]

STATE, NEW_STATE = "state", "new_state"
"""`state.i` goes into a decode graph, `new_state.i` comes out."""
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_NUMPY_DTYPES = {"float": np.float32, "float16": np.float16}


class VideoDecoder:
    """Decodes one video with a bundle's decoder, on ONNX Runtime; the state stays on the device.

    Args:
        bundle: directory of the bundle.
        info: the decoder's entry in the manifest.
        num_threads: CPU threads; 0 leaves the choice to ONNX Runtime.
        device: `cpu`, or `cuda` where ONNX Runtime has its CUDA provider.

    Raises:
        BackendUnavailableError: ONNX Runtime cannot use the device.
        BundleError: a file is missing, altered, or does not load.
    """

    def __init__(
        self, bundle: Path, info: DecoderInfo, num_threads: int = 0, device: str = "cpu"
    ) -> None:
        check_decoder_graphs(info, str(bundle))
        check_decoder_files(bundle, info)
        self._sessions = {
            name: _session(bundle / graph.file, num_threads, device)
            for name, graph in info.graphs.items()
        }
        self._info = info
        self._device = device
        self._frame_shape = info.graphs["decode"].inputs[0].shape
        self._state: dict[str, Any] = {}
        self.reset()

    @classmethod
    def open(
        cls,
        bundle: Path,
        manifest: Manifest,
        kind: str,
        num_threads: int = 0,
        device: str = "cpu",
    ) -> VideoDecoder:
        """Open one of the decoders that a bundle holds.

        Raises:
            InputError: it holds no decoder of this kind.
        """
        if kind not in manifest.decoders:
            raise InputError(
                f"{bundle}: holds no {kind} decoder (it has {list(manifest.decoders)}); add one "
                f"with `fkv add-decoder {bundle} --{kind} FILE`"
            )
        return cls(bundle, manifest.decoders[kind], num_threads, device)

    def reset(self) -> None:
        """Begin another video."""
        self._first = True
        self._num_to_trim = self._info.num_trimmed_frames
        values = require("onnxruntime").OrtValue
        self._state = {
            info.name: values.ortvalue_from_numpy(
                np.zeros(info.shape, _NUMPY_DTYPES[info.dtype]), self._device, 0
            )
            for info in self._info.graphs["decode"].inputs
            if info.name.startswith(f"{STATE}.")
        }

    def decode(self, latents: Float32) -> Float32:
        """Decode the next latent frames.

        Args:
            latents: [F, C, h, w] float32, as a session yields them.

        Returns:
            Pixel frames [F', 3, height, width] float32 in 0..1: four a latent frame, but one for
            the first latent frame of a video.

        Raises:
            InputError: another shape.
        """
        if latents.ndim != 4 or latents.shape[1:] != self._frame_shape[1:]:
            raise InputError(
                f"latents have shape {list(latents.shape)}; this decoder takes frames of "
                f"{list(self._frame_shape[1:])}"
            )
        frames = np.concatenate([self._decode_frame(frame[None]) for frame in latents])
        trimmed = min(self._num_to_trim, len(frames))
        self._num_to_trim -= trimmed
        return frames[trimmed:]

    def _decode_frame(self, latents: Float32) -> Float32:
        name = "decode_first" if self._first and "decode_first" in self._sessions else "decode"
        self._first = False
        outputs = self._info.graphs[name].outputs
        binding = self._sessions[name].io_binding()
        binding.bind_cpu_input("latents", np.ascontiguousarray(latents, np.float32))
        for state, value in self._state.items() if name == "decode" else ():
            binding.bind_ortvalue_input(state, value)
        for info in outputs:
            binding.bind_output(info.name, "cpu" if info.name == "frames" else self._device)
        self._sessions[name].run_with_iobinding(binding)
        made = dict(zip([info.name for info in outputs], binding.get_outputs(), strict=True))
        frames: Float32 = made.pop("frames").numpy()
        # The first frame leaves some states at zero: it does not return those.
        self._state |= {name.replace(NEW_STATE, STATE): value for name, value in made.items()}
        return frames


def check_decoder_graphs(info: DecoderInfo, where: str) -> None:
    """Refuse a decoder entry whose graphs do not fit each other.

    Raises:
        BundleError: what is wrong.
    """

    def states(graph: GraphInfo, part: str) -> set[tuple[str, tuple[int, ...]]]:
        tensors = graph.inputs if part == STATE else graph.outputs
        return {
            (tensor.name.removeprefix(part), tensor.shape)
            for tensor in tensors
            if tensor.name.startswith(f"{part}.")
        }

    decode, first = info.graphs.get("decode"), info.graphs.get("decode_first")
    fits = decode is not None and states(decode, NEW_STATE) == states(decode, STATE)
    if fits and decode is not None and first is not None:
        fits = states(first, NEW_STATE) <= states(decode, STATE)
    if not fits or set(info.graphs) - {"decode", "decode_first"}:
        raise BundleError(f"{where}: its graphs do not fit each other; add the decoder again")


def to_rgb8(frames: Float32) -> NDArray[np.uint8]:
    """Frames [F, 3, height, width] in 0..1 to bytes [F, height, width, 3]."""
    bytes_ = np.rint(np.clip(frames, 0.0, 1.0) * 255).astype(np.uint8)
    return np.ascontiguousarray(bytes_.transpose(0, 2, 3, 1))


def _session(path: Path, num_threads: int, device: str) -> Any:
    ort = require("onnxruntime")
    if device not in _PROVIDERS:
        raise InputError(f"device {device!r} is unknown; give one of {list(_PROVIDERS)}")
    provider = _PROVIDERS[device]
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
