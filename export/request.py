"""What `fkv export` is asked for, resolved to a model, a configuration and labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forcing_kv.export.bundle import BundleLabels
from forcing_kv.export.checkpoints import load_model
from forcing_kv.export.denoiser import CausalWanModel
from forcing_kv.export.model_config import model_shape_from_official, read_json
from forcing_kv.export.shipped import shipped_model
from forcing_kv.runtime_trt.config import DType, RolloutConfig
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.heads import read_heads
from forcing_kv.runtime_trt.layout import CachePolicy, ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.manifest import sha256_of
from forcing_kv.runtime_trt.schedule import Schedule


@dataclass(frozen=True)
class ExportRequest:
    """Options of an export; None takes the model's own value."""

    model: str = "digits"
    """A shipped model, unless a checkpoint is given."""
    checkpoint: Path | None = None
    config: Path | None = None
    """Official Wan `config.json` of the checkpoint."""
    heads: Path | None = None
    latent_size: tuple[int, int] | None = None
    chunk_frames: int | None = None
    dense_window: int | None = None
    """Frames of a dense window, sink and own chunk included; None compresses."""
    policy_changes: tuple[tuple[str, Any], ...] = ()
    """(field, value) of `CachePolicy` that differ from the model's own."""
    schedule: Schedule | None = None
    dtype: DType = "float32"


@dataclass(frozen=True)
class ResolvedExport:
    """Everything that `export_bundle` needs."""

    config: RolloutConfig
    labels: BundleLabels
    load: Callable[[], CausalWanModel]
    """Reads the weights; not called by a dry run."""


def resolve(request: ExportRequest) -> ResolvedExport:
    """Look up and check everything but the weights.

    Raises:
        InputError: a file is missing or does not fit, or the settings contradict each other.
    """
    if request.checkpoint is None:
        shipped = shipped_model(request.model)
        if request.config is not None:
            raise InputError("--config belongs to --checkpoint; give both, or neither")
        name, checkpoint = request.model, shipped.CHECKPOINT
        shape, chunk, schedule = shipped.MODEL, shipped.CHUNK, shipped.SCHEDULE
        policy, heads = shipped.POLICY, request.heads or shipped.HEADS
        kinds: dict[str, str | None] = {"text_encoder": name, "decoder": name}
    else:
        if request.config is None:
            raise InputError("--checkpoint needs --config, the model's official config.json")
        name, checkpoint, heads_given = request.checkpoint.stem, request.checkpoint, request.heads
        content = read_json(request.config)
        shape = model_shape_from_official(content.get("model", content), str(request.config))
        schedule, policy = Schedule(), CachePolicy()
        chunk = ChunkShape(3, 60, 104, shape.patch_size)
        if heads_given is None and request.dense_window is None:
            raise InputError(
                "a compressed export needs --heads; make the file with `fkv calibrate heads`, "
                "download a published one, or export dense with --dense-window"
            )
        heads = heads_given or Path()
        kinds = {"text_encoder": "umt5-xxl", "decoder": "wan-vae"}
    if not checkpoint.is_file():
        raise InputError(f"{checkpoint}: no such checkpoint file")
    chunk = _resized(chunk, request)
    policy, partition, provenance = _policy(request, policy, shape, chunk, heads)
    config = RolloutConfig(
        shape, chunk, policy, partition, request.schedule or schedule, request.dtype
    )
    provenance = {"checkpoint_sha256": sha256_of(checkpoint), **provenance}
    labels = BundleLabels(name, provenance=provenance, **kinds)
    return ResolvedExport(config, labels, lambda: load_model(checkpoint, shape))


def _resized(chunk: ChunkShape, request: ExportRequest) -> ChunkShape:
    height, width = request.latent_size or (chunk.latent_height, chunk.latent_width)
    frames = request.chunk_frames or chunk.num_frames
    return replace(chunk, num_frames=frames, latent_height=height, latent_width=width)


def _policy(
    request: ExportRequest,
    policy: CachePolicy,
    shape: ModelShape,
    chunk: ChunkShape,
    heads: Path,
) -> tuple[CachePolicy, HeadPartition, dict[str, Any]]:
    changes = dict(request.policy_changes)
    if request.dense_window is not None:
        sink = changes.pop("num_sink_frames", 0)
        if changes:
            raise InputError(
                f"--dense-window keeps every frame of the window, so {sorted(changes)} cannot be "
                "set with it; leave out one or the other"
            )
        policy = CachePolicy.dense(request.dense_window, chunk.num_frames, sink)
        return policy, HeadPartition.uniform(shape.num_layers, shape.num_heads, static=True), {}
    head_file = read_heads(heads, shape)
    return replace(policy, **changes), head_file.partition, {"heads_sha256": head_file.sha256}
