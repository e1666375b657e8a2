"""The chain of frames that an eviction looks at, in plain torch.

Legend: G dynamic heads, H heads, N new tokens, D head dim, R pool rows, F frames per chunk,
T tokens per frame.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forcing_kv.plugins.frame_chain.layout import CandidateLayout


def frame_chain(pool: Tensor, new: Tensor, layout: CandidateLayout) -> Tensor:
    """Join the dynamic heads' last local frames with the chunk's frames.

    Args:
        pool: history keys or values [R, D].
        new: keys or values of the chunk [H, N, D].
        layout: where the dynamic heads' rows lie.

    Returns:
        The first F + 1 frames of the chain [G, F + 1, T, D], ascending in time.
    """
    new_GND = new[layout.first_head :]
    num_heads, num_tokens, _ = new_GND.shape
    stop = layout.row_offset + num_heads * layout.rows_per_head
    runs = pool[layout.row_offset : stop].unflatten(0, (num_heads, layout.rows_per_head))
    local = runs[:, layout.sink_rows : layout.sink_rows + layout.local_rows]
    num_rows = num_tokens + layout.tokens_per_frame
    chain = torch.cat((local, new_GND), dim=1)[:, :num_rows]
    return chain.unflatten(1, (-1, layout.tokens_per_frame))
