"""`fkv run`: prompts to videos (or latents) with the torch-free runtime."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.export.request.flags import (
    File,
    Int,
    Json,
    PositiveInt,
    Seed,
    Threads,
    YesNo,
    between,
    flags,
)
from forcing_kv.runtime_trt.backends.stream import Chunk
from forcing_kv.runtime_trt.bundle.atomic.locks import claimed
from forcing_kv.runtime_trt.bundle.manifest import Manifest, read_manifest
from forcing_kv.runtime_trt.console import Task, print_json, progress, talk
from forcing_kv.runtime_trt.errors import InputError, NonFiniteError
from forcing_kv.runtime_trt.session import Session
from forcing_kv.tools.run.decode import (
    DecodeOptions,
    DecoderChoice,
    FrameDecoder,
    choose_decoder,
    default_fps,
    pixel_frames_per_latent,
)
from forcing_kv.tools.run.frame_rate import FrameRate, check_rate, rate_text
from forcing_kv.tools.run.preview import Preview, check_preview
from forcing_kv.tools.run.prompts import PromptSource, Switch
from forcing_kv.tools.run.video import Writer, check_output, open_writer

MAX_VIDEOS = 10_000
MAX_SCALE = 64
"""The smallest model's 32 pixels are 2,048 then."""


@flags()
@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """What is generated, and where it goes."""

    out: File
    """Video (.mp4, .gif) or latents (.npz); of several prompts, numbered files."""
    num_chunks: PositiveInt = 7
    """Chunks to generate."""
    seed: Seed = 0
    """Key of the noise generator."""
    fps: FrameRate | None = None
    """Frames per second of the video: 24, 23.976, 30000/1001. Default: the model's own."""
    scale: Annotated[Int, between(1, MAX_SCALE)] = 1
    """Enlarge pixels by this factor."""
    live: File | None = None
    """PNG that always shows the latest chunk, while generating."""
    force: bool = False
    """Replace earlier files."""
    as_json: Json = False
    """Print timings."""

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """The right to write these files, which one process has at a time.

        Raises:
            InputError: they cannot be written, or another process is writing them.
        """
        check_output(self.out, force=True)
        if self.fps is not None:
            check_rate(self.fps, self.out.suffix)
        if self.live is not None:
            check_preview(self.live, force=self.force)
        with claimed(self.out), nullcontext() if self.live is None else claimed(self.live):
            yield

    def outputs(self, count: int) -> list[Path]:
        """One file per video: `out`, or numbered beside it; all of them checked."""
        if count > MAX_VIDEOS:
            raise InputError(
                f"{count} prompts make {count} videos; a run makes {MAX_VIDEOS} at most"
            )
        files, out = [self.out], self.out
        if count > 1:
            files = [out.with_name(f"{out.stem}-{i:03d}{out.suffix}") for i in range(count)]
        for file in files:
            check_output(file, force=self.force)
        return files


@flags()
@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """What generates."""

    backend: str = "auto"
    """auto or a backend's name."""
    digest: str | None = None
    """Refuse a bundle with another, which `fkv export` and `fkv inspect` print."""
    num_threads: Threads = 0
    """CPU threads; 0: automatic."""
    cuda_graph: YesNo = True
    """Replay one captured CUDA graph a chunk, where the backend can."""
    allow_non_finite: bool = False
    """Write chunks that hold NaN or infinities too."""

    @property
    def shared(self) -> dict[str, Any]:
        """What a session and a decoder are opened with."""
        return {
            "num_threads": self.num_threads,
            "use_graphs": self.cuda_graph,
            "allow_non_finite": self.allow_non_finite,
        }

    def open(self, bundle: Path, manifest: Manifest) -> Session:
        """Open the bundle whose manifest that is, and no other."""
        return Session.open(bundle, self.backend, digest=manifest.digest, **self.shared)


