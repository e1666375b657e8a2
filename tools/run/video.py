"""Writes generated frames: mp4, gif or npz, frame by frame, all or nothing.

While a video is being made it stands beside the output under a hidden name, in fragments that
players can show already; the output itself appears at the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.bundle.atomic.files import check_file, partial_file, replaced_file
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

    @property
    def growing(self) -> Path | None:
        """The file as it is so far, if it can be shown already; it goes in the end."""

    def write(self, latents: Float32, frames: Uint8 | None) -> None:
        """Add latents [F, C, h, w] and, if decoded, frames [F', height, width, 3]."""


MAX_PIXELS = 16384
"""Width and height that H.264 ends at."""


class VideoWriter:
    """Encodes frames with PyAV as they come.

    FFmpeg gets open files, for a name with a colon would be a URL to it.

    Args:
        file: takes the video.
        fps: frames per second of the file, to which an mp4 holds exactly.
        scale: whole factor by which pixels are enlarged.
        container: `.mp4` (H.264) or `.gif`.
    """

    def __init__(self, file: BinaryIO, fps: Fraction, scale: int = 1, *, container: str) -> None:
        av = require("av")
        codec, pixel_format = CODECS[container]
        self._scale = scale
        self._av = av
        self._file, self.growing = file, Path(file.name)
        # Nothing waits in a buffer of Python's: a player sees what has been written.
        self._raw = os.fdopen(os.dup(file.fileno()), "wb", buffering=0)
        options = {**FRAGMENTS.get(container, {}), "flush_packets": "1"}
        self._muxer = av.open(self._raw, "w", format=container[1:], options=options)
        self._stream: Any = self._muxer.add_stream(
            codec, rate=fps, options=ENCODER_OPTIONS.get(container, {})
        )
        self._stream.pix_fmt = pixel_format
        self._stream.gop_size = FRAGMENT_FRAMES
        self._sized = False

    def write(self, latents: Float32, frames: Uint8 | None) -> None:
        """See `Writer`.

        Raises:
            InputError: the frames are larger than a video can be.
        """
        assert frames is not None, "a video needs decoded frames"
        height, width = (size * self._scale for size in frames.shape[1:3])
        if max(height, width) > MAX_PIXELS:
            raise InputError(
                f"--scale {self._scale} makes frames of {width}x{height} pixels; a video has at "
                f"most {MAX_PIXELS} a side, so give less"
            )
        if not self._sized:
            self._stream.height, self._stream.width = height, width
            self._sized = True
        for small in frames:
            image = small.repeat(self._scale, axis=0).repeat(self._scale, axis=1)
            frame = self._av.VideoFrame.from_ndarray(image, format="rgb24")
            self._muxer.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Flush and close the video; the file stays open."""
        try:
            if self._sized:
                self._muxer.mux(self._stream.encode())
        finally:
            self._muxer.close()
            self._raw.close()

    def join_fragments(self, whole: BinaryIO) -> None:
        """Copy the closed mp4 to `whole` in one piece, in which every player can seek."""

        def reopen(*_: object) -> BinaryIO:
            return Path(whole.name).open("rb")  # What is written is moved behind its index.

        with (
            Path(self._file.name).open("rb") as fragments,
            self._av.open(fragments, format="mp4") as source,
            os.fdopen(os.dup(whole.fileno()), "wb", buffering=0) as raw,
            self._av.open(
                raw, "w", format="mp4", options={"movflags": "faststart"}, io_open=reopen
            ) as target,
        ):
            read = source.streams.video[0]
            written = target.add_stream_from_template(read)
            for packet in source.demux(read):
                if packet.dts is not None:
                    packet.stream = written
                    target.mux(packet)


class LatentWriter:
    """Collects latents, and frames if there are any, for one `.npz`."""

    growing = None

    def __init__(self) -> None:
        self._latents: list[Float32] = []
        self._frames: list[Uint8] = []

    def write(self, latents: Float32, frames: Uint8 | None) -> None:
        """See `Writer`."""
        self._latents.append(latents)
        if frames is not None:
            self._frames.append(frames)

    def save(self, file: BinaryIO) -> None:
        """Write `latents` [frames, C, h, w] and, if decoded, `frames` [frames, H, W, 3]."""
        arrays: dict[str, Any] = {"latents": np.concatenate(self._latents)}
        if self._frames:
            arrays["frames"] = np.concatenate(self._frames)
        np.savez(file, **arrays)


SUFFIXES = (*CODECS, ".npz")


def check_output(
    path: Path, suffixes: Sequence[str] = SUFFIXES, option: str = "", *, force: bool = False
) -> None:
    """Refuse an output file that cannot be written, or that is in the way; see `check_file`."""
    check_file(path, suffixes, option, force=force)


@contextmanager
def open_writer(
    path: Path, fps: Fraction, scale: int = 1, *, force: bool = False
) -> Iterator[Writer]:
    """A writer whose file appears at `path` only if the block ends well.

    Args:
        force: replace a file that is there.

    Raises:
        InputError: the path cannot be written, or cannot show so many frames per second.
    """
    check_output(path, force=force)
    check_rate(fps, path.suffix)
    if path.suffix == ".npz":
        collector = LatentWriter()
        yield collector
        with replaced_file(path, force=force) as file:
            collector.save(file)
        return
    if path.suffix not in FRAGMENTS:
        with replaced_file(path, force=force) as file, _video(file, path, fps, scale) as video:
            yield video
        return
    with partial_file(path) as file:
        with _video(file, path, fps, scale) as video:
            yield video
        with replaced_file(path, force=force) as whole:
            video.join_fragments(whole)


@contextmanager
def _video(file: BinaryIO, path: Path, fps: Fraction, scale: int) -> Iterator[VideoWriter]:
    """A video that is closed also when the block fails, without hiding its error."""
    video = VideoWriter(file, fps, scale, container=path.suffix)
    try:
        yield video
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
