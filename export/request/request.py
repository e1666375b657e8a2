"""What `fkv export` is asked for, resolved to a model, a configuration and labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from forcing_kv.export.bundle.write import BundleLabels
from forcing_kv.export.checkpoint.adapter.adapter import Adapter
from forcing_kv.export.checkpoint.adapter.alpha import AlphaRule, PublishedAlpha
from forcing_kv.export.checkpoint.adapter.file import adapter_files
from forcing_kv.export.checkpoint.adapter.names import ModelNames
from forcing_kv.export.checkpoint.adapter.read import read_adapters
from forcing_kv.export.checkpoint.files import (
    RawCheckpoint,
    checkpoint_sha256,
    read_checkpoint,
    weight_files,
)
from forcing_kv.export.checkpoint.fp8_file import read_fp8
from forcing_kv.export.checkpoint.load import CheckpointSource, load_model, model_sha256
from forcing_kv.export.checkpoint.origin import Origin
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.model.fp8_layers import scales_for
from forcing_kv.export.request.model_config import model_shape_from_official
from forcing_kv.export.request.options import SHIPPED_DEFAULT, ExportRequest, ModelOptions
from forcing_kv.export.request.presets import PRESETS, Preset, load_preset
from forcing_kv.export.request.shipped import SHIPPED_MODELS, shipped_model
from forcing_kv.runtime_trt.bundle.fp8 import Fp8Scales
from forcing_kv.runtime_trt.bundle.hashes import sha256_of
from forcing_kv.runtime_trt.bundle.heads import read_heads
from forcing_kv.runtime_trt.bundle.schema import read_json
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import HeadPartition
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.resolution import check_latent_size


@dataclass(frozen=True)
class ResolvedExport:
    """Everything that `export_bundle` needs."""

    preset: Preset
    config: RolloutConfig
    source: CheckpointSource
    heads: Path | None
    """Head partition file; None for a dense export."""
    fp8: Path | None = None
    """Calibration of the layers in FP8; None for none."""
    allow_non_finite: bool = False
    """Whether weights may be NaN or infinite."""

    @property
    def name(self) -> str:
        return self.preset.name

    @cached_property
    def checkpoint_sha256(self) -> str:
        """Hash of the checkpoint, hexadecimal."""
        return checkpoint_sha256(self.source.path)

    @cached_property
    def checkpoint(self) -> RawCheckpoint:
        """The checkpoint's tensors, mapped."""
        return read_checkpoint(self.source.path, self.source.weights)

    @cached_property
    def adapters(self) -> tuple[Adapter, ...]:
        """What is merged into the checkpoint, read as far as its tensors' names and shapes."""
        files = self.source.adapters
        names = ModelNames.of(self.config.model) if files else ModelNames({})
        return read_adapters(files, self.source.alpha, names)

    @cached_property
    def model_sha256(self) -> str:
        """Hash of the checkpoint with its adapters, hexadecimal."""
        return model_sha256(self.source, self.adapters)

    @cached_property
    def labels(self) -> BundleLabels:
        """What the bundle says about itself; hashes every input file."""
        provenance: dict[str, Any] = {"checkpoint_sha256": self.checkpoint_sha256}
        if self.checkpoint.form is not None:
            provenance["checkpoint_format"] = self.checkpoint.form
        if self.adapters:
            provenance["adapters"] = [adapter.record for adapter in self.adapters]
        if self.heads is not None:
            provenance["heads_sha256"] = sha256_of(self.heads)
        if self.fp8 is not None:
            provenance["fp8_sha256"] = sha256_of(self.fp8)
        preset = self.preset
        return BundleLabels(preset.name, preset.text_encoder, preset.decoder, provenance)

    def fp8_scales(self, model: CausalWanModel) -> Fp8Scales | None:
        """Scales of the layers in FP8 of the loaded model; None for none."""
        if self.fp8 is None:
            return None
        return scales_for(model, read_fp8(self.fp8, self.config.model).amax)

    def load(self) -> CausalWanModel:
        """Reads the weights; not called by a dry run."""
        known = {name: preset.model for name, preset in PRESETS.items()}
        return load_model(
            self.source,
            self.config.model,
            self.config.dtype,
            checkpoint=self.checkpoint,
            known=known,
            allow_non_finite=self.allow_non_finite,
        )


