"""What a commit copies, counted by hand for a small pool."""

from dataclasses import replace

from forcing_kv.runtime_trt.rollout.moves import HeadRows, RowMove, moves
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.timeline import Timeline

LAYER_0 = ("hist", 0, 12)
"""Three heads that hold two frames of 6 tokens each."""
STATIC = ("hist", 0, 12)
"""One head of two frames."""
DYNAMIC = ("hist", 12, 18)
"""Two heads of three frames: sink, local, selected."""


def run(layer, source, target, num_heads):
    """A move of one frame; ends are family, first row, pitch and offset."""
    return RowMove(layer, HeadRows(*source), HeadRows(*target), num_heads, 6)


def test_moves_of_a_small_pool(tiny_config):
    timeline = Timeline(tiny_config.policy, tiny_config.chunk.num_frames)
    plans = [timeline.advance() for _ in range(3)]
    # The last frame of the chunk's three is the local one, the first one the sink. Of a head that
    # selects nothing the middle one is not handed over.
    local = [
        run(0, ("new", 0, 12, 6), (*LAYER_0, 6), 3),
        run(1, ("new", 0, 12, 6), (*STATIC, 6), 1),
        run(1, ("new", 12, 18, 12), (*DYNAMIC, 6), 2),
    ]
    sink = [
        run(0, ("new", 0, 12, 0), (*LAYER_0, 0), 3),
        run(1, ("new", 0, 12, 0), (*STATIC, 0), 1),
        run(1, ("new", 12, 18, 0), (*DYNAMIC, 0), 2),
    ]
    selected = run(1, ("dyn", 0, 6, 0), (*DYNAMIC, 12), 2)
    first = [move for pair in zip(sink, local, strict=True) for move in pair]
    assert [list(moves(plan.groups, tiny_config)) for plan in plans] == [
        first, local, [*local, selected]
    ]  # fmt: skip


def test_frames_next_to_each_other_are_one_run(tiny_config):
    policy = CachePolicy(0, 3, 3, 0, last_warmup_chunk=0, compress_first_layer=True)
    config = replace(tiny_config, policy=policy)
    plan = Timeline(policy, config.chunk.num_frames).advance()
    found = [move for move in moves(plan.groups, config) if move.layer == 0]
    # A static head and two dynamic ones, each with room for the whole chunk of 18 rows.
    assert found == [
        RowMove(0, HeadRows("new", 0, 18, 0), HeadRows("hist", 0, 18, 0), 1, 18),
        RowMove(0, HeadRows("new", 18, 18, 0), HeadRows("hist", 18, 18, 0), 2, 18),
    ]


def test_nothing_is_copied_where_nothing_is_kept(tiny_config):
    config = replace(tiny_config, policy=CachePolicy(0, 0, 0, 0, last_warmup_chunk=0))
    plan = Timeline(config.policy, config.chunk.num_frames).advance()
    assert not list(moves(plan.groups, config))
