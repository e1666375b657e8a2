"""The model that a calibration runs: weights, chunk, schedule and encoded prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from forcing_kv.calibration.options import SourceOptions
from forcing_kv.calibration.rollouts import Rollout, dense_config
from forcing_kv.export.checkpoint.adapter.names import ModelNames
from forcing_kv.export.checkpoint.adapter.read import read_adapters
from forcing_kv.export.checkpoint.files import read_checkpoint
from forcing_kv.export.checkpoint.load import load_model, model_sha256
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.request.presets import PRESETS, PUBLISHED_THRESHOLD
from forcing_kv.export.request.request import resolve_model
from forcing_kv.export.request.shipped import shipped_model
from forcing_kv.runtime_trt.bundle.hashes import sha256_of
from forcing_kv.runtime_trt.bundle.prompt_file import read_prompts
from forcing_kv.runtime_trt.console import talk
from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, ModelShape
from forcing_kv.runtime_trt.rollout.schedule import Schedule


@dataclass(frozen=True)
class ModelSource:
    """A model ready for rollouts."""

    name: str
    model: CausalWanModel
    sha256: str
    """Hash of the checkpoint with its adapters, hexadecimal (`model_sha256`)."""
    chunk: ChunkShape
    schedule: Schedule
    prompts: Mapping[str, NDArray[np.float32]]
    """Name of each prompt -> embeddings [text_len, text_dim]."""
    threshold: float = PUBLISHED_THRESHOLD
    """Lowest score of a static head; the published one unless the model comes with its own."""

    def rollouts(self, seeds: Sequence[int]) -> list[Rollout]:
        """Every prompt with every seed."""
        prompts = self.prompts.items()
        return [Rollout(name, embeds, seed) for name, embeds in prompts for seed in seeds]

    def dense_config(
        self,
        num_chunks: int,
        window_frames: int | None,
        dtype: DType,
        num_sink_frames: int = 0,
    ) -> RolloutConfig:
        """Its rollout under dense attention, which sees all of `num_chunks` without a window."""
        window = window_frames or num_chunks * self.chunk.num_frames
        return dense_config(self.model, self.chunk, window, num_sink_frames, self.schedule, dtype)


def load_source(options: SourceOptions) -> ModelSource:
    """Load the model that a calibration asks for.

    Raises:
        InputError: the options do not fit each other, or a file is missing or not as needed.
    """
    if options.checkpoint is None:
        _refuse_checkpoint_options(options)
        return load_shipped(options.model, options.prompt)
    if options.prompt_embeds is None or options.prompt:
        raise InputError(
            "--checkpoint needs --prompt-embeds, and takes no --prompt: encode text beforehand "
            "with `fkv encode-prompt`"
        )
    preset, source, _ = resolve_model(options)
    prompts = _named_prompts(options.prompt_embeds, preset.model)
    checkpoint = read_checkpoint(source.path, source.weights)
    talk(f"weights: {checkpoint.description}")
    adapters = read_adapters(source.adapters, source.alpha, ModelNames.of(preset.model))
    for line in (line for adapter in adapters for line in adapter.describe()):
        talk(line)
    known = {name: each.model for name, each in PRESETS.items()}
    return ModelSource(
        source.path.stem,
        load_model(source, preset.model, options.dtype, checkpoint=checkpoint, known=known),
        model_sha256(source, adapters),
        preset.chunk,
        preset.schedule,
        prompts,
    )


def _refuse_checkpoint_options(options: SourceOptions) -> None:
    """A shipped model has its own weights, size, schedule and text encoder."""
    names = ("config", "weights", "lora", "lora_alpha", "latent_size", "chunk_frames",
             "prompt_embeds")  # fmt: skip
    wrong = [name.replace("_", "-") for name in names if getattr(options, name) not in (None, ())]
    wrong += ["denoise-steps"] * (options.schedule is not None)
    if wrong:
        raise InputError(
            f"--{', --'.join(wrong)} belong to --checkpoint: the shipped model "
            f"{options.model!r} has its own; give --checkpoint too, or leave them out"
        )


def load_shipped(name: str, prompts: Sequence[str]) -> ModelSource:
    """Load a shipped model; its own calibration prompts are taken if none is given."""
    shipped = shipped_model(name)
    texts = prompts or shipped.CALIBRATION_PROMPTS
    return ModelSource(
        name,
        load_model(shipped.CHECKPOINT, shipped.MODEL),
        sha256_of(shipped.CHECKPOINT),
        shipped.CHUNK,
        shipped.SCHEDULE,
        {text: shipped.encode_prompt(text) for text in texts},
        shipped.HEAD_THRESHOLD,
    )


def _named_prompts(path: Path, shape: ModelShape) -> dict[str, NDArray[np.float32]]:
    """Encoded prompts by their text, or by their place in the file where that holds none."""
    content = read_prompts(path, (shape.text_len, shape.text_dim))
    many = len(content.prompts) > 1
    names = (
        text or (f"{path.stem}[{place}]" if many else path.stem)
        for place, text in enumerate(content.prompts)
    )
    return dict(zip(names, content.embeds, strict=True))
