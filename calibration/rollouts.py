"""Videos that are generated to be watched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.runtime_trt.backends.stream import Chunk
from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.schedule import Schedule
from forcing_kv.runtime_trt.session import Session


@dataclass(frozen=True)
class Rollout:
    """One video to generate while watching."""

    prompt: str
    """Name of the prompt in reports."""
    prompt_embeds: NDArray[np.float32]
    """[text_len, text_dim]."""
    seed: int
    noise: NDArray[np.float32] | None = None
    """[num_chunks, F, C, h, w]: explicit initial noise; drawn from the seed if None."""
    eps: NDArray[np.float32] | None = None
    """[num_chunks, n - 1, F, C, h, w]: explicit re-noise; drawn from the seed if None."""

    def generate(self, session: Session, num_chunks: int) -> Iterator[Chunk]:
        """Its chunks, from the beginning; what the session made before is forgotten."""
        session.reset()
        session.set_prompt(self.prompt_embeds)
        yield from session.stream(num_chunks, seed=self.seed, noise=self.noise, eps=self.eps)


def dense_config(
    model: CausalWanModel,
    chunk: ChunkShape,
    window_frames: int,
    num_sink_frames: int = 0,
    schedule: Schedule | None = None,
    dtype: DType = "float32",
) -> RolloutConfig:
    """A rollout under dense attention; heads stay in checkpoint order.

    Args:
        model: the denoiser.
        chunk: chunk shape.
        window_frames: frames that a query sees, sink and own chunk included.
        num_sink_frames: first frames that stay visible.
        schedule: few-step schedule; the standard one if None.
        dtype: compute dtype.
    """
    shape = model.shape
    return RolloutConfig(
        shape,
        chunk,
        CachePolicy.dense(window_frames, chunk.num_frames, num_sink_frames),
        HeadPartition.uniform(shape.num_layers, shape.num_heads, static=False),
        schedule or Schedule(),
        dtype,
    )
