"""`fkv run`: prompts to videos (or latents) with the torch-free runtime."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from forcing_kv.runtime_trt.console import Task, print_json, progress, talk
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.manifest import read_manifest
from forcing_kv.runtime_trt.session import Chunk, Session
from forcing_kv.tools.preview import Preview, check_preview
from forcing_kv.tools.run_decode import (
    FrameDecoder,
    choose_decoder,
    default_fps,
    pixel_frames_per_latent,
)
from forcing_kv.tools.run_prompts import PromptSource, Switch
from forcing_kv.tools.video import Writer, check_output, open_writer

_PROMPT = "Prompt (one of these)"


def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Video (.mp4, .gif) or latents (.npz); of several prompts, numbered files."
        ),
    ],
    prompt: Annotated[
        str | None, typer.Option(help="What to generate.", rich_help_panel=_PROMPT)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file: a prompt, and so a video, a line.", rich_help_panel=_PROMPT),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompt-file",
            "--prompt-embeds",
            help="Encoded prompts: of `fkv encode-prompt`, or .npy.",
            rich_help_panel=_PROMPT,
        ),
    ] = None,
    script: Annotated[
        Path | None,
        typer.Option(
            help='Prompt switches, a JSON object a line: {"frame": 12, "prompt": "..."}; frames '
            "are latent frames.",
            rich_help_panel=_PROMPT,
        ),
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(
            help="Folder of the text encoder, for prompts as text.", rich_help_panel=_PROMPT
        ),
    ] = None,
    num_chunks: Annotated[int, typer.Option(min=1, help="Chunks to generate.")] = 7,
    seed: Annotated[int, typer.Option(min=0, help="Key of the noise generator.")] = 0,
    fps: Annotated[
        int | None, typer.Option(help="Frames per second of the video. Default: the model's own.")
    ] = None,
    scale: Annotated[int, typer.Option(min=1, help="Enlarge pixels by this factor.")] = 1,
    decode: Annotated[str, typer.Option(help="auto, vae, tae, or none (latents only).")] = "auto",
    decode_backend: Annotated[
        str,
        typer.Option(
            help="What runs the bundle's decoder: auto (the session's backend if it has an engine "
            "of it, else onnxruntime), tensorrt, tensorrt-lean, tensorrt-rtx, inductor, "
            "onnxruntime, or onnxruntime-cuda with onnxruntime-gpu."
        ),
    ] = "auto",
    live: Annotated[
        Path | None,
        typer.Option(help="PNG that always shows the latest chunk, while generating."),
    ] = None,
    backend: Annotated[str, typer.Option(help="auto or a backend's name.")] = "auto",
    num_threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: automatic.")] = 0,
    cuda_graph: Annotated[
        bool, typer.Option(help="Replay one captured CUDA graph a chunk, where the backend can.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print timings.")] = False,
) -> None:
    """Generate videos from a bundle."""
    check_output(out)
    if live is not None:
        check_preview(live)
    manifest = read_manifest(bundle)
    rate = default_fps(manifest) if fps is None else fps
    chosen = choose_decoder(bundle, manifest, decode, out, decode_backend)
    if live is not None and chosen is None:
        raise InputError("--live shows frames, but nothing is decoded; give --decode vae or tae")
    source = PromptSource(prompt, prompts, prompt_file, script, text_encoder)
    videos = source.videos(manifest)
    preview = None if live is None else Preview(live, scale)
    opening = time.perf_counter()
    records = []
    with ExitStack() as stack:
        session = stack.enter_context(
            Session.open(bundle, backend, num_threads=num_threads, use_graphs=cuda_graph)
        )
        decoder: FrameDecoder | None = None
        if chosen is not None:
            decoder = chosen.open(session.backend_name, num_threads, use_graphs=cuda_graph)
            stack.callback(decoder.close)
        open_s = time.perf_counter() - opening
        for path, switches in zip(_outputs(out, len(videos)), videos, strict=True):
            job = _Job(session, decoder, preview, pixel_frames_per_latent(manifest))
            with (
                open_writer(path, rate, scale) as writer,
                progress(f"generating {path.name}", num_chunks) as bar,
            ):
                job.generate(switches, num_chunks, seed, writer, bar)
            talk(f"wrote {path}: {job.summary()}")
            records.append({"out": path, **job.record(switches)})
            session.reset()
    if as_json:
        shared = {"backend": session.backend_name, "seed": seed, "open_s": open_s}
        first, *others = records
        print_json({**shared, **first, **({"videos": records} if others else {})})


def _outputs(out: Path, count: int) -> list[Path]:
    """One file per video: `out`, or numbered beside it; all of them checked."""
    if count == 1:
        return [out]
    files = [out.with_name(f"{out.stem}-{i:03d}{out.suffix}") for i in range(count)]
    for file in files:
        check_output(file)
    return files


@dataclass
class _Job:
    """One video, and what it took."""

    session: Session
    decoder: FrameDecoder | None
    preview: Preview | None
    frames_per_latent: int
    chunk_ms: list[float] = field(default_factory=list)
    """Denoiser time of each chunk: steps, clean pass, eviction and commit."""
    decode_ms: list[float] = field(default_factory=list)
    """Time of each chunk from latents to frames, both on the host."""
    switch_ms: list[dict[str, Any]] = field(default_factory=list)
    first_chunk_s: float = 0.0
    total_s: float = 0.0

    def generate(
        self, switches: Sequence[Switch], num_chunks: int, seed: int, writer: Writer, bar: Task
    ) -> None:
        """Generate, decode and write chunk by chunk."""
        if self.decoder is not None:
            self.decoder.reset()
        self._check_switches(switches, num_chunks)
        begin = time.perf_counter()
        for chunk in self._chunks(switches, num_chunks, seed):
            self.chunk_ms.append(sum(chunk.timings_ms.values()))
            frames = self._decode(chunk)
            writer.write(chunk.latents, frames)
            if self.preview is not None and frames is not None:
                self.preview.show(frames)
            self.total_s = time.perf_counter() - begin
            self.first_chunk_s = self.first_chunk_s or self.total_s
            bar.describe(f"generating: {self._speeds()}")
            bar.advance()

    def _decode(self, chunk: Chunk) -> NDArray[np.uint8] | None:
        if self.decoder is None:
            return None
        start = time.perf_counter()
        frames = self.decoder.decode(chunk.latents)
        self.decode_ms.append(1e3 * (time.perf_counter() - start))
        return frames

    def _check_switches(self, switches: Sequence[Switch], num_chunks: int) -> None:
        end = (num_chunks - 1) * self.session.config.chunk.num_frames
        late = [switch.frame for switch in switches if switch.frame > end]
        if late:
            raise InputError(
                f"the script switches prompts at frames {late}, but the last chunk begins at "
                f"frame {end}; generate more with --num-chunks"
            )

    def _chunks(self, switches: Sequence[Switch], num_chunks: int, seed: int) -> Iterator[Chunk]:
        pending = list(switches)
        self.session.set_prompt(pending.pop(0).embeds)
        for _ in range(num_chunks):
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
            yield self.session.generate_chunk(seed=seed)

    @property
    def _num_pixel_frames(self) -> int:
        return len(self.chunk_ms) * self.session.config.chunk.num_frames * self.frames_per_latent

    def fps(self) -> dict[str, float]:
        """Pixel frames per second: of the denoiser alone, and of everything from prompt to file."""
        per_chunk = self.session.config.chunk.num_frames * self.frames_per_latent
        return {
            "fps_denoiser": 1e3 * per_chunk / float(np.median(self.chunk_ms)),
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
            decoder = f"decoded by {self.decoder.name}{where}"
            decoding = f", decoding {np.median(self.decode_ms):.1f} ms"
        return (
            f"{frames} latent frames on {self.session.backend_name}, {decoder}; {self._speeds()} "
            f"(pixel frames); denoiser {np.median(self.chunk_ms):.1f} ms{decoding} a chunk "
            f"(median), first chunk after {self.first_chunk_s:.2f} s, {self.total_s:.2f} s in "
            f"all{switches}"
        )

    def record(self, switches: Sequence[Switch]) -> dict[str, Any]:
        """The same for `--json`."""
        return {
            "prompt": switches[0].text,
            "num_latent_frames": self.session.num_frames,
            "num_pixel_frames": self._num_pixel_frames,
            "decoder": None if self.decoder is None else self.decoder.name,
            "decoder_backend": None if self.decoder is None else self.decoder.backend_name,
            "denoiser_chunk_ms": self.chunk_ms,
            "decoder_chunk_ms": self.decode_ms,
            "switches": self.switch_ms,
            "first_chunk_s": self.first_chunk_s,
            "total_s": self.total_s,
            **self.fps(),
        }
