"""Which frames each kind of head keeps: the cache policy.

Terms: s sink frames, S local frames of static heads, T_d local frames of dynamic heads, B dynamic
budget in frames, P segments per frame, a the last warm-up chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from forcing_kv.runtime_trt.errors import InputError

HeadKind = Literal["uncompressed", "static", "dynamic"]


_MAX = 1 << 20
_MAX_OF = {"num_layers": 1 << 10, "num_heads": 1 << 10, "last_warmup_chunk": 1 << 16}
"""Far above any model, and small enough that tables of so many entries are made at once."""


def require_at_least(where: str, values: Mapping[str, int], minimum: int) -> None:
    """Refuse what is no integer from `minimum` to a bound far above any model.

    Raises:
        InputError: the first, by name.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise InputError(f"{where}.{name} is {value!r}; it must be an integer >= {minimum}")
        if value > (most := _MAX_OF.get(name, _MAX)):
            raise InputError(f"{where}.{name} is {value}; at most {most} are supported")


@dataclass(frozen=True)
class CachePolicy:
    """What each kind of head keeps of the past. A dense window is a policy with no segments."""

    num_sink_frames: int = 1
    """s: first frames, kept for ever."""
    num_static_frames: int = 1
    """S: last frames that static heads keep."""
    num_temporal_frames: int = 1
    """T_d: last frames that dynamic heads keep."""
    num_dynamic_frames: int = 1
    """B: budget of similarity-selected segments of dynamic heads, in frames; 0 turns them off."""
    num_segments: int = 6
    """P: segments per frame."""
    last_warmup_chunk: int = 1
    """a: last chunk before compression; till then all heads see the sink and max(S, T_d) frames."""
    compress_first_layer: bool = False
    """Whether layer 0 is split into static and dynamic heads too (the published 14B setting)."""
    global_sink: bool = True
    """Whether a prompt switch keeps the sink."""
    selection: Literal["layer1", "per_layer"] = "layer1"
    """One selection from layer 1 for every layer (published), or each layer by its own keys."""
    warmup: Literal["exact", "steady"] = "exact"
    """`steady` allocates the steady capacity only and clips the warm-up window to it."""

    def __post_init__(self) -> None:
        frames = {
            "num_sink_frames": self.num_sink_frames,
            "num_static_frames": self.num_static_frames,
            "num_temporal_frames": self.num_temporal_frames,
            "num_dynamic_frames": self.num_dynamic_frames,
            "last_warmup_chunk": self.last_warmup_chunk,
        }
        require_at_least("CachePolicy", frames, 0)
        require_at_least("CachePolicy", {"num_segments": self.num_segments}, 1)
        choices: Mapping[str, tuple[Any, ...]] = {
            "selection": ("layer1", "per_layer"),
            "warmup": ("exact", "steady"),
            "compress_first_layer": (False, True),
            "global_sink": (False, True),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"CachePolicy.{name} is {getattr(self, name)!r}; allowed are {allowed}"
                )

    @property
    def warmup_frames(self) -> int:
        """Local frames of a warm-up chunk and of uncompressed layers, max(S, T_d)."""
        return max(self.num_static_frames, self.num_temporal_frames)

    @property
    def num_kept_segments(self) -> int:
        """Segments that survive each eviction, B * P."""
        return self.num_dynamic_frames * self.num_segments

    @property
    def num_recached_frames(self) -> int:
        """Frames that a prompt switch re-encodes (fewer if fewer exist)."""
        return max(self.warmup_frames, self.num_dynamic_frames, self.num_sink_frames, 1)

    @classmethod
    def dense(cls, window_frames: int, chunk_frames: int, num_sink_frames: int = 0) -> CachePolicy:
        """Dense attention over a window that counts the sink and the chunk's own frames.

        Raises:
            InputError: the window does not hold the sink and one chunk.
        """
        local = window_frames - num_sink_frames - chunk_frames
        if local < 0:
            raise InputError(
                f"a dense window of {window_frames} frames cannot hold {num_sink_frames} sink "
                f"frames and a chunk of {chunk_frames}; use at least "
                f"{num_sink_frames + chunk_frames}"
            )
        return cls(num_sink_frames, local, local, 0, last_warmup_chunk=0)

    def local_frames(self, kind: HeadKind, *, warmup: bool) -> int:
        """Local frames that a head of `kind` sees before a warm-up or a steady chunk."""
        steady = {
            "uncompressed": self.warmup_frames,
            "static": self.num_static_frames,
            "dynamic": self.num_temporal_frames,
        }[kind]
        if not warmup:
            return steady
        return min(self.warmup_frames, self.capacity_frames(kind) - self.num_sink_frames)

    def steady_frames(self, kind: HeadKind) -> int:
        """Frames of rows that a head of `kind` sees of the past in the long run, sink included."""
        dynamic = self.num_dynamic_frames if kind == "dynamic" else 0
        return self.num_sink_frames + self.local_frames(kind, warmup=False) + dynamic

    def own_frames(self, kind: HeadKind, chunk_frames: int) -> tuple[int, ...]:
        """Frames of a chunk, ascending, whose rows a head of `kind` may hand to a commit.

        At least one, so that no binding is empty.
        """
        if kind == "dynamic" and self.num_dynamic_frames:
            return tuple(range(chunk_frames))  # Every frame is a candidate.
        window = max(self.local_frames(kind, warmup=each) for each in (False, True))
        kept = set(range(chunk_frames)[-max(window, 1) :])
        kept |= set(range(chunk_frames)[: self.num_sink_frames])
        again = self.num_recached_frames
        if again <= chunk_frames:  # A prompt switch re-encodes as many, at the chunk's beginning.
            kept |= set(range(max(0, again - window), again))
        return tuple(sorted(kept))

    def capacity_frames(self, kind: HeadKind) -> int:
        """Frames of rows that the pool holds for one head of `kind`, sink included."""
        steady = self.steady_frames(kind)
        if self.warmup == "exact" and self.last_warmup_chunk >= 1:
            return max(steady, self.num_sink_frames + self.warmup_frames)
        return steady
