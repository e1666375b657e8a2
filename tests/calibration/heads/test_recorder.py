"""Recording real rollouts: against the official attention maps, and over sliding windows."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from forcing_kv.calibration.heads.head_profile import HeadProfile
from forcing_kv.calibration.heads.recorder import HeadRecorder, num_key_frames, widest_chunks
from forcing_kv.calibration.heads.rollouts import ProfilePlan, profile_heads
from forcing_kv.calibration.heads.rule import HeadRule
from forcing_kv.calibration.rollouts import Rollout, dense_config
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.verify.eager import eager_session
from forcing_kv.export.verify.golden import GoldenCase
from forcing_kv.runtime_trt.bundle.heads import read_heads
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.schedule import Schedule

GOLDEN = Path(__file__).parents[2] / "golden"
CHUNKS = {"real_ar1": 1, "real_ar2": 2, "real_ar6": 6}
SHAPE = ModelShape(2, dim=24, ffn_dim=16, num_heads=3, in_channels=2, text_len=3, text_dim=5)
CHUNK = ChunkShape(3, 4, 4)
SCHEDULE = Schedule((1000.0, 500.0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CausalWanModel(SHAPE).requires_grad_(False)


def rollout(prompt="p", seed=0):
    return Rollout(prompt, np.full((3, 5), float(len(prompt)), np.float32), seed)


@pytest.fixture(scope="module")
def golden_profile():
    case = GoldenCase.load(GOLDEN / "dense_selfforcing")
    config, inputs = case.config, case.inputs
    steps, num_chunks = config.schedule.num_steps, 7
    noise = inputs["noise"][0].reshape(num_chunks, *config.latent_shape)
    video = Rollout(
        "golden", inputs["prompt_embeds"][0], 0, noise, inputs["renoise"][:, : steps - 1]
    )
    plan = ProfilePlan(num_chunks, tuple(CHUNKS.values()), (steps,))
    return profile_heads(case.load_model(), config, [video], plan)


@pytest.mark.parametrize("name", CHUNKS)
def test_rollout_reproduces_the_official_maps_and_partition(golden_profile, name):
    golden = np.load(GOLDEN / "head_profile" / "golden.npz")
    place = [sample.chunk for sample in golden_profile.samples].index(CHUNKS[name])
    assert golden_profile.samples[place].step == 4
    np.testing.assert_allclose(
        golden_profile.maps[place].numpy(), golden[f"{name}/frame_maps"], rtol=0, atol=1e-6
    )
    one = (golden_profile.samples[place],), (golden_profile.maps[place],)
    published = read_heads(GOLDEN / "head_profile" / f"partition_{name}.json").partition
    assert HeadProfile(*one, HeadRule()).partition == published


@pytest.mark.parametrize(("window", "sink"), [(12, 0), (7, 1), (5, 2), (3, 0), (6, 3)])
def test_every_key_that_is_seen_is_counted_once(model, window, sink):
    """Maps of a sliding window against the whole softmax over the observed keys."""
    config = dense_config(model, CHUNK, window, sink, SCHEDULE)
    calls = []
    with eager_session(model, config, observer=calls.append) as session:
        session.set_prompt(rollout().prompt_embeds)
        list(session.stream(4))
    recorder = HeadRecorder(config, range(4))
    for call in calls:
        recorder(call)
        first = call.chunk * 3
        seen = {f for f in range(first + 3) if f < sink or f >= first - (window - sink - 3)}
        assert sorted(call.key_frames) == sorted(seen)
        assert len(seen) == num_key_frames(config, call.chunk)
    profile = recorder.profile(HeadRule())
    assert [(s.chunk, s.step) for s in profile.samples] == [
        (c, s) for c in range(4) for s in range(3)
    ]
    for frame_map in profile.maps:
        torch.testing.assert_close(frame_map.sum(-1), torch.ones(2, 3, 3))
    call, last = calls[-1], profile.maps[-1][-1]
    probabilities = (call.q @ call.k.transpose(1, 2) * call.q.shape[-1] ** -0.5).softmax(-1)
    order = sorted(range(len(call.key_frames)), key=call.key_frames.__getitem__)
    dense = probabilities.unflatten(2, (-1, 4)).sum(-1).unflatten(1, (3, -1)).mean(2)[..., order]
    torch.testing.assert_close(last, dense)


def test_chunks_that_see_the_most_frames_are_the_default(model):
    assert widest_chunks(dense_config(model, CHUNK, 21, 0, SCHEDULE), 7) == (6,)
    assert widest_chunks(dense_config(model, CHUNK, 9, 1, SCHEDULE), 5) == (2, 3, 4)


def test_samples_are_prompts_times_seeds_times_chunks_times_steps(model):
    config = dense_config(model, CHUNK, 9, 0, SCHEDULE)
    rollouts = [rollout(prompt, seed) for prompt in ("a", "bb") for seed in (3, 4)]
    done = []
    profile = profile_heads(
        model, config, rollouts, ProfilePlan(4, None, (0, 2)), on_pass=lambda: done.append(1)
    )
    found = [(s.prompt, s.seed, s.chunk, s.step) for s in profile.samples]
    expected = [(p, s, c, t) for p in ("a", "bb") for s in (3, 4) for c in (2, 3) for t in (0, 2)]
    assert found == expected
    assert len(done) == 4 * 4 * 3  # rollouts, chunks, passes
    assert len({frame_map.numpy().tobytes() for frame_map in profile.maps}) == len(found)


def test_the_same_seed_gives_the_same_profile(model):
    config = dense_config(model, CHUNK, 9, 0, SCHEDULE)
    first, second = (profile_heads(model, config, [rollout()], ProfilePlan(3)) for _ in range(2))
    np.testing.assert_array_equal(first.pooled_LH, second.pooled_LH)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (ProfilePlan(1), "every head counts as static"),
        (ProfilePlan(3, (0, 2)), "see .3, 9. key frames"),
        (ProfilePlan(3, (3,)), r"chunks \[3\] to profile are not all within 0 to 2"),
        (ProfilePlan(3, None, (4,)), r"steps \[4\] to profile are not all within 0 to 2"),
    ],
)
def test_passes_that_cannot_be_profiled_are_refused(model, plan, words):
    config = dense_config(model, CHUNK, 9, 0, SCHEDULE)
    with pytest.raises(InputError, match=words):
        profile_heads(model, config, [rollout()], plan)


def test_no_rollout_is_refused(model):
    with pytest.raises(InputError, match="at least one prompt"):
        profile_heads(model, dense_config(model, CHUNK, 9), [], ProfilePlan(3))


def test_an_absent_device_is_refused(model):
    with pytest.raises(InputError, match="device 'nonesuch' cannot be used"):
        profile_heads(
            model, dense_config(model, CHUNK, 9), [rollout()], ProfilePlan(3), device="nonesuch"
        )


def test_a_compressed_rollout_is_refused():
    partition = HeadPartition.uniform(2, 3, static=False)
    config = RolloutConfig(SHAPE, CHUNK, CachePolicy(num_segments=2), partition, SCHEDULE)
    with pytest.raises(InputError, match=r"CachePolicy\.dense"):
        HeadRecorder(config, [1])


def test_the_golden_rule_is_the_default():
    config = json.loads((GOLDEN / "head_profile" / "config.json").read_text())
    rule = HeadRule(config["THRESHOLD"], config["SKIP_FIRST_K"], config["LAST_K"])
    assert rule == HeadRule()
