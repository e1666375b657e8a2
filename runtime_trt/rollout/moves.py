"""What a commit copies, as moves of rows: the plan of a chunk applied to the layout of the pools.

A backend turns a move into array slices or into byte addresses, for keys and for values alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import HeadGroup
from forcing_kv.runtime_trt.rollout.policy import HeadKind
from forcing_kv.runtime_trt.rollout.ports import Family
from forcing_kv.runtime_trt.rollout.timeline import FrameCopy, GroupPlan


@dataclass(frozen=True)
class HeadRows:
    """A run of rows in each of several heads that lie one after another in a tensor of rows."""

    family: Family
    """Which keys and values."""
    first_row: int
    """Row where the first head begins, heads flattened."""
    pitch: int
    """Rows of one head."""
    offset: int
    """Rows of each head that come before the run."""


@dataclass(frozen=True)
class RowMove:
    """A copy into the pool of one layer."""

    layer: int
    source: HeadRows
    target: HeadRows
    num_heads: int
    num_rows: int
    """Rows of one head's run."""


def moves(groups: Mapping[HeadKind, GroupPlan], config: RolloutConfig) -> Iterator[RowMove]:
    """The copies of a commit, which may run in any order: none reads or writes where one writes.

    Args:
        groups: what a chunk's plan says of each kind of head.
    """
    for layer, layout in enumerate(config.layouts):
        for group in layout.groups:
            yield from _group_moves(groups[group.kind], group, layer, config)


def _group_moves(
    plan: GroupPlan, group: HeadGroup, layer: int, config: RolloutConfig
) -> Iterator[RowMove]:
    tokens = config.chunk.tokens_per_frame
    selected = config.policy.num_dynamic_frames
    pool = (group.row_offset, group.rows_per_head)
    own = (group.own_row_offset, group.own_rows_per_head)
    runs: list[tuple[Family, tuple[int, int], FrameCopy]] = [
        *(("hist", pool, run) for run in plan.moves),
        *(("new", own, _handed_over(run, group)) for run in plan.writes),
    ]
    if plan.dynamic_slot is not None:
        runs.append(("dyn", (0, selected * tokens), FrameCopy(0, plan.dynamic_slot, selected)))
    for family, heads, run in runs:
        yield RowMove(
            layer,
            HeadRows(family, *heads, run.source * tokens),
            HeadRows("hist", *pool, run.destination * tokens),
            group.num_heads,
            run.count * tokens,
        )


def _handed_over(run: FrameCopy, group: HeadGroup) -> FrameCopy:
    """A run of a chunk's frames, counted among those that the group hands over."""
    source = group.own_frames.index(run.source)
    wanted = tuple(range(run.source, run.source + run.count))
    assert group.own_frames[source : source + run.count] == wanted, "a frame is not handed over"
    return FrameCopy(source, run.destination, run.count)
