"""Manifests that somebody edits by hand, with the digest that they then need or without it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forcing_kv.runtime_trt.bundle.manifest import MANIFEST_FILE, digest_of


def edit(bundle: Path, change: Callable[[dict[str, Any]], object], *, seal: bool = True) -> None:
    """Changes the manifest of a bundle in place; `seal` makes its digest right again."""
    file = bundle / MANIFEST_FILE
    data = json.loads(file.read_text())
    change(data)
    if seal:
        data["digest"] = digest_of(data)
    file.write_text(json.dumps(data))
