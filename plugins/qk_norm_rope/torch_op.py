"""The torch operator `forcing_kv::qk_norm_rope`."""

from __future__ import annotations

from forcing_kv.plugins.qk_norm_rope.reference import qk_norm_rope as _reference
from forcing_kv.plugins.qk_norm_rope.spec import SPEC
from forcing_kv.plugins.torch_library import register

qk_norm_rope = register(SPEC, _reference)
