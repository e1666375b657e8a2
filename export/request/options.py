"""What a model is named by, and what an export is asked for: the flags of several commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from forcing_kv.export.checkpoint.names import Weights
from forcing_kv.export.request.flags import (
    Computed,
    Int,
    LatentSize,
    PositiveInt,
    changes_of,
    flags,
    panel,
)
from forcing_kv.export.request.presets import PRESETS
from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.resolution import RESOLUTIONS
from forcing_kv.runtime_trt.rollout.schedule import Schedule

SHIPPED_DEFAULT = "digits"
MODEL = panel("Model")
POLICY = panel("Cache policy (default: the model's own)")

if TYPE_CHECKING:
    PolicyChanges = dict[str, Any]
else:
    PolicyChanges = changes_of(
        CachePolicy, lambda field: field.removeprefix("num_").removeprefix("last_")
    )
"""Fields of `CachePolicy` that differ from the model's own."""


@flags(MODEL)
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model and its weights; None takes the model's own value."""

    model: Annotated[
        str,
        Parameter(
            help=f"The shipped model ({SHIPPED_DEFAULT}), one of {', '.join(PRESETS)}, or a preset "
            "in a .json file."
        ),
    ] = SHIPPED_DEFAULT
    checkpoint: Path | None = None
    """Weights: .safetensors, .pt or .gguf file, index of shards, or folder."""
    config: Path | None = None
    """Official Wan config.json, for an architecture that --model does not name."""
    weights: Weights | None = None
    """Which of the weights that a trainer saved side by side. Default: the model's own."""
    lora: tuple[str, ...] = ()
    """FILE[:STRENGTH]: adapter to merge, a file or folder; repeat it for more."""
    lora_alpha: float | None = None
    """Alpha of the adapter. Default: what its files state, the model's for its own one, or its
    rank."""
    latent_size: Annotated[
        LatentSize | None,
        Parameter(
            help=f"{', '.join(RESOLUTIONS)}, pixels: 832x480px, or latent rows x columns: 60x104. "
            "Default: the model's own."
        ),
    ] = None
    chunk_frames: PositiveInt | None = None
    """Latent frames a chunk. Default: the model's own."""
    dtype: DType = "float32"
    """What the model computes in."""
    schedule: Annotated[Schedule | None, Computed] = None


@flags()
@dataclass(frozen=True, kw_only=True)
class ExportRequest(ModelOptions):
    """Options of an export."""

    fp8: Path | None = None
    """fp8.json of `fkv calibrate fp8`: run these linear layers in FP8."""
    heads: Annotated[Path | None, Parameter(group=POLICY)] = None
    """Head partition file."""
    dense: Annotated[bool, Parameter(group=POLICY)] = False
    """No compression: the model's own window."""
    dense_window: Annotated[Int | None, Parameter(group=POLICY)] = None
    """No compression: attend this many frames, sink and own chunk included."""
    policy_changes: Annotated[PolicyChanges, Parameter(name="*", group=POLICY)] = field(
        default_factory=dict
    )
    allow_other_checkpoint: bool = False
    """Accept --fp8 scales and --heads that were measured on another checkpoint."""
    allow_non_finite: bool = False
    """Export weights that are NaN or infinite too."""
