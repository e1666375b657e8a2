"""What a training run is asked for; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from forcing_kv.export.request.flags import Computed, Int, YesNo, flags


@flags()
@dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults place its phases where the shipped model had them, in steps."""

    steps: Int = 8150
    """Planned optimiser steps."""
    budget_minutes: float = 0.0
    """Wall-clock budget that also drives the decay; whichever of both ends first. 0: no limit."""
    seed: Int = 0
    """Seed of weights, data and noise."""
    batch: Int = 8
    """Sequences per shard; a step has two shards."""
    lr: float = 2e-3
    """Peak learning rate."""
    precision: str = "bfloat16"
    """Compute dtype of the matrix products: bfloat16 or float32."""
    compile: YesNo = True
    """Compile the forward and backward passes."""
    shards: Annotated[int, Computed] = 2
    """Batches per step; processes share them."""
    warmup: Annotated[int, Computed] = 200
    """Steps of linear warm-up."""
    average: Annotated[float, Computed] = 0.998
    """Decay of the weights' moving average."""
    forcing_start: Annotated[float, Computed] = 0.29
    """Progress after which half the steps train on the model's own predictions."""
    long_start: Annotated[float, Computed] = 0.27
    """Progress after which every third step trains on long sequences."""
    compressed_start: Annotated[float, Computed] = 0.393
    """Progress after which most samples have a compressed cache."""