def resolve(request: ExportRequest) -> ResolvedExport:
    """Look up and check everything but the weights.

    Raises:
        InputError: a file is missing or does not fit, or the settings contradict each other.
    """
    preset, source, own_heads = resolve_model(request)
    dense = request.dense or request.dense_window is not None
    policy = _policy(request, preset)
    segments = policy.num_segments if policy.num_dynamic_frames else 1
    check_latent_size(preset.latent_size, preset.model.patch_size, segments)
    heads = None if dense else request.heads or own_heads
    if heads is not None:
        partition = read_heads(heads, preset.model).partition
    elif dense:
        shape = preset.model
        partition = HeadPartition.uniform(shape.num_layers, shape.num_heads, static=True)
    else:
        raise InputError(
            "a compressed export needs --heads; make the file with `fkv calibrate heads`, "
            "download a published one, or export the uncompressed model with --dense"
        )
    config = RolloutConfig(
        preset.model, preset.chunk, policy, partition, preset.schedule, request.dtype
    )
    allowed = request.allow_non_finite
    resolved = ResolvedExport(preset, config, source, heads, request.fp8, allowed)
    _ = resolved.adapters
    _check_origins(resolved, allow_other=request.allow_other_checkpoint)
    return resolved


def _check_origins(resolved: ResolvedExport, *, allow_other: bool) -> None:
    """Warn of heads and refuse FP8 scales of another model, unless it is allowed.

    Heads often fit a fine-tune too; scales that are too small cut its activations off.
    """
    name, model = resolved.source.label, resolved.config.model
    fp8 = None if resolved.fp8 is None else read_fp8(resolved.fp8, model)
    if allow_other:
        return
    if resolved.heads is not None:
        heads = Origin(resolved.heads, "heads", read_heads(resolved.heads).model_sha256)
        heads.warn_of_other(name, lambda: resolved.model_sha256)
    if resolved.fp8 is not None and fp8 is not None:
        scales = Origin(resolved.fp8, "fp8", fp8.model_sha256)
        scales.refuse_other(name, lambda: resolved.model_sha256)


def resolve_model(request: ModelOptions) -> tuple[Preset, CheckpointSource, Path | None]:
    """The model asked for, with the request's size and schedule, and its weights.

    Returns:
        The preset, where its weights come from, and the head partition that comes with it, if any.

    Raises:
        InputError: the model is unknown, or a file is missing.
    """
    preset, source, heads = _shipped(request) if request.checkpoint is None else _given(request)
    weight_files(source.path)
    changes = {
        "latent_size": request.latent_size,
        "chunk_frames": request.chunk_frames,
        "schedule": request.schedule,
    }
    given: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    return replace(preset, **given), source, heads


def _given(request: ModelOptions) -> tuple[Preset, CheckpointSource, Path | None]:
    """A model whose checkpoint is given."""
    assert request.checkpoint is not None
    preset = None
    if request.model != SHIPPED_DEFAULT:
        preset = load_preset(request.model)
    if request.config is not None:
        content = read_json(request.config, "model config", "give the official config.json")
        where = str(request.config)
        if isinstance(content, dict) and "model" in content:
            content, where = content["model"], f"{where}: model"
        shape = model_shape_from_official(content, where)
        name = request.checkpoint.stem
        preset = replace(preset, model=shape) if preset else Preset(name, name, shape)
    if preset is None:
        raise InputError(
            f"--checkpoint needs --model, one of {list(PRESETS)} or a .json file, or --config, "
            "the official config.json of the model"
        )
    published = preset.lora_alpha and PublishedAlpha(preset.lora_alpha, preset.lora)
    rule = AlphaRule(request.lora_alpha, published or None)
    weights: Any = request.weights or preset.weights
    adapters = adapter_files(request.lora)
    return preset, CheckpointSource(request.checkpoint, weights, adapters, rule), None


def _shipped(request: ModelOptions) -> tuple[Preset, CheckpointSource, Path | None]:
    foreign = {
        "--config": request.config,
        "--lora": request.lora or None,
        "--lora-alpha": request.lora_alpha,
    }
    if given := [flag for flag, value in foreign.items() if value is not None]:
        raise InputError(f"{', '.join(given)} belong to --checkpoint; give it too, or leave it out")
    if request.model not in SHIPPED_MODELS:
        preset = load_preset(request.model)
        hint = f"; download it with: {preset.download}" if preset.download else ""
        raise InputError(f"--model {request.model} needs --checkpoint, its weights{hint}")
    shipped, name = shipped_model(request.model), request.model
    chunk = shipped.CHUNK
    model = (shipped.MODEL, shipped.SCHEDULE, shipped.POLICY)
    preset = Preset(name, name, *model, text_encoder=name, decoder=name)
    size = (chunk.latent_height, chunk.latent_width)
    preset = replace(preset, chunk_frames=chunk.num_frames, latent_size=size)
    return preset, CheckpointSource(shipped.CHECKPOINT), shipped.HEADS


def _policy(request: ExportRequest, preset: Preset) -> CachePolicy:
    changes = dict(request.policy_changes)
    if not request.dense and request.dense_window is None:
        return replace(preset.policy, **changes)
    sink = changes.pop("num_sink_frames", preset.dense_sink if request.dense else 0)
    if changes:
        raise InputError(
            f"a dense export keeps every frame of its window, so {sorted(changes)} cannot be set "
            "with it; leave out one or the other"
        )
    window = request.dense_window or preset.dense_window
    return CachePolicy.dense(window, preset.chunk_frames, sink)
