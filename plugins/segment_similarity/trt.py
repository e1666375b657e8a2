"""FkSegmentSimilarity as a TensorRT plugin."""

from __future__ import annotations

from forcing_kv.plugins.segment_similarity.spec import SPEC
from forcing_kv.plugins.tensorrt_plugin import TargetDevice, register_plugin


def register(device: TargetDevice, name: str | None = None) -> str:
    """Register the operator; see `register_plugin`."""
    return register_plugin(SPEC, device, name)
