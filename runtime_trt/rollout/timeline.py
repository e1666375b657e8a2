"""Which rows each kind of head holds before a chunk, and what the commit after it copies.

All heads of one kind hold the same frames, so the plan is per kind. It is host data: a backend
turns it into lengths, copies and, on a GPU, replays of captured graphs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

from forcing_kv.runtime_trt.rollout.policy import CachePolicy, HeadKind

KINDS: tuple[HeadKind, ...] = ("uncompressed", "static", "dynamic")


@dataclass(frozen=True)
class FrameCopy:
    """A run of frames to copy within one head's rows."""

    source: int
    """First frame of the source: of the chunk, or a slot of the pool."""
    destination: int
    """First slot of the pool, in frames from the head's first row."""
    count: int


@dataclass(frozen=True)
class GroupPlan:
    """One chunk, as a head of one kind sees it."""

    history: tuple[int, ...]
    """Frame held by each slot of the valid prefix before the chunk; -1 for selected segments."""
    moves: tuple[FrameCopy, ...]
    """Copies inside the pool, done before `writes`; sources and destinations never overlap."""
    writes: tuple[FrameCopy, ...]
    """Copies from the chunk's own rows."""
    dynamic_slot: int | None
    """Slot that receives the evicted segments, if this chunk selects any."""

    @property
    def history_frames(self) -> int:
        """Length of the valid prefix, in frames of rows."""
        return len(self.history)


@dataclass(frozen=True)
class ChunkPlan:
    """One pass over the timeline: an ordinary chunk, or a re-encode after a prompt switch."""

    index: int
    first_frame: int
    num_frames: int
    """Frames that are real; the rest of the chunk is padding."""
    evict: bool
    """Whether segments are scored and selected after the clean pass."""
    groups: Mapping[HeadKind, GroupPlan]
    steady: bool
    """Whether the chunk is whole and every kind of head sees what it sees in the long run."""


@dataclass
class _Rows:
    """Frames held by one kind of head, by slot."""

    sink: list[int] = field(default_factory=list)
    local: list[int] = field(default_factory=list)


def _runs(pairs: Sequence[tuple[int, int]]) -> tuple[FrameCopy, ...]:
    """Join (source, destination) pairs into contiguous runs."""
    runs: list[FrameCopy] = []
    for source, destination in pairs:
        last = runs[-1] if runs else None
        if (
            last is not None
            and source == last.source + last.count
            and destination == last.destination + last.count
        ):
            runs[-1] = FrameCopy(last.source, last.destination, last.count + 1)
        else:
            runs.append(FrameCopy(source, destination, 1))
    return tuple(runs)


