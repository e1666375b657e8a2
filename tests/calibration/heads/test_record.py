"""Pooling, stability, `heads.json` and the heat map."""

import json
import struct
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forcing_kv.calibration.heads.head_profile import HeadProfile, Sample
from forcing_kv.calibration.heads.picture import draw_heads
from forcing_kv.calibration.heads.record import heads_record
from forcing_kv.calibration.heads.rule import HeadRule
from forcing_kv.calibration.heads.stability import measure_stability
from forcing_kv.runtime_trt.bundle.atomic.files import write_json
from forcing_kv.runtime_trt.bundle.heads import partition_layers, read_heads
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy

MODEL = ModelShape(2, dim=24, ffn_dim=16, num_heads=3)
CONFIG = RolloutConfig(
    MODEL,
    ChunkShape(3, 4, 4),
    CachePolicy.dense(9, 3),
    HeadPartition.uniform(2, 3, static=False),
)


def make_profile(num_samples, seed=0, num_key_frames=9):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(num_samples, 2, 3, 3, num_key_frames, generator=generator)
    maps[..., -4:] *= torch.rand(2, 3, generator=generator)[..., None, None] * 12
    samples = [Sample(f"p{i % 2}", i // 2 % 2, 2, i % 3) for i in range(num_samples)]
    return HeadProfile(tuple(samples), tuple(maps / maps.sum(-1, keepdim=True)), HeadRule())


def test_pooled_scores_are_those_of_the_mean_map():
    profile = make_profile(12)
    mean = torch.stack(profile.maps).double().mean(0)
    expected = mean[..., -4:].sum((-1, -2)) / mean[..., 1:].sum((-1, -2))
    np.testing.assert_allclose(profile.pooled_LH, expected.numpy(), atol=1e-6)


def test_a_single_sample_has_the_published_score():
    profile = make_profile(1)
    masses = [[HeadRule().masses(head) for head in layer] for layer in profile.maps[0]]
    scores = [[last / whole for last, whole in layer] for layer in masses]
    assert profile.pooled_LH.tolist() == scores == profile.scores_SLH[0].tolist()


@given(st.integers(1, 9), st.integers(0, 99))
def test_stability_against_plain_loops(num_samples, seed):
    profile = make_profile(num_samples, seed)
    found = measure_stability(profile)
    classes = [(scores >= 0.8).ravel().tolist() for scores in profile.scores_SLH]
    pooled = (profile.pooled_LH >= 0.8).ravel().tolist()
    same = [a == b for one in classes for a, b in zip(one, pooled, strict=True)]
    assert found.agreement == pytest.approx(np.mean(same))
    pairs = [
        a == b for one, other in combinations(classes, 2) for a, b in zip(one, other, strict=True)
    ]
    assert found.pairwise_agreement == pytest.approx(np.mean(pairs) if pairs else 1.0)
    unanimous = [len(set(column)) == 1 for column in zip(*classes, strict=True)]
    assert found.unanimous_heads == pytest.approx(np.mean(unanimous))
    np.testing.assert_allclose(found.score_std, profile.scores_SLH.std(0))
    for step, share in found.agreement_by["step"].items():
        maps = [
            m for m, s in zip(profile.maps, profile.samples, strict=True) if s.step == int(step)
        ]
        alone = HeadProfile(tuple(profile.samples[: len(maps)]), tuple(maps), profile.rule)
        agree = (alone.pooled_LH >= 0.8) == (profile.pooled_LH >= 0.8)
        assert share == pytest.approx(agree.mean())


def test_identical_samples_are_stable():
    profile = make_profile(1)
    repeated = HeadProfile(
        tuple(Sample("p", seed, 0, 0) for seed in range(4)), profile.maps * 4, HeadRule()
    )
    found = measure_stability(repeated)
    assert (found.agreement, found.pairwise_agreement, found.unanimous_heads) == (1, 1, 1)
    assert found.mean_score_std == 0


@pytest.mark.parametrize("count", [0, 1])
def test_a_profile_needs_its_maps(count):
    with pytest.raises(InputError, match="one map for each sample and at least one"):
        HeadProfile(make_profile(2).samples, make_profile(2).maps[:count], HeadRule())
    with pytest.raises(InputError, match="at least one"):
        HeadProfile((), (), HeadRule())


def test_a_layer_that_was_not_observed_is_refused():
    profile = make_profile(1)
    profile.maps[0][1] = torch.nan
    with pytest.raises(InputError, match="finite"):
        _ = profile.pooled_LH


def test_heads_file_reads_back(tmp_path):
    profile = make_profile(6)
    path = tmp_path / "new" / "heads.json"
    write_json(path, heads_record(profile, CONFIG, "cd" * 32))
    found = read_heads(path, MODEL)
    assert found.partition == profile.partition
    assert found.model_sha256 == "cd" * 32
    np.testing.assert_array_equal(found.scores, profile.pooled_LH)
    assert [file.name for file in path.parent.iterdir()] == ["heads.json"]

    record = json.loads(path.read_text())
    assert record["layers"] == partition_layers(profile.partition)
    assert record["rule"] == {"threshold": 0.8, "skip_first": 1, "last_k": 4}
    assert record["num_static"] + record["num_dynamic"] == 6
    assert record["rollouts"]["prompts"] == ["p0", "p1"]
    assert record["rollouts"]["num_key_frames"] == 9
    assert record["stability"]["num_samples"] == 6


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "heads.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"score": float("nan")})
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("num_layers", "num_heads"), [(1, 1), (4, 5), (30, 12), (40, 40)])
def test_heat_map_is_written(tmp_path, num_layers, num_heads):
    scores = np.random.default_rng(0).random((num_layers, num_heads)) * 1.2
    path = tmp_path / "new" / "heads.png"
    draw_heads(path, scores, 0.8, "title")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert 400 < width < 2200
    assert 300 < height < 2200
