"""The torch operator `forcing_kv::head_indexed_attention`."""

from __future__ import annotations

from forcing_kv.plugins.head_indexed_attention.reference import head_indexed_attention as _reference
from forcing_kv.plugins.head_indexed_attention.spec import SPEC
from forcing_kv.plugins.torch_library import register

head_indexed_attention = register(SPEC, _reference)