def steady_plan(policy: CachePolicy, chunk_frames: int) -> ChunkPlan:
    """The plan of a chunk in the long run: all that follow it see as much."""
    timeline = Timeline(policy, chunk_frames)
    # The warm-up is over, the window is full and, where there is a selection, one was made.
    window = policy.num_sink_frames + policy.warmup_frames
    for _ in range(policy.last_warmup_chunk + 3 + -(-window // chunk_frames)):
        timeline.advance()
    return timeline.advance()


def every_plan(
    policy: CachePolicy, chunk_frames: int, *, switches: bool
) -> Iterator[tuple[ChunkPlan, bool]]:
    """Plans that a video can meet, each with whether it is a re-encode; the earliest come first.

    Of chunks that differ in frame numbers alone one stands for all.

    Args:
        switches: whether the prompt may be switched, at every chunk boundary.
    """
    waiting, seen = deque([Timeline(policy, chunk_frames)]), set()
    while waiting:
        timeline = waiting.popleft()
        if timeline.state in seen:
            continue
        seen.add(timeline.state)
        for switch in (False, True) if switches else (False,):
            following = deepcopy(timeline)
            plan = following.switch_prompt() if switch else following.advance()
            if plan is not None:
                yield plan, switch
                waiting.append(following)


class Timeline:
    """Frames in the pools as chunks go by; semantics of the paper, section 3 of the design."""

    def __init__(self, policy: CachePolicy, chunk_frames: int) -> None:
        self._policy = policy
        self._chunk_frames = chunk_frames
        self.reset()

    def reset(self) -> None:
        self._rows = {kind: _Rows() for kind in KINDS}
        self._has_dynamic = False
        self._switched = False
        self.next_chunk = 0

    @property
    def num_frames(self) -> int:
        return self.next_chunk * self._chunk_frames

    @property
    def state(self) -> tuple[object, ...]:
        """Equal where videos go on alike, frame numbers aside."""
        policy, end = self._policy, self.num_frames
        # A sink frame counts while a re-encode could reach it; a ring's slots come round.
        oldest = policy.num_recached_frames + 1
        windows = {policy.local_frames(kind, warmup=w) for kind in KINDS for w in (False, True)}
        turns = tuple(end % window for window in sorted(windows) if window > self._chunk_frames)
        rows = tuple(
            (
                tuple(min(end - frame, oldest) for frame in self._rows[kind].sink),
                tuple(end - frame for frame in self._rows[kind].local),
            )
            for kind in KINDS
        )
        chunk = min(self.next_chunk, policy.last_warmup_chunk + 1)
        return chunk, self._has_dynamic, self._switched, turns, rows

    def is_warmup(self, chunk: int) -> bool:
        """Whether `chunk` sees the warm-up window (never after a prompt switch)."""
        return chunk <= self._policy.last_warmup_chunk and not self._switched

    def advance(self) -> ChunkPlan:
        """Plan the next chunk and account for its commit."""
        chunk = self.next_chunk
        first = chunk * self._chunk_frames
        self.next_chunk += 1
        return self._plan(chunk, first, self._chunk_frames, self._selects(chunk))

    def switch_prompt(self) -> ChunkPlan | None:
        """Drop what a prompt switch drops and plan the re-encode; None before the first chunk."""
        if self.next_chunk == 0:
            return None
        for rows in self._rows.values():
            rows.local.clear()
            if not self._policy.global_sink:
                rows.sink.clear()
        self._has_dynamic = False
        self._switched = True
        count = min(self._policy.num_recached_frames, self.num_frames)
        return self._plan(self.next_chunk, self.num_frames - count, count, evict=False)

    def _selects(self, chunk: int) -> bool:
        policy = self._policy
        enough = len(self._rows["dynamic"].local) >= policy.num_temporal_frames
        steady = chunk > 0 and not self.is_warmup(chunk)
        return policy.num_dynamic_frames > 0 and steady and enough

    def _history(self, kind: HeadKind) -> tuple[int, ...]:
        rows = self._rows[kind]
        selected = self._policy.num_dynamic_frames
        selected *= kind == "dynamic" and self._has_dynamic
        return (*rows.sink, *rows.local, *(-1,) * selected)

    def _plan(self, chunk: int, first: int, count: int, evict: bool) -> ChunkPlan:
        history = {kind: self._history(kind) for kind in KINDS}
        steady = count == self._chunk_frames and all(
            len(history[kind]) == self._policy.steady_frames(kind) for kind in KINDS
        )
        groups: dict[HeadKind, GroupPlan] = {}
        for kind in KINDS:
            moves, writes = self._commit(kind, first, count)
            policy, slot = self._policy, None
            if evict and kind == "dynamic":
                slot = policy.num_sink_frames + policy.num_temporal_frames
            groups[kind] = GroupPlan(history[kind], moves, writes, slot)
        self._has_dynamic = self._has_dynamic or evict
        return ChunkPlan(chunk, first, count, evict, groups, steady)

    def _commit(
        self, kind: HeadKind, first: int, count: int
    ) -> tuple[tuple[FrameCopy, ...], tuple[FrameCopy, ...]]:
        """Fill the sink, then place the frames that the next chunk sees in slots 0..n-1."""
        policy, rows = self._policy, self._rows[kind]
        # A re-encoded frame that a kept sink already holds is not local too.
        fresh = [frame for frame in range(first, first + count) if frame not in rows.sink]
        taken = fresh[: policy.num_sink_frames - len(rows.sink)]
        writes = [(frame - first, len(rows.sink) + i) for i, frame in enumerate(taken)]
        rows.sink += taken
        fresh = fresh[len(taken) :]

        window = policy.local_frames(kind, warmup=self.is_warmup(self.next_chunk))
        held = sorted(rows.local + fresh)
        target = held[max(0, len(held) - window) :]
        num_target, base = len(target), policy.num_sink_frames
        slots: list[int | None] = [
            frame if frame in target else None for frame in rows.local[:num_target]
        ]
        slots += [None] * (num_target - len(slots))
        free = [slot for slot, frame in enumerate(slots) if frame is None]
        moved = [
            (slot, frame)
            for slot, frame in enumerate(rows.local)
            if slot >= num_target and frame in target
        ]
        moves = []
        for slot, frame in moved:
            destination = free.pop(0)
            moves.append((base + slot, base + destination))
            slots[destination] = frame
        incoming = [frame for frame in fresh if frame in target]
        assert len(incoming) == len(free), "every free slot is filled"
        for frame in incoming:
            # A ring, so that a window longer than a chunk comes back to the same copies.
            own = (frame - base) % num_target
            slot = own if window > self._chunk_frames and own in free else free[0]
            free.remove(slot)
            writes.append((frame - first, base + slot))
            slots[slot] = frame
        rows.local = [frame for frame in slots if frame is not None]
        return _runs(moves), _runs(writes)
