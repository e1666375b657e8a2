"""What a head calibration leaves behind: `heads.json`.

The reader is `runtime_trt/bundle/heads.py`, so that exporting needs nothing of this package. The
file is also a partition in the published form: the official code reads its `layers` and ignores the
rest.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from forcing_kv.calibration.heads.head_profile import HeadProfile
from forcing_kv.calibration.heads.stability import measure_stability
from forcing_kv.runtime_trt.bundle.heads import HEADS_FORMAT, HEADS_SCHEMA_VERSION, partition_layers
from forcing_kv.runtime_trt.console import project_version
from forcing_kv.runtime_trt.rollout.config import RolloutConfig


def heads_record(profile: HeadProfile, config: RolloutConfig, model_sha256: str) -> dict[str, Any]:
    """The content of `heads.json`.

    Args:
        profile: what was recorded.
        config: the dense rollout that was observed.
        model_sha256: hash of the checkpoint, hexadecimal.
    """
    partition, samples = profile.partition, profile.samples
    num_static = partition.num_static_heads
    return {
        "format": HEADS_FORMAT,
        "schema_version": HEADS_SCHEMA_VERSION,
        "tool": {"name": "forcing-kv", "version": project_version()},
        "num_layers": partition.num_layers,
        "num_heads": partition.num_heads,
        "model": {"sha256": model_sha256, "shape": asdict(config.model)},
        "rule": asdict(profile.rule),
        "rollouts": {
            "prompts": list(dict.fromkeys(sample.prompt for sample in samples)),
            "seeds": sorted({sample.seed for sample in samples}),
            "chunks": sorted({sample.chunk for sample in samples}),
            "steps": sorted({sample.step for sample in samples}),
            "num_key_frames": profile.num_key_frames,
            "chunk": asdict(config.chunk),
            "policy": asdict(config.policy),
            "schedule": asdict(config.schedule),
            "dtype": config.dtype,
        },
        "num_static": num_static,
        "num_dynamic": partition.num_layers * partition.num_heads - num_static,
        "layers": partition_layers(partition),
        "scores": profile.pooled_LH.tolist(),
        "stability": asdict(measure_stability(profile)),
    }