def run(
    bundle: Path,
    /,
    *,
    prompts: PromptSource = PromptSource(),
    video: VideoOptions,
    decoding: DecodeOptions = DecodeOptions(),
    engine: SessionOptions = SessionOptions(),
) -> None:
    """Generate videos from a bundle.

    Args:
        bundle: Bundle directory.
    """
    with ExitStack() as stack:
        stack.enter_context(video.claimed())
        manifest = read_manifest(bundle, engine.digest)
        chosen = _chosen_decoder(bundle, manifest, decoding, video)
        videos = prompts.videos(manifest, video.outputs)
        opening = time.perf_counter()
        session = stack.enter_context(engine.open(bundle, manifest))
        decoder: FrameDecoder | None = None
        if chosen is not None:
            decoder = chosen.open(session.backend_name, **engine.shared)
            stack.callback(decoder.close)
        talk(f"{bundle} is {manifest.digest}")
        shared = {"backend": session.backend_name, "seed": video.seed, "digest": manifest.digest}
        shared["open_s"] = time.perf_counter() - opening
        records = []
        for path, switches in zip(video.outputs(len(videos)), videos, strict=True):
            job = _Job(session, decoder, video, manifest)
            records.append(job.write(path, switches))
            session.reset()
    if video.as_json:
        first, *others = records
        print_json({**shared, **first, **({"videos": records} if others else {})})


def _chosen_decoder(
    bundle: Path, manifest: Manifest, decoding: DecodeOptions, video: VideoOptions
) -> DecoderChoice | None:
    chosen = choose_decoder(bundle, manifest, decoding, video.out)
    if video.live is not None and chosen is None:
        raise InputError("--live shows frames, but nothing is decoded; give --decode vae or tae")
    return chosen


