"""Rows that the heads of a layer see in the long run: the attributes of FkSteadyAttention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class HeadBlock:
    """Heads that follow one another and see equally many rows."""

    heads: slice
    """In a head-major tensor."""
    pool: slice
    """Their rows in the pool."""
    capacity: int
    """Pool rows of each head."""
    num_rows: int
    """Those that it sees, from its first row on."""

    @property
    def num_heads(self) -> int:
        return int(self.heads.stop - self.heads.start)


@dataclass(frozen=True)
class SteadyLayout:
    """Two blocks of heads, of which either may be empty."""

    num_first: int
    """Heads of the first block; the others are the second."""
    first_capacity: int
    """Pool rows of each head of the first block."""
    first_rows: int
    """Those that it sees."""
    second_capacity: int
    second_rows: int

    def attributes(self) -> dict[str, int]:
        """Attributes by name, in the operator's order."""
        return asdict(self)

    def blocks(self, num_heads: int) -> Iterator[HeadBlock]:
        """Those that have heads, in order."""
        end = self.num_first * self.first_capacity
        if self.num_first:
            heads, pool = slice(0, self.num_first), slice(0, end)
            yield HeadBlock(heads, pool, self.first_capacity, self.first_rows)
        if self.num_first < num_heads:
            heads = slice(self.num_first, num_heads)
            pool = slice(end, end + (num_heads - self.num_first) * self.second_capacity)
            yield HeadBlock(heads, pool, self.second_capacity, self.second_rows)
