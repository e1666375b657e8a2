"""Where the candidate segments of an eviction lie: the attributes that its two operators share.

The last T_d local frames of a head followed by the new chunk's F frames form a chain of T_d + F
frames. The first F frames of the chain are candidates; candidate j is compared with frame j + 1.
A frame is cut into P segments of T / P consecutive tokens; segment p of candidate j has the index
j * P + p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

from forcing_kv.plugins.op_spec import Attributes, AttributeSpec


@dataclass(frozen=True)
class CandidateLayout:
    """Rows of the dynamic heads' candidates in a layer's pool and in the new chunk."""

    first_head: int
    """First dynamic head; the dynamic heads are first_head .. H - 1."""
    row_offset: int
    """First pool row of the first dynamic head."""
    rows_per_head: int
    """Pool rows of each dynamic head."""
    sink_rows: int
    """Rows of a head that hold the sink; the candidates' local frames follow them."""
    temporal_frames: int
    """Local frames in the chain, T_d; 1 .. F."""
    tokens_per_frame: int
    """Tokens of one latent frame, T."""
    num_segments: int
    """Segments of a frame, P; divides T."""

    def __post_init__(self) -> None:
        if self.temporal_frames < 1 or self.tokens_per_frame % self.num_segments:
            raise ValueError(
                f"{self}: temporal_frames must be at least 1 and num_segments must divide "
                "tokens_per_frame"
            )
        if self.sink_rows + self.local_rows > self.rows_per_head:
            raise ValueError(
                f"{self}: the sink and {self.local_rows} local rows do not fit in rows_per_head"
            )

    @property
    def local_rows(self) -> int:
        """History rows of a head that belong to the chain."""
        return self.temporal_frames * self.tokens_per_frame

    @property
    def segment_tokens(self) -> int:
        return self.tokens_per_frame // self.num_segments

    def attributes(self) -> dict[str, int]:
        """Attributes by name, in the operators' order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def arguments(self) -> tuple[int, ...]:
        return astuple(self)


CANDIDATE_ATTRIBUTES = tuple(AttributeSpec(field.name, "int") for field in fields(CandidateLayout))


def candidate_sizes(shapes: Sequence[Sequence[Any]], attributes: Attributes) -> dict[str, Any]:
    """Sizes of an eviction by name, from the shapes of a pool [R, D] and of new rows [H, N, D]."""
    pool_shape, new_shape = shapes
    layout = CandidateLayout(*(int(attributes[field.name]) for field in fields(CandidateLayout)))
    return {
        "R": pool_shape[0],
        "D": pool_shape[1],
        "H": new_shape[0],
        "N": new_shape[1],
        "G": new_shape[0] - layout.first_head,
        "F": new_shape[1] // layout.tokens_per_frame,
        "T": layout.tokens_per_frame,
        "P": layout.num_segments,
        "S": layout.segment_tokens,
    }