@dataclass
class _Job:
    """One video, and what it took."""

    session: Session
    decoder: FrameDecoder | None
    options: VideoOptions
    manifest: Manifest
    chunk_ms: list[float] = field(default_factory=list)
    """Denoiser time of each chunk: steps, clean pass, eviction and commit."""
    decode_ms: list[float] = field(default_factory=list)
    """Time of each chunk from latents to frames, both on the host."""
    switch_ms: list[dict[str, Any]] = field(default_factory=list)
    first_chunk_s: float = 0.0
    total_s: float = 0.0

    def write(self, path: Path, switches: Sequence[Switch]) -> dict[str, Any]:
        """Generate, decode and write chunk by chunk; returns the record for `--json`."""
        if self.decoder is not None:
            self.decoder.reset()
        self._check_switches(switches)
        with (
            open_writer(path, self.rate, self.options.scale, force=self.options.force) as writer,
            progress(f"generating {path.name}", self.options.num_chunks) as bar,
        ):
            if writer.growing is not None:
                talk(f"{path} grows as {writer.growing}, which a player can show meanwhile")
            self._generate(switches, writer, bar)
        talk(f"wrote {path}: {self.summary()}")
        return {"out": path, **self.record(switches)}

    def _generate(self, switches: Sequence[Switch], writer: Writer, bar: Task) -> None:
        live = self.options.live
        preview = None if live is None else Preview(live, self.options.scale)
        begin = time.perf_counter()
        for chunk in self._chunks(switches):
            self.chunk_ms.append(sum(chunk.timings_ms.values()))
            frames = self._decode(chunk)
            writer.write(chunk.latents, frames)
            if preview is not None and frames is not None:
                preview.show(frames)
            self.total_s = time.perf_counter() - begin
            self.first_chunk_s = self.first_chunk_s or self.total_s
            bar.describe(f"generating: {self._speeds()}")
            bar.advance()

    def _decode(self, chunk: Chunk) -> NDArray[np.uint8] | None:
        if self.decoder is None:
            return None
        start = time.perf_counter()
        try:
            frames = self.decoder.decode(chunk.latents)
        except NonFiniteError as error:
            raise NonFiniteError(f"chunk {chunk.index}: {error}") from error
        self.decode_ms.append(1e3 * (time.perf_counter() - start))
        return frames

    def _check_switches(self, switches: Sequence[Switch]) -> None:
        end = (self.options.num_chunks - 1) * self.session.config.chunk.num_frames
        late = [switch.frame for switch in switches if switch.frame > end]
        if late:
            raise InputError(
                f"the script switches prompts at frames {late}, but the last chunk begins at "
                f"frame {end}; generate more with --num-chunks"
            )

    def _chunks(self, switches: Sequence[Switch]) -> Iterator[Chunk]:
        pending = list(switches)
        self.session.set_prompt(pending.pop(0).embeds)
        for _ in range(self.options.num_chunks):
            due = None
            while pending and pending[0].frame <= self.session.num_frames:
                due = pending.pop(0)
            if due is not None:
                start = time.perf_counter()
                self.session.switch_prompt(due.embeds)
                latency_ms = 1e3 * (time.perf_counter() - start)
                self.switch_ms.append(
                    {"frame": self.session.num_frames, "prompt": due.text, "latency_ms": latency_ms}
                )
            yield self.session.generate_chunk(seed=self.options.seed)

    @property
    def rate(self) -> Fraction:
        """Frames per second of the file."""
        given = self.options.fps
        return Fraction(default_fps(self.manifest)) if given is None else given

    @property
    def _chunk_pixel_frames(self) -> int:
        num_frames = self.session.config.chunk.num_frames
        return num_frames * pixel_frames_per_latent(self.manifest)

    @property
    def _num_pixel_frames(self) -> int:
        return len(self.chunk_ms) * self._chunk_pixel_frames

    def fps(self) -> dict[str, float]:
        """Pixel frames per second: of the denoiser alone, and of everything from prompt to file."""
        return {
            "fps_denoiser": 1e3 * self._chunk_pixel_frames / float(np.median(self.chunk_ms)),
            "fps_end_to_end": self._num_pixel_frames / self.total_s,
        }

    def _speeds(self) -> str:
        fps = self.fps()
        return (
            f"{fps['fps_denoiser']:.1f} FPS denoiser only, "
            f"{fps['fps_end_to_end']:.1f} FPS end to end"
        )

    def summary(self) -> str:
        """One line on speed and switches, for people."""
        frames = self.session.num_frames
        switches = "".join(
            f"; prompt switch at frame {entry['frame']} took {entry['latency_ms']:.1f} ms"
            for entry in self.switch_ms
        )
        decoder, decoding = "latents only", ""
        if self.decoder is not None:
            where = f" on {self.decoder.backend_name}" if self.decoder.backend_name else ""
            decoder = f"decoded by {self.decoder.name}{where}, shown at {rate_text(self.rate)} FPS"
            decoding = f", decoding {np.median(self.decode_ms):.1f} ms"
        return (
            f"{frames} latent frames on {self.session.backend_name}, {decoder}; {self._speeds()} "
            f"(pixel frames); denoiser {np.median(self.chunk_ms):.1f} ms{decoding} a chunk "
            f"(median), first chunk after {self.first_chunk_s:.2f} s, {self.total_s:.2f} s in "
            f"all{switches}"
        )

    def record(self, switches: Sequence[Switch]) -> dict[str, Any]:
        """The same as data."""
        return {
            "prompt": switches[0].text,
            "num_latent_frames": self.session.num_frames,
            "num_pixel_frames": self._num_pixel_frames,
            "fps_file": None if self.decoder is None else str(self.rate),
            "decoder": None if self.decoder is None else self.decoder.name,
            "decoder_backend": None if self.decoder is None else self.decoder.backend_name,
            "denoiser_chunk_ms": self.chunk_ms,
            "decoder_chunk_ms": self.decode_ms,
            "switches": self.switch_ms,
            "first_chunk_s": self.first_chunk_s,
            "total_s": self.total_s,
            **self.fps(),
        }
