"""What `Session.stream` returns: chunks one after another, the next one begun ahead on request."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from numpy.typing import ArrayLike

from forcing_kv.runtime_trt.backends.base import Float32
from forcing_kv.runtime_trt.chunk import Begun, Chunk
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.arguments import float_array


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
