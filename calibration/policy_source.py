"""What a policy search starts from: the model, its dense rollout, its heads and its own policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forcing_kv.calibration.model_source import ModelSource, load_source
from forcing_kv.calibration.rollouts import dense_config
from forcing_kv.export.origin import Origin
from forcing_kv.export.request import ExportRequest, resolve_model
from forcing_kv.runtime_trt.config import RolloutConfig
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.heads import read_heads
from forcing_kv.runtime_trt.layout import CachePolicy, HeadPartition


@dataclass(frozen=True)
class SearchRequest:
    """Options of a search that concern the model."""

    model: ExportRequest
    """Model, checkpoint, size, heads and dtype; the rest is not read."""
    prompt_embeds: Path | None
    """Encoded prompts of a checkpoint."""
    prompts: tuple[str, ...]
    """Prompts of a shipped model."""
    window_frames: int | None
    """Frames that dense attention sees; None for all."""
    num_chunks: int


@dataclass(frozen=True)
class LoadedSearch:
    """What the request stands for."""

    source: ModelSource
    dense: RolloutConfig
    base: CachePolicy
    """The model's own policy."""
    scores: Sequence[Sequence[float]] | None
    """Score of every head, if the file holds them."""
    partition: HeadPartition


def load_search(request: SearchRequest) -> LoadedSearch:
    """Load model, heads and prompts.

    Raises:
        InputError: a file is missing or does not fit.
    """
    preset, checkpoint, own_heads = resolve_model(request.model)
    heads_path = request.model.heads or own_heads
    if heads_path is None:
        raise InputError("a policy search needs --heads; make the file with `fkv calibrate heads`")
    heads = read_heads(heads_path, preset.model)
    window = request.window_frames or request.num_chunks * preset.chunk_frames
    source = load_source(request.model, request.prompts, request.prompt_embeds)
    origin = Origin(heads_path, "heads", heads.model_sha256)
    origin.warn_of_other(checkpoint.path, lambda: source.sha256)
    dense = dense_config(
        source.model, source.chunk, window, 0, source.schedule, request.model.dtype
    )
    return LoadedSearch(source, dense, preset.policy, heads.scores, heads.partition)
