"""What a policy search starts from: the model, its dense rollout, its heads and its own policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forcing_kv.calibration.model_source import ModelSource, load_source
from forcing_kv.calibration.options import SourceOptions
from forcing_kv.export.checkpoint.origin import Origin
from forcing_kv.export.request.request import resolve_model
from forcing_kv.runtime_trt.bundle.heads import read_heads
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import HeadPartition
from forcing_kv.runtime_trt.rollout.policy import CachePolicy


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


def load_search(
    options: SourceOptions, heads: Path | None, num_chunks: int, window_frames: int | None
) -> LoadedSearch:
    """Load model, heads and prompts.

    Args:
        options: the model and its prompts.
        heads: head partition; None takes the one that comes with the model.
        num_chunks: chunks of a rollout.
        window_frames: frames that dense attention sees; None for all.

    Raises:
        InputError: a file is missing or does not fit.
    """
    preset, checkpoint, own_heads = resolve_model(options)
    heads_path = heads or own_heads
    if heads_path is None:
        raise InputError("a policy search needs --heads; make the file with `fkv calibrate heads`")
    found = read_heads(heads_path, preset.model)
    source = load_source(options)
    origin = Origin(heads_path, "heads", found.model_sha256)
    origin.warn_of_other(checkpoint.label, lambda: source.sha256)
    dense = source.dense_config(num_chunks, window_frames, options.dtype)
    return LoadedSearch(source, dense, preset.policy, found.scores, found.partition)
