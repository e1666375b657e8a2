"""The torch operator `forcing_kv::similarity_eviction`."""

from __future__ import annotations

from forcing_kv.plugins.similarity_eviction.reference import similarity_eviction as _reference
from forcing_kv.plugins.similarity_eviction.spec import SPEC
from forcing_kv.plugins.torch_library import register

similarity_eviction = register(SPEC, _reference)
