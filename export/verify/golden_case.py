"""Golden cases on disk: settings of the official code, what went in and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.export.checkpoint.load import load_model
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.request.model_config import model_shape_from_official
from forcing_kv.runtime_trt.bundle.arrays import read_arrays
from forcing_kv.runtime_trt.bundle.heads import parse_partition
from forcing_kv.runtime_trt.bundle.schema import load_as, read_json
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.schedule import Schedule

_REMEDY = "restore the case"


@dataclass(frozen=True)
class _ForcingKv:
    """The method's own settings; others of them change no result."""

    ar_start: int
    spatial_context_length: int
    temporal_context_length: int
    dynamic_context_length: int
    dynamic_temporal_enabled: bool
    num_frame_patch: int


@dataclass(frozen=True)
class _Event:
    """One recorded pass."""

    attn: tuple[Any, ...]
    """Its attention calls."""


@dataclass(frozen=True)
class _Settings:
    """What is read of a case's `config.json`, under the official names."""

    model: Any
    denoising_step_list: tuple[float, ...]
    warp_denoising_step: bool
    num_frame_per_block: int
    timestep_shift: float
    latent_hw: tuple[int, int]
    num_frames: int
    local_attn_size: int = -1
    sink_size: int = 0
    global_sink: bool = True
    switch_frame_indices: tuple[int, ...] = ()
    forcingkv: _ForcingKv | None = None
    head_partition: Any = None
    events: tuple[_Event, ...] = ()


@dataclass(frozen=True)
class GoldenCase:
    """One case directory, with the weights and inputs of its parent."""

    path: Path
    settings: _Settings
    golden: Mapping[str, NDArray[Any]]
    inputs: Mapping[str, NDArray[Any]]

    @classmethod
    def load(cls, path: Path) -> GoldenCase:
        """Read a case.

        Raises:
            InputError: a file of the format is missing or unreadable, or they do not fit.
        """
        settings, golden, inputs = (path / "config.json", path / "golden.npz",
                                    path.parent / "inputs.npz")  # fmt: skip
        missing = [str(file) for file in (settings, golden, inputs) if not file.is_file()]
        if missing:
            raise InputError(
                f"{path}: not a golden case: {missing} missing; a case directory has config.json "
                "and golden.npz, its parent weights.safetensors and inputs.npz"
            )
        content = read_json(settings, "golden case", _REMEDY)
        case = cls(
            path,
            load_as(_Settings, content, str(settings), unknown="ignore"),
            read_arrays(golden, "golden results", _REMEDY),
            read_arrays(inputs, "inputs of golden cases", _REMEDY),
        )
        case._check_arrays(golden, inputs)
        return case

    @cached_property
    def config(self) -> RolloutConfig:
        """The case's settings as a rollout configuration.

        Raises:
            InputError: they are none.
        """
        settings, where = self.settings, str(self.path / "config.json")
        model = model_shape_from_official(settings.model, f"{where}: model")
        frames = settings.num_frame_per_block
        try:
            chunk = ChunkShape(frames, *settings.latent_hw, model.patch_size)
            schedule = Schedule(
                settings.denoising_step_list, settings.warp_denoising_step, settings.timestep_shift
            )
            policy, partition = _policy(settings, model, frames)
            return RolloutConfig(model, chunk, policy, partition, schedule)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error

    @property
    def num_chunks(self) -> int:
        return self.settings.num_frames // self.settings.num_frame_per_block

    def _check_arrays(self, golden: Path, inputs: Path) -> None:
        """Refuse arrays that are missing or too small for the case's frames."""
        config, settings, chunks = self.config, self.settings, self.num_chunks
        frames, latent = settings.num_frames, config.latent_shape[1:]
        draws = config.schedule.num_steps - 1
        if chunks < 1:
            raise InputError(f"{self.path / 'config.json'}: {frames} frames hold no chunk")
        num_prompts = 1 + len(settings.switch_frame_indices)
        text = (config.model.text_len, config.model.text_dim)
        needed = {
            (inputs, "prompt_embeds"): (num_prompts, *text),
            (inputs, "noise"): (1, frames, *latent),
            (inputs, "renoise"): (chunks, draws, *config.latent_shape),
            (golden, "latents"): (frames, *latent),
        }
        if "x0_intermediate" in self.golden:
            needed[golden, "x0_intermediate"] = (chunks, 0, *config.latent_shape)
        for (file, name), least in needed.items():
            array = (self.inputs if file == inputs else self.golden).get(name, np.zeros(0))
            if array.ndim != len(least) or any(np.less(array.shape, least)):
                raise InputError(
                    f"{file}: {name} has shape {list(array.shape)}, and this case needs "
                    f"{list(least)} or more; {_REMEDY}"
                )

    def load_model(self, checkpoint: Path | None = None) -> CausalWanModel:
        """The parent's weights, or another checkpoint of the same shape."""
        file = checkpoint or self.path.parent / "weights.safetensors"
        return load_model(file, self.config.model)


def _policy(
    settings: _Settings, model: ModelShape, chunk_frames: int
) -> tuple[CachePolicy, HeadPartition]:
    """Translate the official settings."""
    official = settings.forcingkv
    if official is None:
        window = settings.local_attn_size
        window = settings.num_frames if window == -1 else window
        policy = CachePolicy.dense(window, chunk_frames, settings.sink_size)
        return policy, HeadPartition.uniform(model.num_layers, model.num_heads, static=True)
    calls = max((len(event.attn) for event in settings.events), default=0)
    policy = CachePolicy(
        num_sink_frames=settings.sink_size,
        num_static_frames=official.spatial_context_length,
        num_temporal_frames=official.temporal_context_length,
        num_dynamic_frames=(
            official.dynamic_context_length if official.dynamic_temporal_enabled else 0
        ),
        num_segments=official.num_frame_patch,
        last_warmup_chunk=official.ar_start,
        # A grouped layer makes two attention calls.
        compress_first_layer=calls == 2 * model.num_layers,
        global_sink=settings.global_sink,
    )
    return policy, parse_partition(settings.head_partition, "head_partition", model)
