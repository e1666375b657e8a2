"""Everything that defines a rollout apart from the weights: one frozen object."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from forcing_kv.runtime_trt.dtypes import COMPUTE_DTYPES, DTYPES, DType
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import (
    ChunkShape,
    HeadPartition,
    LayerLayout,
    ModelShape,
    check_policy,
    pool_layouts,
    pool_nbytes,
)
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.schedule import Schedule


@dataclass(frozen=True)
class RolloutConfig:
    """Model shape, chunk shape, cache policy, head partition, schedule and compute dtype.

    Raises:
        InputError: the parts do not fit each other.
    """

    model: ModelShape
    chunk: ChunkShape
    policy: CachePolicy
    partition: HeadPartition
    schedule: Schedule = field(default_factory=Schedule)
    dtype: DType = "float32"
    """Dtype of weights, K/V pools and activations; latents are float32 whatever it is."""

    def __post_init__(self) -> None:
        found = (self.partition.num_layers, self.partition.num_heads)
        needed = (self.model.num_layers, self.model.num_heads)
        if found != needed:
            raise InputError(
                f"the head partition is for {found[0]} layers of {found[1]} heads, but the model "
                f"has {needed[0]} layers of {needed[1]}; use the partition made for this model"
            )
        if self.chunk.patch_size != self.model.patch_size:
            raise InputError(
                f"chunk patch size {self.chunk.patch_size} differs from the model's "
                f"{self.model.patch_size}"
            )
        if self.dtype not in COMPUTE_DTYPES:
            raise InputError(f"dtype is {self.dtype!r}; allowed are {list(COMPUTE_DTYPES)}")
        check_policy(self.policy, self.partition, self.chunk)

    @cached_property
    def layouts(self) -> tuple[LayerLayout, ...]:
        return pool_layouts(self.policy, self.partition, self.chunk)

    @cached_property
    def evicted_layers(self) -> tuple[int, ...]:
        """Layers that hold similarity-selected segments; empty when the budget is 0."""
        if self.policy.num_dynamic_frames == 0:
            return ()
        return tuple(layer for layer, layout in enumerate(self.layouts) if layout.group("dynamic"))

    @property
    def nbytes_kv(self) -> int:
        return pool_nbytes(self.layouts, self.model.head_dim, DTYPES[self.dtype].nbytes)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape of one chunk of latents, (F, C, h, w)."""
        chunk = self.chunk
        return (
            chunk.num_frames,
            self.model.in_channels,
            chunk.latent_height,
            chunk.latent_width,
        )

    @property
    def switchable(self) -> bool:
        """Whether a prompt switch fits the step graph (re-encodes at most one chunk)."""
        return self.policy.num_recached_frames <= self.chunk.num_frames

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
