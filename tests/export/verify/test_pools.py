"""Packed pools (timeline, layout, copies, lengths, eviction) against lists of frames."""

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forcing_kv.export.model.graphs import EvictGraph, own_rows
from forcing_kv.runtime_trt.backends.base import ChunkPositions
from forcing_kv.runtime_trt.backends.stepwise import copy_rows
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ModelShape
from forcing_kv.runtime_trt.rollout.ports import kv_names
from forcing_kv.runtime_trt.rollout.timeline import ChunkPlan, Timeline, steady_plan

MODEL = ModelShape(3, dim=12, ffn_dim=4, num_heads=3, text_len=1, text_dim=1, freq_dim=2)
GRID = (6, 4)
UNWRITTEN = -1.0


@dataclass
class Pools:
    """Pools whose rows hold numbers that say which head's which token they are."""

    config: RolloutConfig
    timeline: Timeline = field(init=False)
    rows: list[torch.Tensor] = field(init=False)
    next_code: int = 0

    def __post_init__(self):
        self.timeline = Timeline(self.config.policy, self.config.chunk.num_frames)
        self.rows = [
            torch.full((layout.num_rows, MODEL.head_dim), UNWRITTEN)
            for layout in self.config.layouts
        ]

    def encode(self):
        """Fresh rows [H, F * T, D] for each layer, every one with a number of its own."""
        shape = (MODEL.num_layers, MODEL.num_heads, self.config.chunk.num_tokens)
        codes = torch.arange(self.next_code, self.next_code + np.prod(shape)).float()
        self.next_code += codes.numel()
        assert self.next_code < 2**24, "float32 no longer tells the rows apart"
        return list(codes.view(shape)[..., None].expand(*shape, MODEL.head_dim).clone())

    def head(self, code: float) -> tuple[int, int]:
        """Layer and head that a row was encoded for."""
        index = int(code) // self.config.chunk.num_tokens
        return index // MODEL.num_heads % MODEL.num_layers, index % MODEL.num_heads

    def own(self, new):
        """What a pass hands over of fresh rows."""
        return [own_rows(*pair) for pair in zip(new, self.config.layouts, strict=True)]

    def evict(self, new, scores):
        """Dynamic rows of each evicted layer, chosen by `scores` [F, P]."""
        layers, own = self.config.evicted_layers, self.own(new)
        pools, own = [self.rows[i] for i in layers], [own[i] for i in layers]
        per_layer = self.config.policy.selection == "per_layer"
        given_scores = [scores] * (len(layers) if per_layer else 1)
        rows, _, kept = EvictGraph(self.config).compact(given_scores, pools, pools, own, own)
        return rows, kept

    def commit(self, plan: ChunkPlan, new, dynamic):
        """Commits keys; values are the keys' negatives, and stay so."""
        layers = range(MODEL.num_layers)
        tensors = {}
        for family, chosen, keys in (
            ("hist", layers, self.rows),
            ("new", layers, self.own(new)),
            ("dyn", self.config.evicted_layers if plan.evict else (), dynamic),
        ):
            values = [-rows for rows in keys]
            tensors |= zip(kv_names(family, chosen), (*keys, *values), strict=True)
        copy_rows(plan, self.config, tensors)
        for keys, values in (kv_names("hist", [layer]) for layer in layers):
            assert torch.equal(tensors[values], -tensors[keys])


def check_copies(plan: ChunkPlan, config: RolloutConfig):
    """Copies of one commit stay within a head's rows, and none reads or writes where one wrote."""
    for layout in config.layouts:
        for group in layout.groups:
            todo = plan.groups[group.kind]
            sources, targets = [], []
            for move in todo.moves:
                sources += range(move.source, move.source + move.count)
            for copy in (*todo.moves, *todo.writes):
                targets += range(copy.destination, copy.destination + copy.count)
            for write in todo.writes:
                assert write.source >= 0
                assert write.source + write.count <= plan.num_frames
            if todo.dynamic_slot is not None:
                count = config.policy.num_dynamic_frames
                targets += range(todo.dynamic_slot, todo.dynamic_slot + count)
            assert len(targets) == len(set(targets))
            assert not set(sources) & set(targets)
            assert all(0 <= slot < group.capacity_frames for slot in sources + targets)


def check_views(pools: Pools, naive, positions: ChunkPositions, plan: ChunkPlan):
    """Every head's valid prefix holds exactly what the naive lists say, slot by slot."""
    config, tokens = pools.config, pools.config.chunk.tokens_per_frame
    for layer, layout in enumerate(config.layouts):
        for group in layout.groups:
            seen, segments = naive.view(group.kind)
            frames = {encoded.frame: encoded.content for encoded in seen}
            history = plan.groups[group.kind].history
            expected_slots = config.policy.num_dynamic_frames if segments is not None else 0
            assert sorted(f for f in history if f >= 0) == sorted(frames)
            assert history.count(-1) == expected_slots
            for head in range(group.first_head, group.first_head + group.num_heads):
                length = int(positions.hist_len[layer, head])
                assert length == len(history) * tokens <= layout.max_rows_per_head
                offset = layout.head_offset[head]
                found = pools.rows[layer][offset : offset + length, 0].split(tokens)
                for slot, frame in enumerate(history):
                    if frame >= 0:
                        assert torch.equal(found[slot], frames[frame][layer][head][:, 0])
                if segments is not None:
                    slots = [slot for slot, frame in enumerate(history) if frame == -1]
                    kept = torch.cat([found[slot] for slot in slots])
                    assert torch.equal(kept, segments[layer][head])


