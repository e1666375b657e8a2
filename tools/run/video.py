"""Writes generated frames: mp4, gif or npz, frame by frame, all or nothing.

While a video is being made it stands beside the output as `NAME.partial.mp4`, in fragments that
players can show already; the output itself appears at the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.bundle.files import replaced_file
from forcing_kv.runtime_trt.errors import InputError, require
from forcing_kv.tools.run.frame_rate import check_rate

Uint8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]


CODECS = {".mp4": ("libx264", "yuv420p"), ".gif": ("gif", "rgb8")}
"""Suffix -> codec and pixel format."""
ENCODER_OPTIONS = {".mp4": {"crf": "18", "tune": "zerolatency"}}
"""No frames are held back, so that a growing file shows what has been generated."""
FRAGMENTS = {".mp4": {"movflags": "frag_keyframe+empty_moov+default_base_moof"}}
FRAGMENT_FRAMES = 12
"""Frames from key frame to key frame: a chunk of three latent frames."""


class Writer(Protocol):
    """Takes chunks as they are made."""

    def write(self, latents: Float32, frames: Uint8 | None) -> None:
        """Add latents [F, C, h, w] and, if decoded, frames [F', height, width, 3]."""


class VideoWriter:
    """Encodes frames with PyAV as they come.

    Args:
        path: `.mp4` (H.264) or `.gif`.
        fps: frames per second of the file, to which an mp4 holds exactly.
        scale: whole factor by which pixels are enlarged.
    """

    def __init__(self, path: Path, fps: Fraction, scale: int = 1, *, container: str) -> None:
        av = require("av")
        codec, pixel_format = CODECS[container]
        self._scale = scale
        self._av = av
        self._path, self._container = path, container
        options = {**FRAGMENTS.get(container, {}), "flush_packets": "1"}
        self._file = av.open(str(path), "w", format=container[1:], options=options)
        self._stream: Any = self._file.add_stream(
            codec, rate=fps, options=ENCODER_OPTIONS.get(container, {})
        )
        self._stream.pix_fmt = pixel_format
        self._stream.gop_size = FRAGMENT_FRAMES
        self._sized = False

    def write(self, latents: Float32, frames: Uint8 | None) -> None:
        """See `Writer`."""
        assert frames is not None, "a video needs decoded frames"
        large = frames.repeat(self._scale, axis=1).repeat(self._scale, axis=2)
        if not self._sized:
            self._stream.height, self._stream.width = large.shape[1:3]
            self._sized = True
        for image in large:
            frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            self._file.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Flush and close the file."""
        if self._sized:
            self._file.mux(self._stream.encode())
        self._file.close()

    def finish(self, path: Path) -> None:
        """Move the closed file to `path`, an mp4 as one piece that every player can seek in."""
        if self._container not in FRAGMENTS or not self._sized:
            self._path.replace(path)
            return
        with replaced_file(path) as whole:
            self._join_fragments(whole.name)

    def _join_fragments(self, whole: str) -> None:
        options = {"movflags": "faststart"}
        with (
            self._av.open(str(self._path)) as source,
            self._av.open(whole, "w", format="mp4", options=options) as target,
        ):
            read = source.streams.video[0]
            written = target.add_stream_from_template(read)
            for packet in source.demux(read):
                if packet.dts is not None:
                    packet.stream = written
                    target.mux(packet)


class LatentWriter:
    """Collects latents, and frames if there are any, for one `.npz`."""

    def __init__(self) -> None:
        self._latents: list[Float32] = []
        self._frames: list[Uint8] = []

    def write(self, latents: Float32, frames: Uint8 | None) -> None:
        """See `Writer`."""
        self._latents.append(latents)
        if frames is not None:
            self._frames.append(frames)

    def save(self, path: Path) -> None:
        """Write `latents` [frames, C, h, w] and, if decoded, `frames` [frames, H, W, 3]."""
        arrays: dict[str, Any] = {"latents": np.concatenate(self._latents)}
        if self._frames:
            arrays["frames"] = np.concatenate(self._frames)
        with replaced_file(path) as file:
            np.savez(file, **arrays)


SUFFIXES = (*CODECS, ".npz")


def check_output(
    path: Path, suffixes: Sequence[str] = SUFFIXES, option: str = "", *, force: bool = True
) -> None:
    """Refuse an output file that cannot be written, or that is in the way.

    Args:
        path: the file.
        suffixes: those that are allowed.
        option: the flag that names it, if that is to be told.
        force: whether it may exist.

    Raises:
        InputError: unknown suffix, missing folder, no permission, or an earlier file.
    """
    where = f"{option} {path}".strip()
    if path.suffix not in suffixes:
        raise InputError(f"{where}: suffix {path.suffix!r}; give {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise InputError(f"{where}: {path.parent} is no folder; make it first")
    if path.exists() and not force:
        raise InputError(f"{where}: exists already; choose another path or give --force")
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise InputError(f"{where}: cannot be written; choose another path")


@contextmanager
def open_writer(path: Path, fps: Fraction, scale: int = 1) -> Iterator[Writer]:
    """A writer whose file appears at `path` only if the block ends well.

    Raises:
        InputError: the path cannot be written, or cannot show so many frames per second.
    """
    check_output(path)
    check_rate(fps, path.suffix)
    if path.suffix == ".npz":
        collector = LatentWriter()
        yield collector
        collector.save(path)
        return
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        video = VideoWriter(partial, fps, scale, container=path.suffix)
        with _closing(video):
            yield video
        video.finish(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _closing(video: VideoWriter) -> Iterator[None]:
    """Closes a video also when the block fails, without hiding its error."""
    try:
        yield
    except BaseException as error:
        try:
            video.close()
        except Exception as second:
            error.add_note(f"closing the unfinished video failed too: {second}")
        raise
    video.close()


def gray_to_rgb(video: Float32) -> Uint8:
    """Grayscale video [F, H, W] in 0..1 to [F, H, W, 3] bytes."""
    with np.errstate(invalid="ignore"):  # What is not finite was asked for.
        gray = np.rint(np.clip(video, 0.0, 1.0) * 255).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=-1)
