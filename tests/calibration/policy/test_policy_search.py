"""The policy search on a tiny random model: measures, Pareto front, files and mistakes."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import fkv

from forcing_kv.calibration.model_source import ModelSource
from forcing_kv.calibration.options import SourceOptions
from forcing_kv.calibration.policy.measures import (
    Candidate,
    Measurement,
    boundary_ratio,
    latent_psnr,
    pareto_front,
)
from forcing_kv.calibration.policy.picture import best_by_size
from forcing_kv.calibration.policy.search import PolicyGrid, PolicySearch, search_record
from forcing_kv.calibration.policy.source import load_search
from forcing_kv.calibration.rollouts import dense_config
from forcing_kv.export.cost.devices import find_device
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.request.shipped import shipped_model
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.schedule import Schedule

SHAPE = ModelShape(2, 24, 16, 2, in_channels=4, text_len=4, text_dim=8, freq_dim=8)
SCORES = ((0.9, 0.2), (0.6, 0.4))


@pytest.fixture(scope="module")
def search():
    torch.manual_seed(0)
    model = CausalWanModel(SHAPE).requires_grad_(False)
    for value in model.parameters():
        if value.dim() > 1:
            torch.nn.init.normal_(value, std=0.3)
    prompts = {"one": np.ones((4, 8), np.float32)}
    source = ModelSource(
        "tiny", model, "0" * 64, ChunkShape(3, 4, 4), Schedule((1000, 500)), prompts
    )
    dense = dense_config(model, source.chunk, 9, 0, source.schedule)
    partition = HeadPartition(2, ((0,), ()))
    return PolicySearch(
        source, dense, CachePolicy(num_segments=2), PolicyGrid(), SCORES, partition,
        find_device("h200"), num_chunks=3,
    )  # fmt: skip


def test_grid_is_tried_once_and_what_cannot_run_is_named(search):
    grid = PolicyGrid((0.5, 0.55, 0.3), (0, 1), (2, 3), (1,), (1, 4))
    found = replace(search, grid=grid)
    candidates = found.candidates()
    configs = [candidate.config for candidate in candidates]
    assert len(set(configs)) == len(configs)
    # 0.55 makes the partition of 0.5, whatever P is without segments.
    assert {candidate.threshold for candidate in candidates} == {0.5, 0.3}
    assert {c.label for c in candidates if c.threshold == 0.5} == {
        "t0.5 S1 T1 B0", "t0.5 S1 T4 B0", "t0.5 S1 T1 B1 P2"
    }  # fmt: skip
    assert any("num_segments" in reason for reason in found.skipped)
    # Layer 1 is all static at 0.3: segments cannot be scored.
    assert any("layer 1 has no dynamic head" in reason for reason in found.skipped)
    with pytest.raises(InputError, match="change the grid"):
        replace(search, grid=PolicyGrid((0.5,), (1,), (3,))).candidates()


def test_combinations_that_keep_the_same_rows_are_tried_once(search):
    """Without static heads S counts only above T_d; where both are equal, so are the heads."""
    grid = PolicyGrid((0.95, 0.5), (0, 1), (2,), (1, 2, 3), (2,))
    found = replace(search, grid=grid)
    labels = [candidate.label for candidate in found.candidates()]
    assert labels == [
        "t0.95 S1 T2 B0", "t0.95 S3 T2 B0", "t0.95 S1 T2 B1 P2", "t0.95 S3 T2 B1 P2",
        "t0.5 S1 T2 B0", "t0.5 S3 T2 B0",
        "t0.5 S1 T2 B1 P2", "t0.5 S2 T2 B1 P2", "t0.5 S3 T2 B1 P2",
    ]  # fmt: skip
    same = [
        replace(search.dense, policy=replace(search.base, num_static_frames=frames,
                num_temporal_frames=2), partition=HeadPartition.uniform(2, 2, static=False))
        for frames in (1, 2)
    ]  # fmt: skip
    first, second = search.compare([Candidate(None, config) for config in same])
    assert first.psnr_by_chunk == second.psnr_by_chunk
    assert first.nbytes_kv == second.nbytes_kv


def test_a_policy_that_keeps_everything_equals_dense(search):
    """And one that keeps little does not; a search reports both with their bytes."""
    whole = Candidate(None, replace(search.dense, policy=CachePolicy.dense(9, 3)))
    candidates = [
        whole,
        *replace(search, grid=PolicyGrid((None,), (1,), (2,), (1,), (1,))).candidates(),
    ]
    ticks = []
    equal, small = search.compare(candidates, lambda: ticks.append(1))
    assert len(ticks) == 3 * 3
    assert math.isinf(equal.psnr_db)
    assert equal.boundary_ratio == 1
    assert 0 < small.psnr_db < 100
    assert math.isinf(small.psnr_by_chunk[0])  # the first chunk has no past to lose
    assert small.nbytes_kv < equal.nbytes_kv
    assert small.fps_bound > equal.fps_bound
    record = search_record(search, [equal, small])
    assert json.loads(json.dumps(record, allow_nan=False))["candidates"][0]["psnr_db"] is None
    assert all(one["pareto"] for one in record["candidates"])


@pytest.mark.parametrize("own", [True, False])
def test_heads_of_another_checkpoint_are_warned_of(tmp_path, caplog, own):
    content = json.loads(shipped_model("digits").HEADS.read_text())
    if not own:
        content["model"]["sha256"] = "ab" * 32
    (tmp_path / "heads.json").write_text(json.dumps(content))
    loaded = load_search(SourceOptions(), tmp_path / "heads.json", 3, None)
    assert len(loaded.scores) == 4
    assert ["fkv calibrate heads" in record.getMessage() for record in caplog.records] == (
        [] if own else [True]
    )


def test_psnr_and_boundaries_by_hand():
    wanted = np.zeros((1, 2, 2, 1, 1, 1), np.float32)
    wanted[0, 1] = 4
    assert latent_psnr(wanted + 0.4, wanted) == pytest.approx(20, abs=1e-4)
    video = np.asarray([0, 1, 5, 6, 10, 11], np.float32).reshape(1, 3, 2, 1, 1, 1)
    assert boundary_ratio(video) == 4


def test_pareto_front_drops_what_is_beaten_in_everything(search):
    def made(psnr, nbytes, fps):
        return Measurement(Candidate(None, search.dense), psnr, (), 1.0, nbytes, fps)

    best, cheap, beaten, twin = made(30, 10, 5), made(20, 5, 9), made(20, 6, 9), made(20, 5, 9)
    assert pareto_front([best, cheap, beaten, twin]) == [best, cheap, twin]


def test_the_picture_numbers_what_is_best_at_its_size():
    sizes, psnr = (3, 1, 2, 1, 4), (5.0, 2.0, 2.0, 3.0, 6.0)
    entries = [{"nbytes_kv": n, "psnr_db": p} for n, p in zip(sizes, psnr, strict=True)]
    assert best_by_size(entries) == [entries[3], entries[0], entries[4]]
    assert best_by_size([]) == []


def test_command_on_a_checkpoint_writes_both_files(search, tmp_path):
    config = {"dim": 24, "ffn_dim": 16, "num_heads": 2, "num_layers": 2, "in_dim": 4,
              "freq_dim": 8, "text_len": 4, "text_dim": 8}  # fmt: skip
    preset = {"model": config, "latent_size": [4, 4], "policy": {"num_segments": 2},
              "schedule": {"steps": [1000, 500]}}  # fmt: skip
    (tmp_path / "tiny.json").write_text(json.dumps(preset))
    torch.save(search.source.model.state_dict(), tmp_path / "tiny.pt")
    np.save(tmp_path / "prompts.npy", np.ones((4, 8), np.float32))
    layers = [{"static_head": [0], "dynamic_head": [1]}] * 2
    (tmp_path / "heads.json").write_text(json.dumps({"layers": layers}))
    options = ["calibrate", "policy", "--model", tmp_path / "tiny.json", "--checkpoint",
               tmp_path / "tiny.pt", "--prompt-embeds", tmp_path / "prompts.npy", "--heads",
               tmp_path / "heads.json", "--out", tmp_path / "out", "--num-chunks", 3,
               "--dynamic-frames", "0,1", "--temporal-frames", "1", "--json"]  # fmt: skip
    assert fkv(*options, "--dry-run").exit_code == 0
    assert not (tmp_path / "out").exists()
    assert fkv(*options).exit_code == 0
    record = json.loads((tmp_path / "out" / "policy.json").read_text())
    assert [one["num_dynamic_frames"] for one in record["candidates"]] == [0, 1]
    assert (tmp_path / "out" / "policy.png").read_bytes()[:4] == b"\x89PNG"
    for extra, message in (([], "exist"), (["--force", "--thresholds", "0.5"], "needs scores"),
                           (["--force", "--device", "abacus"], "abacus"),
                           (["--force", "--segments", "x"], "--segments is 'x'")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            fkv(*options, *extra)
