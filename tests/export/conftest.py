"""A naive cache, written from the paper's text: lists of frames that only ever grow.

It shares no code with the packed pools: it never trims, moves or lays anything out, and finds what
a head sees by slicing lists when asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import strategies as st

from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.schedule import Schedule


@dataclass(frozen=True)
class Encoded:
    """One frame as one pass encoded it."""

    frame: int
    content: Any
    """K and V of the frame, or whatever stands for them."""


@dataclass
class FrameLists:
    """What a rollout has seen, and the views that heads have of it."""

    policy: CachePolicy
    chunk_frames: int
    sink: list[Encoded] = field(default_factory=list)
    past: list[Encoded] = field(default_factory=list)
    """Every frame since the last prompt switch that is not in the sink."""
    segments: Any = None
    """What the last selection kept; None where there is none."""
    next_chunk: int = 0
    switched: bool = False

    def window(self, kind: str) -> int:
        """Local frames that a head of `kind` may see before the next chunk."""
        p = self.policy
        wide = max(p.num_static_frames, p.num_temporal_frames)
        if kind == "uncompressed":
            return wide
        steady = p.num_static_frames if kind == "static" else p.num_temporal_frames
        if self.switched or self.next_chunk > p.last_warmup_chunk:
            return steady
        room = steady + (p.num_dynamic_frames if kind == "dynamic" else 0)
        return wide if p.warmup == "exact" else min(wide, room)

    def view(self, kind: str) -> tuple[list[Encoded], Any]:
        """Frames that a head of `kind` sees before the next chunk, oldest first, and segments."""
        window = self.window(kind)
        local = self.past[len(self.past) - min(window, len(self.past)) :]
        return self.sink + local, self.segments if kind == "dynamic" else None

    def candidates(self, own: Sequence[Encoded]) -> list[Encoded] | None:
        """The F candidates and the frame after them, or None if this chunk selects nothing."""
        p = self.policy
        steady = self.switched or self.next_chunk > p.last_warmup_chunk
        enough = len(self.past) >= p.num_temporal_frames
        if not (p.num_dynamic_frames and self.next_chunk and steady and enough):
            return None
        first = len(self.past) - p.num_temporal_frames
        return (self.past[first:] + list(own))[: self.chunk_frames + 1]

    def end_chunk(self, own: Sequence[Encoded], segments: Any) -> None:
        """Account for a finished chunk; `segments` is what it selected, or None."""
        if segments is not None:
            self.segments = segments
        self._append(own)
        self.next_chunk += 1

    def switch(self) -> list[int]:
        """Drop what a prompt switch drops; returns the frames to encode again."""
        p, total = self.policy, self.next_chunk * self.chunk_frames
        wanted = max(
            p.num_static_frames, p.num_temporal_frames, p.num_dynamic_frames, p.num_sink_frames, 1
        )
        self.past, self.segments, self.switched = [], None, True
        if not p.global_sink:
            self.sink = []
        return list(range(max(0, total - wanted), total))

    def end_switch(self, own: Sequence[Encoded]) -> None:
        """Account for the frames that were encoded again."""
        kept = {encoded.frame for encoded in self.sink}
        self._append([encoded for encoded in own if encoded.frame not in kept])

    def _append(self, frames: Sequence[Encoded]) -> None:
        for encoded in frames:
            full = len(self.sink) == self.policy.num_sink_frames
            (self.past if full else self.sink).append(encoded)


@st.composite
def draw_config(draw: st.DrawFn, model: ModelShape, grid: tuple[int, int]) -> RolloutConfig:
    """Any configuration that the project accepts, for `model` at h x w latents of `grid`."""
    frames = draw(st.integers(1, 4))
    chunk = ChunkShape(frames, *grid, model.patch_size)
    budget = draw(st.integers(0, frames))
    # A prompt can be switched where no window exceeds a chunk.
    switchable = budget > 0 or draw(st.booleans())
    window = frames if switchable else 3 * frames + 2
    tokens = chunk.tokens_per_frame
    divisors = [n for n in range(1, tokens + 1) if tokens % n == 0]
    policy = CachePolicy(
        num_sink_frames=draw(st.integers(0, frames if switchable else 2 * frames)),
        num_static_frames=draw(st.integers(0, window)),
        num_temporal_frames=draw(st.integers(1 if budget else 0, window)),
        num_dynamic_frames=budget,
        num_segments=draw(st.sampled_from(divisors)),
        last_warmup_chunk=draw(st.integers(0, 3)),
        compress_first_layer=draw(st.booleans()),
        global_sink=draw(st.booleans()),
        selection=draw(st.sampled_from(["layer1", "per_layer"])),
        warmup=draw(st.sampled_from(["exact", "steady"])),
    )
    heads = st.sets(st.integers(0, model.num_heads - 1))
    static = [tuple(sorted(draw(heads))) for _ in range(model.num_layers)]
    if budget and len(static[1]) == model.num_heads:
        static[1] = static[1][1:]
    steps = draw(st.sampled_from([(1000.0,), (1000.0, 500.0), (1000.0, 750.0, 250.0)]))
    partition = HeadPartition(model.num_heads, tuple(static))
    try:
        return RolloutConfig(model, chunk, policy, partition, Schedule(steps))
    except InputError as error:
        raise AssertionError(f"{policy} with {frames} frames is refused: {error}") from error


@pytest.fixture(scope="session")
def frame_lists() -> type[FrameLists]:
    return FrameLists


@pytest.fixture(scope="session")
def encoded() -> type[Encoded]:
    return Encoded


@pytest.fixture(scope="session")
def configs() -> Any:
    """Strategy of configurations: `configs(model, grid)`."""
    return draw_config
