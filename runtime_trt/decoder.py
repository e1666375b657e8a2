"""Latents to pixels without torch: a bundle's decoder, a latent frame at a time, state explicit.

A causal video decoder keeps the last activations of its convolutions. They are inputs and outputs
of the graph, so decoding a stream equals decoding the whole clip. What runs the graphs and holds
the state is a `DecodeRunner`: ONNX Runtime, or an engine that `fkv build` made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.errors import BundleError, ForcingKvError, InputError
from forcing_kv.runtime_trt.graph_info import GraphInfo, TensorInfo
from forcing_kv.runtime_trt.manifest import DecoderInfo, Manifest

Float32 = NDArray[np.float32]

LATENTS, FRAMES = "latents", "frames"
STATE, NEW_STATE = "state", "new_state"
"""`state.i` goes into a decode graph, `new_state.i` comes out."""
DECODE, DECODE_FIRST = "decode", "decode_first"
"""The graph of every latent frame, and that of the first one where it is special."""


class DecodeRunner(ABC):
    """Runs a decoder's graphs and keeps its state."""

    name: str
    """Backend name, as users type it."""

    @abstractmethod
    def reset(self) -> None:
        """Make every state zero."""

    @abstractmethod
    def run(self, graph: str, latents: Float32) -> Float32:
        """Decode one latent frame and keep the new state.

        Args:
            graph: `decode`, or `decode_first`, which leaves the states that it does not return.
            latents: [1, C, h, w] float32.

        Returns:
            [k, 3, height, width] float32 in 0..1, an array of the caller's.
        """

    @abstractmethod
    def read_state(self, name: str) -> NDArray[Any]:
        """A copy of `state.i` as it is now (for checks)."""

    @abstractmethod
    def close(self) -> None:
        """Release everything; may be called twice."""


class VideoDecoder:
    """Decodes one video after another with a bundle's decoder.

    Args:
        runner: what runs its graphs; closed with this decoder.
        info: the decoder's entry in the manifest.

    Use `VideoDecoder.open` for a bundle on disk.
    """

    def __init__(self, runner: DecodeRunner, info: DecoderInfo) -> None:
        self._runner, self._info = runner, info
        self._frame_shape = info.graphs[DECODE].inputs[0].shape
        self._closed = False
        self.chosen_because = "asked for"
        """Why this backend is the one."""
        try:
            self.reset()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls,
        bundle: Path,
        manifest: Manifest,
        kind: str,
        backend: str = "onnxruntime",
        *,
        num_threads: int = 0,
        use_graphs: bool = True,
    ) -> VideoDecoder:
        """Open one of the decoders that a bundle holds; the denoiser is not loaded.

        Args:
            bundle: directory of the bundle.
            manifest: its manifest.
            kind: vae or tae.
            backend: one of `open_decoder.DECODE_BACKENDS`; `open_decoder.follow_session` chooses.
            num_threads: CPU threads of ONNX Runtime; 0 leaves the choice to it.
            use_graphs: replay captured CUDA graphs, for backends that can.

        Raises:
            InputError: it holds no decoder of this kind, or there is no such backend.
            BackendUnavailableError: the backend cannot run here, or has no engine of the decoder.
            BundleError: a file is missing or altered, or the engine is of another decoder.
        """
        from forcing_kv.runtime_trt.open_decoder import open_runner

        runner = open_runner(
            bundle, manifest, kind, backend, num_threads=num_threads, use_graphs=use_graphs
        )
        return cls(runner, manifest.decoders[kind])

    @property
    def backend_name(self) -> str:
        """Name of the backend in use."""
        return self._runner.name

    def reset(self) -> None:
        """Begin another video."""
        self._require_open()
        self._first = True
        self._num_to_trim = self._info.num_trimmed_frames
        self._runner.reset()
        self._failed = False

    def decode(self, latents: Float32) -> Float32:
        """Decode the next latent frames.

        Args:
            latents: [F, C, h, w] float32, as a session yields them.

        Returns:
            Pixel frames [F', 3, height, width] float32 in 0..1: four a latent frame, but one for
            the first latent frame of a video.

        Raises:
            InputError: another shape.
            ForcingKvError: the backend failed, now or in an earlier call; `reset` begins again.
        """
        self._require_open()
        if self._failed:
            raise ForcingKvError(
                "the last call failed half-way, so the decoder's state is not valid; call reset to "
                "begin another video"
            )
        if latents.ndim != 4 or latents.shape[1:] != self._frame_shape[1:]:
            raise InputError(
                f"latents have shape {list(latents.shape)}; this decoder takes frames of "
                f"{list(self._frame_shape[1:])}"
            )
        self._failed = True
        frames = np.concatenate([self._decode_frame(frame[None]) for frame in latents])
        self._failed = False
        trimmed = min(self._num_to_trim, len(frames))
        self._num_to_trim -= trimmed
        return frames[trimmed:]

    def _decode_frame(self, latents: Float32) -> Float32:
        graph = DECODE_FIRST if self._first and DECODE_FIRST in self._info.graphs else DECODE
        self._first = False
        return self._runner.run(graph, np.ascontiguousarray(latents, np.float32))

    def read_state(self) -> dict[str, NDArray[Any]]:
        """A copy of every state, by name (for checks)."""
        self._require_open()
        names = [info.name for info in state_inputs(self._info.graphs[DECODE])]
        return {name: self._runner.read_state(name) for name in names}

    def _require_open(self) -> None:
        if self._closed:
            raise ForcingKvError("the decoder is closed; open it again")

    def close(self) -> None:
        """Release the backend; may be called twice."""
        self._closed = True
        self._runner.close()

    def __enter__(self) -> VideoDecoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def state_inputs(graph: GraphInfo) -> tuple[TensorInfo, ...]:
    """The states that a decode graph takes."""
    return tuple(info for info in graph.inputs if info.name.startswith(f"{STATE}."))


def next_state(name: str) -> str:
    """The input that an output `new_state.i` becomes."""
    return name.replace(NEW_STATE, STATE)


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

    decode, first = info.graphs.get(DECODE), info.graphs.get(DECODE_FIRST)
    fits = decode is not None and states(decode, NEW_STATE) == states(decode, STATE)
    if fits and decode is not None and first is not None:
        fits = states(first, NEW_STATE) <= states(decode, STATE)
    if not fits or set(info.graphs) - {DECODE, DECODE_FIRST}:
        raise BundleError(f"{where}: its graphs do not fit each other; add the decoder again")


def to_rgb8(frames: Float32) -> NDArray[np.uint8]:
    """Frames [F, 3, height, width] in 0..1 to bytes [F, height, width, 3]."""
    bytes_ = np.rint(np.clip(frames, 0.0, 1.0) * 255).astype(np.uint8)
    return np.ascontiguousarray(bytes_.transpose(0, 2, 3, 1))
