"""What a chunk enqueues: copies of its commit, and the variants that a video meets."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcing_kv.runtime_trt.backends.stepwise import copy_rows
from forcing_kv.runtime_trt.cuda.chunk_graph import MAX_PREPARED
from forcing_kv.runtime_trt.cuda.chunk_program import (
    ChunkVariant,
    commit_copies,
    expected_variants,
)
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.ports import ports
from forcing_kv.runtime_trt.rollout.timeline import Timeline

POLICIES = {
    "published": CachePolicy(),
    "no segments": CachePolicy(num_dynamic_frames=0, num_static_frames=2),
    "unequal": CachePolicy(num_static_frames=1, num_temporal_frames=3, last_warmup_chunk=2),
    "no sink": CachePolicy(num_sink_frames=0, num_temporal_frames=2, compress_first_layer=True),
    "dense ring": CachePolicy.dense(21, 3, 1),
    "odd ring": CachePolicy.dense(11, 3, 0),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_commit_copies_do_what_the_plain_commit_does(tiny_config, policy):
    config: RolloutConfig = replace(tiny_config, policy=policy)
    rng = np.random.default_rng(0)
    dim, tokens = config.model.head_dim, config.chunk.tokens_per_frame

    def buffer(*shape):
        return rng.standard_normal((*shape, dim)).astype(np.float32)

    layers = range(config.model.num_layers)
    buffers = {}
    for part in "kv":
        for layer in layers:
            buffers[f"hist_{part}.{layer}"] = buffer(config.layouts[layer].num_rows)
            buffers[f"new_{part}.{layer}"] = buffer(config.layouts[layer].num_own_rows)
        for layer in config.evicted_layers:
            heads = config.layouts[layer].group("dynamic").num_heads
            rows = policy.num_dynamic_frames * tokens
            buffers[f"dyn_{part}.{layer}"] = buffer(heads, rows)
    wanted = {name: array.copy() for name, array in buffers.items()}
    timeline = Timeline(policy, config.chunk.num_frames)
    plans = [timeline.advance() for _ in range(9)]
    if config.switchable:
        plans += [timeline.switch_prompt(), timeline.advance(), timeline.advance()]
    for plan in plans:
        copy_rows(plan, config, wanted)
        for copy in commit_copies(ChunkVariant.of(plan, config, ports(config)), config):
            source, target = (
                buffers[name].reshape(-1).view(np.uint8) for name in (copy.source, copy.target)
            )
            for row in range(copy.height):
                begin = copy.source_offset + row * copy.source_pitch
                end = copy.target_offset + row * copy.target_pitch
                target[end : end + copy.width] = source[begin : begin + copy.width]
        for name, array in wanted.items():
            np.testing.assert_array_equal(buffers[name], array, err_msg=name)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_every_chunk_of_a_video_is_an_expected_variant(tiny_config, policy):
    config = replace(tiny_config, policy=policy)
    timeline = Timeline(policy, config.chunk.num_frames)
    plans = [timeline.advance() for _ in range(200)]
    for graphs in (ports(config), ports(config, steady=False)):
        met = {ChunkVariant.of(plan, config, graphs) for plan in plans}
        expected = set(expected_variants(config, graphs))
        assert met == {variant for variant in expected if not variant.recache} or config.switchable
        assert met <= expected
        assert any(variant.steady for variant in met) == ("step_steady" in graphs)


@given(
    frames=st.tuples(*[st.integers(0, 3)] * 4),
    last_warmup_chunk=st.integers(0, 4),
    warmup=st.sampled_from(["exact", "steady"]),
    global_sink=st.booleans(),
    switches=st.lists(st.booleans(), min_size=1, max_size=12),
)
def test_what_can_switch_prompts_captures_nothing_late(tiny_config, frames, switches, **options):
    sink, static, temporal, dynamic = frames
    policy = CachePolicy(sink, static, temporal, min(dynamic, 3 * temporal), **options)
    config = replace(tiny_config, policy=policy)
    assert config.switchable
    prepared = list(expected_variants(config, ports(config)))
    assert len(prepared) <= MAX_PREPARED
    timeline = Timeline(policy, config.chunk.num_frames)
    for switch in switches:
        plan = timeline.switch_prompt() if switch else timeline.advance()
        if plan is not None:
            variant = ChunkVariant.of(plan, config, ports(config), recache=switch)
            assert variant in prepared