def check_steady(positions: ChunkPositions, plan: ChunkPlan, config: RolloutConfig):
    """A chunk is steady only if it sees what the steady form has baked in, and then it is."""
    kinds = {group.kind for layout in config.layouts for group in layout.groups}
    as_baked_in = int(positions.new_len[0]) == config.chunk.num_tokens and all(
        set(positions.hist_len[layer, group.heads].tolist()) == {group.steady_rows}
        for layer, layout in enumerate(config.layouts)
        for group in layout.groups
    )
    if plan.steady or len(kinds) == 3:
        assert plan.steady == as_baked_in


def check_owners(pools: Pools):
    """No row holds anything of another head."""
    for layer, layout in enumerate(pools.config.layouts):
        if not sum(group.num_rows for group in layout.groups):
            continue
        ends = [*layout.head_offset[1:], layout.num_rows]
        for head, (begin, end) in enumerate(zip(layout.head_offset, ends, strict=True)):
            codes = set(pools.rows[layer][begin:end].flatten().tolist()) - {UNWRITTEN}
            assert {pools.head(code) for code in codes} <= {(layer, head)}


def naive_segments(candidates, scores, config: RolloutConfig):
    """Codes [layer][head] of the segments with the smallest scores, in index order."""
    num_segments, count = config.policy.num_segments, config.policy.num_kept_segments
    flat = scores.flatten().tolist()
    kept = sorted(sorted(range(len(flat)), key=lambda i: (flat[i], i))[:count])
    size = config.chunk.tokens_per_frame // num_segments

    def rows(layer, head):
        parts = []
        for index in kept:
            frame, segment = divmod(index, num_segments)
            content = candidates[frame].content[layer][head][:, 0]
            parts.append(content[segment * size : (segment + 1) * size])
        return torch.cat(parts)

    heads = range(MODEL.num_heads)
    return kept, [[rows(layer, head) for head in heads] for layer in range(MODEL.num_layers)]


def frames_of(new, frames, encoded, tokens):
    """The naive model's frames of one pass."""
    return [
        encoded(frame, [rows[:, i * tokens : (i + 1) * tokens] for rows in new])
        for i, frame in enumerate(frames)
    ]


@settings(max_examples=100)
@given(data=st.data())
def test_a_long_video_becomes_steady(data, configs):
    config = data.draw(configs(MODEL, GRID), "config")
    plan = steady_plan(config.policy, config.chunk.num_frames)
    timeline = Timeline(config.policy, config.chunk.num_frames)
    plans = [timeline.advance() for _ in range(plan.index + 5)]
    assert plans[plan.index] == plan
    assert all(later.steady for later in plans[plan.index :])


@settings(max_examples=200)
@given(data=st.data())
def test_every_head_sees_the_frames_of_the_naive_lists(data, configs, frame_lists, encoded):
    config = data.draw(configs(MODEL, GRID), "config")
    frames, tokens = config.chunk.num_frames, config.chunk.tokens_per_frame
    naive, pools = frame_lists(config.policy, frames), Pools(config)
    num_chunks = 9
    # Early switches meet the warm-up, and frames that a kept sink holds already.
    moments = st.one_of(st.integers(0, 2), st.integers(0, num_chunks - 1))
    switches = data.draw(st.lists(moments, max_size=3), "switches")
    # Few distinct values, so that ties are common.
    score = st.integers(0, 3)
    for chunk in range(num_chunks):
        for _ in range(switches.count(chunk) if config.switchable else 0):
            plan = pools.timeline.switch_prompt()
            if chunk == 0:
                assert plan is None
                continue
            again = naive.switch()
            assert list(range(plan.first_frame, plan.first_frame + plan.num_frames)) == again
            assert not plan.evict
            for kind, group in plan.groups.items():
                assert group.history == tuple(e.frame for e in naive.sink), kind
            check_copies(plan, config)
            positions = ChunkPositions.of(plan, config)
            check_views(pools, naive, positions, plan)
            check_steady(positions, plan, config)
            new = pools.encode()
            pools.commit(plan, new, [])
            naive.end_switch(frames_of(new, again, encoded, tokens))
            check_owners(pools)
        plan = pools.timeline.advance()
        positions = ChunkPositions.of(plan, config)
        assert (plan.index, plan.first_frame, plan.num_frames) == (chunk, chunk * frames, frames)
        assert positions.new_len.tolist() == [frames * tokens]
        check_copies(plan, config)
        check_views(pools, naive, positions, plan)
        check_steady(positions, plan, config)
        new = pools.encode()
        own = frames_of(new, range(chunk * frames, (chunk + 1) * frames), encoded, tokens)
        candidates, segments, dynamic = naive.candidates(own), None, []
        assert plan.evict == (candidates is not None)
        if candidates is not None:
            size = frames * config.policy.num_segments
            drawn = data.draw(st.lists(score, min_size=size, max_size=size), "scores")
            scores = torch.tensor(drawn).float().view(frames, -1)
            wanted, segments = naive_segments(candidates, scores, config)
            dynamic, kept = pools.evict(new, scores)
            assert kept.tolist() == wanted
        pools.commit(plan, new, dynamic)
        naive.end_chunk(own, segments)
        check_owners(pools)
