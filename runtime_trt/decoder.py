"""Latents to pixels without torch: a bundle's decoder, a latent frame at a time, state explicit.

What runs the graphs is a `DecodeRunner`: ONNX Runtime, or an engine that `fkv build` made.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo, TensorInfo
from forcing_kv.runtime_trt.bundle.manifest import (
    MANIFEST_FILE,
    Bundle,
    DecoderInfo,
    Manifest,
    load_whole,
)
from forcing_kv.runtime_trt.decode.runner import (
    DECODE,
    DECODE_FIRST,
    FRAMES,
    LATENTS,
    NEW_STATE,
    STATE,
    DecodeRunner,
    Float32,
    state_inputs,
)
from forcing_kv.runtime_trt.errors import (
    BackendUnavailableError,
    BundleError,
    ForcingKvError,
    InputError,
    MissingDependencyError,
    NonFiniteError,
    StateGuard,
    Turn,
    shown,
    unknown_name,
)
from forcing_kv.runtime_trt.rollout.arguments import (
    check_threads,
    file_path,
    float_array,
    yes_or_no,
)
from forcing_kv.runtime_trt.rollout.ports import port_name, split_name
from forcing_kv.runtime_trt.tensorrt.flavours import FLAVOURS

_ONNXRUNTIME_DEVICES = {"onnxruntime": "cpu", "onnxruntime-cuda": "cuda"}

DECODE_BACKENDS = (*FLAVOURS, "inductor", *_ONNXRUNTIME_DEVICES)
"""Every backend that can run a decoder."""


class VideoDecoder:
    """Decodes one video after another with a bundle's decoder.

    One call at a time: a call that comes while another thread is in one raises a `ForcingKvError`
    that names it, at once and without touching the video. Wait and call again, hold a lock round
    the decoder, or open one for each thread.

    Args:
        runner: what runs its graphs; closed with this decoder.
        allow_non_finite: hand out frames that hold NaN or infinities too.

    Use `VideoDecoder.open` for a bundle on disk.
    """

    def __init__(
        self, runner: DecodeRunner, info: DecoderInfo, *, allow_non_finite: bool = False
    ) -> None:
        self._runner, self._info = runner, info
        self._allow_non_finite = yes_or_no("allow_non_finite", allow_non_finite)
        self._frame_shape = info.graphs[DECODE].inputs[0].shape
        self._state = StateGuard(
            "the last call failed half-way, so the decoder's state is not valid; call reset to "
            "begin another video"
        )
        self._turn = Turn("decoder", "wait for that call, or open a decoder for each thread")
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
        bundle: str | os.PathLike[str],
        manifest: Manifest,
        kind: str,
        backend: str = "onnxruntime",
        *,
        digest: str | None = None,
        num_threads: int = 0,
        use_graphs: bool = True,
        allow_non_finite: bool = False,
    ) -> VideoDecoder:
        """Open one of the decoders that a bundle holds; the denoiser is not loaded.

        Args:
            bundle: directory written by `fkv export`.
            manifest: as it was read (`read_manifest`); a bundle that has been replaced since is
                refused.
            kind: vae or tae.
            backend: one of `DECODE_BACKENDS`; `follow_session` chooses.
            digest: the bundle's (`Session.open`); None takes that of `manifest`.
            num_threads: CPU threads of ONNX Runtime, at most eight for each CPU of the machine; 0
                leaves the choice to it.
            use_graphs: replay captured CUDA graphs, for backends that can.
            allow_non_finite: hand out frames that hold NaN or infinities too.

        Raises:
            InputError: it holds no decoder of this kind, there is no such backend, or an argument
                is of another type or out of range.
            BackendUnavailableError: the backend cannot run here, or has no engine of the decoder.
            BundleError: a file is missing or altered, the engine is of another decoder, or the
                bundle has another digest.
        """
        bundle = file_path("bundle", bundle)
        check_choice(bundle, manifest, kind, backend)
        manifest.require_digest(digest, bundle / MANIFEST_FILE)
        num_threads, use_graphs = check_threads(num_threads), yes_or_no("use_graphs", use_graphs)

        def load(opened: Bundle) -> DecodeRunner:
            _check_graphs(opened.manifest, kind, str(bundle))
            opened.check_decoder(kind)
            if backend in FLAVOURS:
                from forcing_kv.runtime_trt.tensorrt.open import open_tensorrt_decoder

                return open_tensorrt_decoder(opened, kind, backend, use_graphs=use_graphs)
            if backend == "inductor":
                from forcing_kv.runtime_trt.inductor.open import open_inductor_decoder

                return open_inductor_decoder(opened, kind, use_graphs=use_graphs)
            from forcing_kv.runtime_trt.decode.onnxruntime import OnnxRuntimeDecodeRunner

            device = _ONNXRUNTIME_DEVICES[backend]
            return OnnxRuntimeDecodeRunner(opened, kind, num_threads, device)

        runner = load_whole(bundle, manifest.digest, load)
        return cls(runner, manifest.decoders[kind], allow_non_finite=allow_non_finite)

    @property
    def backend_name(self) -> str:
        return self._runner.name

    def reset(self) -> None:
        """Begin another video.

        Raises:
            ForcingKvError: closed, or another thread is in a call.
        """
        with self._turn.of("reset"):
            self._require_open()
            self._first, self._num_latents = True, 0
            self._num_to_trim = self._info.num_trimmed_frames
            with self._state.changing():
                self._runner.reset()
            self._state.renew()

    def decode(self, latents: ArrayLike) -> Float32:
        """Decode the next latent frames.

        Args:
            latents: [F, C, h, w] float32, as a session yields them.

        Returns:
            Pixel frames [F', 3, height, width] float32 in 0..1: four a latent frame, but one for
            the first latent frame of a video.

        Raises:
            InputError: another shape or dtype, or values that are not finite.
            NonFiniteError: the frames hold NaN or infinities; `reset` begins again.
            ForcingKvError: the backend failed, now or in an earlier call, and `reset` begins again;
                or closed; or another thread is in a call.
        """
        with self._turn.of("decode"):
            return self._decode(float_array("latents", latents, finite=False))

    def _decode(self, latents: Float32) -> Float32:
        self._require_open()
        self._state.require_valid()
        if latents.ndim != 4 or latents.shape[1:] != self._frame_shape[1:] or not len(latents):
            raise InputError(
                f"latents have shape {list(latents.shape)}; this decoder takes frames of "
                f"{list(self._frame_shape[1:])}"
            )
        if not (self._allow_non_finite or np.isfinite(latents).all()):
            raise InputError("latents hold NaN or infinite values; give those of a finite chunk")
        with self._state.changing():
            frames = np.concatenate([self._decode_frame(frame[None]) for frame in latents])
            if not self._allow_non_finite:
                self._require_finite(frames, len(latents))
        self._num_latents += len(latents)
        # Not the graphs do this: it would make a number of what is not one.
        np.clip(frames, 0.0, 1.0, out=frames)
        trimmed = min(self._num_to_trim, len(frames))
        self._num_to_trim -= trimmed
        return frames[trimmed:]

    def _decode_frame(self, latents: Float32) -> Float32:
        graph = DECODE_FIRST if self._first and DECODE_FIRST in self._info.graphs else DECODE
        self._first = False
        return self._runner.run(graph, latents)

    def _require_finite(self, frames: Float32, num_latents: int) -> None:
        """Refuse frames that hold NaN or infinities.

        They are on the host already. Their sum is finite if they are: 4 ms for the 14 million
        values of a chunk at 480p on one core, a third of a look at each.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(frames.sum()):
                return
        bad = frames.size - np.count_nonzero(np.isfinite(frames))
        if not bad:  # Finite values that are far out of range.
            return
        first = self._num_latents
        dtypes = {state.dtype for state in state_inputs(self._info.graphs[DECODE])}
        cause = (
            "an overflow of float16, which ends at 65504: add it again with --dtype float32"
            if dtypes == {"float16"}
            else "its weights: `fkv verify BUNDLE --decoder KIND` names the first tensor"
        )
        raise NonFiniteError(
            f"latent frames {first} to {first + num_latents - 1}: the decoder made {bad} of "
            f"{frames.size} pixel values NaN or infinite; the likely cause is {cause}. Call reset "
            "to begin another video, or look at the frames with allow_non_finite=True (`fkv run "
            "--allow-non-finite`)"
        )

    def read_state(self) -> dict[str, NDArray[Any]]:
        """A copy of every state, by name (for checks)."""
        with self._turn.of("read_state"):
            self._require_open()
            names = [info.name for info in state_inputs(self._info.graphs[DECODE])]
            return {name: self._runner.read_state(name) for name in names}

    def _require_open(self) -> None:
        if self._closed:
            raise ForcingKvError("the decoder is closed; open it again")

    def close(self) -> None:
        """Release the backend; may be called twice.

        Raises:
            ForcingKvError: another thread is in a call; the decoder stays open.
        """
        with self._turn.of("close"):
            self._closed = True
            self._runner.close()

    def __enter__(self) -> VideoDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_choice(bundle: Path, manifest: Manifest, kind: str, backend: str) -> None:
    """Refuse what no machine could open.

    Raises:
        InputError: the bundle holds no such decoder, or there is no such backend.
    """
    if not isinstance(manifest, Manifest):
        raise InputError(f"manifest is {shown(manifest)}; give that of read_manifest(bundle)")
    if not isinstance(kind, str) or not kind.isidentifier():
        raise InputError(f"kind is {shown(kind)}; give vae or tae")
    if kind not in manifest.decoders:
        raise InputError(
            f"{bundle}: holds no {kind} decoder (it has {list(manifest.decoders)}); add one "
            f"with `fkv add-decoder {bundle} --{kind} FILE`"
        )
    if not isinstance(backend, str) or backend not in DECODE_BACKENDS:
        raise unknown_name("decode backend", backend, DECODE_BACKENDS)


def follow_session(
    bundle: Path, manifest: Manifest, kind: str, session_backend: str, **options: Any
) -> VideoDecoder:
    """Open a decoder on the session's backend if the bundle has an engine of it that runs here.

    Otherwise it is ONNX Runtime on the CPU, and `chosen_because` says why. An engine of another
    decoder is an error all the same.

    Args:
        kind: vae or tae.
        options: those of `VideoDecoder.open`.

    Raises:
        InputError: the bundle holds no such decoder.
        BundleError: a file is missing or altered, or the engine is of another decoder.
    """
    reason = "as the session"
    if isinstance(session_backend, str) and session_backend in DECODE_BACKENDS:
        try:
            decoder = VideoDecoder.open(bundle, manifest, kind, session_backend, **options)
        except (BackendUnavailableError, MissingDependencyError) as error:
            reason = f"{session_backend}: {error}"
        else:
            decoder.chosen_because = reason
            return decoder
    decoder = VideoDecoder.open(bundle, manifest, kind, "onnxruntime", **options)
    decoder.chosen_because = reason
    return decoder


def _check_graphs(manifest: Manifest, kind: str, where: str) -> None:
    """Refuse a decoder entry whose graphs fit neither each other nor the denoiser.

    Raises:
        BundleError: what is wrong.
    """
    graphs = manifest.decoders[kind].graphs
    _, *latent_shape = manifest.config.latent_shape
    latents = TensorInfo(LATENTS, (1, *latent_shape), "float32")
    decode = graphs.get(DECODE)
    fits = decode is not None and graphs.keys() <= {DECODE, DECODE_FIRST}
    if fits and decode is not None:
        states = decode.inputs[1:]
        fits = [split_name(state.name) for state in states] == [
            (STATE, i) for i in range(len(states))
        ]
        made = tuple(replace(state, name=port_name(NEW_STATE, i)) for i, state in enumerate(states))
        size = _frame_size(decode)
        for name, graph in graphs.items():
            first = name == DECODE_FIRST
            fits = fits and graph.inputs == ((latents,) if first else (latents, *states))
            fits = fits and size is not None and _frame_size(graph) == size
            found = graph.outputs[1:]
            kept = tuple(info for info in made if not first or info in found)
            fits = fits and found == kept
    if not fits:
        raise BundleError(
            f"{where}: the graphs of its {kind} decoder do not fit each other, or not the latents "
            f"{list(latents.shape)}; add the decoder again"
        )


def _frame_size(graph: GraphInfo) -> tuple[int, ...] | None:
    """Channels, height and width of the frames that a graph returns first; None if it does not."""
    frames = graph.outputs[0] if graph.outputs else None
    if frames is None or (frames.name, frames.dtype, len(frames.shape)) != (FRAMES, "float32", 4):
        return None
    return frames.shape[1:] if frames.shape[1] == 3 else None


def to_rgb8(frames: Float32) -> NDArray[np.uint8]:
    """Frames [F, 3, height, width] in 0..1 to bytes [F, height, width, 3]."""
    with np.errstate(invalid="ignore"):  # What is not finite was asked for.
        bytes_ = np.rint(np.clip(frames, 0.0, 1.0) * 255).astype(np.uint8)
    return np.ascontiguousarray(bytes_.transpose(0, 2, 3, 1))
