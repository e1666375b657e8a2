"""How the tiles of FkHeadIndexedAttention are dealt to the programs.

Three schedules, as tactics:

- `tiles`: a program for every tile; heads with more keys come first, and the last rows of every
  head are cut into tiles of half the height, launched last, so that the final wave is short.
- `persistent`: the same tiles in the same order, but one program per multiprocessor, which takes
  every so-manieth.
- `split`: one program per multiprocessor and an equal share of all pairs of query and key tiles for
  each; see `split.py`.

Share of the device's time in which its multiprocessors work, as a test predicts it for 132 of them
and the 1.3B model (4 static and 8 dynamic heads, query tiles of 128, key tiles of 64). It knows
nothing of caches, of the lower rate of half tiles, or of the cost of a split tile's pieces.

|                             | 480p | 720p | 1080p |
|-----------------------------|------|------|-------|
| `tiles` without half tiles  | 86%  | 97%  | 97%   |
| `tiles`                     | 94%  | 97%  | 99%   |
| `persistent`                | 94%  | 96%  | 99%   |
| `split`                     | 98%  | 99%  | 100%  |
"""

from __future__ import annotations

from forcing_kv.plugins.compile.launch import ceil_div

MIN_TAIL = 64
"""Smallest tile of the tail: the height of a warp group's matrix instruction."""


def tile_counts(
    num_tokens: int, num_heads: int, tile: int, tail: int, num_sms: int
) -> tuple[int, int]:
    """Full tiles and tail tiles of every head.

    As many full tiles as make whole waves over the device (one program per multiprocessor); the
    rows that are left go to tail tiles. Without a smaller tail, or where everything fits in whole
    waves, full tiles alone.

    Args:
        num_tokens: queries of a head, N.
        num_heads: heads, H.
        tile: rows of a full tile.
        tail: rows of a tail tile.

    Returns:
        Full tiles and tail tiles; together they cover every query.
    """
    all_tiles = ceil_div(num_tokens, tile)
    waves = num_heads * all_tiles // num_sms
    full = waves * num_sms // num_heads
    if tail >= tile or num_heads * all_tiles % num_sms == 0:
        return all_tiles, 0
    full = min(full, num_tokens // tile)
    return full, ceil_div(num_tokens - full * tile, tail)
