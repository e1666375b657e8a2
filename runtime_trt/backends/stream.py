"""Chunks on their way: what was asked of a backend, what came back, and streams of them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forcing_kv.runtime_trt.backends.base import ChunkRequest, Float32, PendingChunk
from forcing_kv.runtime_trt.errors import InputError, NonFiniteError
from forcing_kv.runtime_trt.rollout.arguments import float_array
from forcing_kv.runtime_trt.rollout.timeline import ChunkPlan

_USUAL_PEAK = 1e3
"""Magnitude that prompt embeddings and noise stay far below."""


@dataclass(frozen=True)
class Begun:
    """A chunk that the backend works on."""

    plan: ChunkPlan
    request: ChunkRequest
    pending: PendingChunk

    def is_of(self, request: ChunkRequest) -> bool:
        """Whether `request` asks for this very chunk: same noise, same wishes."""
        mine = self.request
        same_noise = np.array_equal(mine.noise, request.noise)
        return mine.keep_x0 == request.keep_x0 and (
            same_noise and np.array_equal(mine.eps, request.eps)
        )


@dataclass(frozen=True)
class Chunk:
    """One generated chunk."""

    index: int
    latents: Float32
    """[F, C, h, w] float32."""
    timings_ms: dict[str, float]
    """Wall-clock time by part (steps, clean, evict, commit); a captured chunk has `chunk` alone."""
    scores: Float32 | None
    """[F, P]: similarity of every candidate segment, if this chunk selected."""
    kept: NDArray[np.int32] | None
    """[B * P]: kept segments, frame * P + segment, if this chunk selected."""
    x0_steps: list[Float32] | None = None
    """x0 of every denoise step, on request."""


def require_finite(begun: Begun, latents: Float32, prompt_peak: float, dtype: str) -> None:
    """Refuse latents that hold NaN or infinities.

    What is looked at is the host's copy, which every backend makes for the caller: 0.1 ms for
    1.2 MB at 480p on one core, and no word to the device.

    Args:
        begun: the chunk that the latents are of.
        latents: [F, C, h, w] float32, not changed.
        prompt_peak: largest magnitude of the prompt's embeddings.
        dtype: the bundle's name of its compute dtype.

    Raises:
        NonFiniteError: how many values are not finite, and the likely causes.
    """
    if np.isfinite(latents).all():
        return
    bad = latents.size - np.count_nonzero(np.isfinite(latents))
    request = begun.request
    peaks = {"prompt": prompt_peak, "noise": peak(request.noise, request.eps)}
    causes = [
        f"values of the {name} up to {largest:.1e}"
        for name, largest in peaks.items()
        if largest > _USUAL_PEAK
    ]
    if dtype == "float16":
        causes.append(
            "an overflow of float16, which ends at 65504 (export with --dtype bfloat16 or float32)"
        )
    causes.append("weights that are not finite or too large (`fkv verify BUNDLE` names them)")
    raise NonFiniteError(
        f"chunk {begun.plan.index}: {bad} of {latents.size} latent values are NaN or infinite; "
        f"likely causes are {', or '.join(causes)}. Call reset and set_prompt to begin again, "
        "or look at the values with allow_non_finite=True (`fkv run --allow-non-finite`)"
    )


def peak(*arrays: Float32) -> float:
    """Largest magnitude."""
    return max(float(np.abs(array).max(initial=0.0)) for array in arrays)


@dataclass(frozen=True)
class StreamSource:
    """What a stream asks of its session."""

    turn: Callable[[], AbstractContextManager[object]]
    """Holds the session for one call, or raises because another thread does."""
    check: Callable[[], None]
    """Raises once the session was closed or reset."""
    begin: Callable[[Float32 | None, Float32 | None], Begun]
    """Begins the next chunk from noise and eps; None draws them."""
    finish: Callable[[Begun], Chunk]
    """Waits for a chunk."""
    keep: Callable[[Begun], None]
    """Takes back a chunk that was begun and that nobody waits for any more."""


class Stream(Iterator[Chunk]):
    """See `Session.stream`; an object, so that an error does not end it as it ends a generator.

    Args:
        source: where chunks come from.
        num_chunks: how many; None for no end.
        noise: [num_chunks, F, C, h, w] float32, or None.
        eps: [num_chunks, n - 1, F, C, h, w] float32, or None.
        run_ahead: begin a chunk before the one before it is handed out.
    """

    def __init__(
        self,
        source: StreamSource,
        num_chunks: int | None,
        noise: Float32 | None,
        eps: Float32 | None,
        run_ahead: bool,
    ) -> None:
        self._source, self._run_ahead = source, run_ahead
        self._noise, self._eps = noise, eps
        self._num_left = math.inf if num_chunks is None else num_chunks
        self._num_begun = 0
        self._begun: deque[Begun] = deque()

    def __next__(self) -> Chunk:
        # An ended stream ends whatever the session does; what another thread ends meanwhile, too.
        with nullcontext() if self._is_over else self._source.turn():
            chunk = None if self._is_over else self._next()
        if chunk is None:
            raise StopIteration
        return chunk

    @property
    def _is_over(self) -> bool:
        return not (self._num_left or self._begun)

    def _next(self) -> Chunk:
        self._source.check()
        while self._num_left and len(self._begun) <= self._run_ahead:
            self._begin_next()
        return self._source.finish(self._begun.popleft())

    def _begin_next(self) -> None:
        index = self._num_begun
        noise, eps = (None if each is None else each[index] for each in (self._noise, self._eps))
        self._begun.append(self._source.begin(noise, eps))
        self._num_begun, self._num_left = index + 1, self._num_left - 1

    def close(self) -> None:
        """Abandon it; the session's next call hands out the chunk that was begun."""
        self._num_left = 0
        if self._begun:
            self._source.keep(self._begun.pop())
            self._begun.clear()

    def __del__(self) -> None:
        if hasattr(self, "_begun"):
            self.close()


def noise_by_chunk(
    name: str, value: ArrayLike | None, num_chunks: int | None, shape: tuple[int, ...]
) -> Float32 | None:
    """Explicit noise of a stream, [num_chunks, *shape].

    Raises:
        InputError: another shape, or what `float_array` refuses.
    """
    if value is None:
        return None
    array = float_array(name, value)
    count = len(array) if array.ndim else 0
    if count != num_chunks:
        raise InputError(
            f"explicit {name} is for {count} chunks but num_chunks is {num_chunks}; give one row a "
            "chunk"
        )
    return float_array(name, array, (count, *shape))
