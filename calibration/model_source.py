"""The model that a calibration runs: weights, chunk, schedule and encoded prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from forcing_kv.export.checkpoints import load_model
from forcing_kv.export.denoiser import CausalWanModel
from forcing_kv.export.model_config import model_shape_from_official, read_json
from forcing_kv.export.shipped import shipped_model
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.layout import ChunkShape, ModelShape
from forcing_kv.runtime_trt.manifest import sha256_of
from forcing_kv.runtime_trt.schedule import Schedule


@dataclass(frozen=True)
class ModelSource:
    """A model ready for rollouts."""

    name: str
    model: CausalWanModel
    sha256: str
    """Hash of the checkpoint file, hexadecimal."""
    chunk: ChunkShape
    schedule: Schedule
    prompts: Mapping[str, NDArray[np.float32]]
    """Name of each prompt -> embeddings [text_len, text_dim]."""


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
    )


def load_checkpoint(
    checkpoint: Path,
    config: Path,
    prompt_embeds: Path,
    chunk_frames: int,
    latent_size: tuple[int, int],
    schedule: Schedule,
) -> ModelSource:
    """Load a checkpoint with its official Wan `config.json`.

    Args:
        checkpoint: `.safetensors` or `.pt` file.
        config: model config, or a file that holds it under `model`.
        prompt_embeds: see `read_prompt_embeds`.
        chunk_frames: latent frames per chunk.
        latent_size: latent height and width.
        schedule: few-step schedule.
    """
    content = read_json(config)
    shape = model_shape_from_official(content.get("model", content), str(config))
    chunk = ChunkShape(chunk_frames, *latent_size, shape.patch_size)
    prompts = read_prompt_embeds(prompt_embeds, shape)
    model = load_model(checkpoint, shape)
    return ModelSource(checkpoint.stem, model, sha256_of(checkpoint), chunk, schedule, prompts)


def read_prompt_embeds(path: Path, shape: ModelShape) -> dict[str, NDArray[np.float32]]:
    """Read prompt embeddings: `.npz` with one array a prompt, or `.npy` of a stack of prompts.

    Args:
        path: arrays [text_len, text_dim], or [prompts, text_len, text_dim], floating point.
        shape: the model.

    Raises:
        InputError: unreadable, of another shape or dtype, or not finite.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {path.stem: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as .npz or .npy ({error})") from error
    prompts: dict[str, NDArray[np.float32]] = {}
    for name, array in arrays.items():
        stack = array if array.ndim == 3 else array[None]
        size = (shape.text_len, shape.text_dim)
        floating = np.issubdtype(array.dtype, np.floating)
        if not (stack.shape[1:] == size and floating and np.isfinite(stack).all()):
            raise InputError(
                f"{path}: {name} is {array.dtype} of shape {list(array.shape)}; needed are finite "
                f"floats of shape {list(size)}, or a stack of such"
            )
        for place, embeds in enumerate(stack):
            key = name if len(stack) == 1 else f"{name}[{place}]"
            prompts[key] = embeds.astype(np.float32)
    return prompts
