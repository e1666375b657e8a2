"""The torch operator `forcing_kv::segment_similarity`."""

from __future__ import annotations

from forcing_kv.plugins.segment_similarity.reference import segment_similarity as _reference
from forcing_kv.plugins.segment_similarity.spec import SPEC
from forcing_kv.plugins.torch_library import register

segment_similarity = register(SPEC, _reference)
