"""What a compiled engine offers to the chunk-graph runtime, whoever compiled it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol


class GraphEngine(Protocol):
    """Compiled prompt, step and evict graphs that can be enqueued on a CUDA stream.

    One engine serves one session. The runtime owns every input and output buffer, and calls
    `enqueue` once per graph before any capture, so that lazy set-up is over by then.
    """

    name: str
    """Backend name, as users type it."""

    @property
    def placed(self) -> Mapping[str, int] | None:
        """Where the last launch left the outputs that had no binding, until the next launch.

        None for an engine that allocates no output: there every one is bound.
        """
        ...

    @property
    def scratch_nbytes(self) -> Mapping[str, int]:
        """Scratch that each graph needs at a binding called `SCRATCH`; 0 or absent for none.

        Graphs never run at the same time within a session, so they share one buffer.
        """
        ...

    def enqueue(self, graph: str, bindings: Mapping[str, int], stream: int) -> None:
        """Launch one graph asynchronously, on `stream` alone, without any host synchronisation.

        While the stream is being captured the launch is recorded: every address must be baked into
        it, and nothing may be allocated outside `capturing`.

        Args:
            graph: prompt, step or evict.
            bindings: device address of every input and output by its manifest name (256-byte
                aligned, dense row-major), and of `SCRATCH` where the graph needs some. Outputs must
                be written at these addresses; one may be missing where there is `placed`.
            stream: `cudaStream_t` of a non-default stream, as an integer.

        Raises:
            ForcingKvError: the engine refused the launch.
        """
        ...

    def capturing(self, stream: int) -> AbstractContextManager[None]:
        """Entered around every capture; an engine with its own allocator turns to a private pool.

        What that pool hands out must live as long as the engine. Others return `nullcontext()`.
        """
        ...

    def sibling(self) -> GraphEngine:
        """Another engine for another session, with the same weights in device memory."""
        ...

    def close(self) -> None:
        """Release what this session holds; may be called twice. The last sibling frees weights."""
        ...


SCRATCH = "scratch"
"""Name of the scratch address among an engine's bindings."""
