"""Small models that come with the package, found by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.schedule import Schedule

SHIPPED_MODELS = {"digits": "forcing_kv.tools.digits.shipped"}
"""Name of a shipped model -> its module, a `ShippedModel`; by name, for `tools` stands above."""


class ShippedModel(Protocol):
    """What the module of a shipped model offers."""

    CHECKPOINT: Path
    HEADS: Path
    MODEL: ModelShape
    CHUNK: ChunkShape
    SCHEDULE: Schedule
    POLICY: CachePolicy
    HEAD_THRESHOLD: float
    CALIBRATION_PROMPTS: Sequence[str]
    encode_prompt: Callable[[str], NDArray[np.float32]]


def shipped_model(name: str) -> ShippedModel:
    """The module of a shipped model.

    Raises:
        InputError: there is none of this name.
    """
    if name not in SHIPPED_MODELS:
        raise InputError(
            f"no model {name!r} is shipped; there is {list(SHIPPED_MODELS)}; give another model "
            "with --checkpoint and --config"
        )
    return cast(ShippedModel, importlib.import_module(SHIPPED_MODELS[name]))
