"""The published rule against the maps, scores and partitions of the official script."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from forcing_kv.calibration.heads.rule import HeadRule
from forcing_kv.runtime_trt.bundle.heads import partition_layers, read_heads
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import HeadPartition

GOLDEN = Path(__file__).parents[2] / "golden" / "head_profile"
CONFIG = json.loads((GOLDEN / "config.json").read_text())
RULE = HeadRule(CONFIG["THRESHOLD"], CONFIG["SKIP_FIRST_K"], CONFIG["LAST_K"])


def golden_maps(name):
    """(layer, head, map) in file-name order, which is the order of the official script."""
    golden, record = np.load(GOLDEN / "golden.npz"), CONFIG["sets"][name]
    if "files" not in record:
        maps = golden[f"{name}/frame_maps"]
        for layer, head in np.ndindex(maps.shape[:2]):
            yield layer, head, torch.from_numpy(maps[layer, head])
        return
    for place in sorted(range(len(record["files"])), key=record["files"].__getitem__):
        frame_map = torch.from_numpy(golden[f"{name}/map/{place:02d}"])
        yield record["layer"][place], record["head"][place], frame_map


def score(rule, frame_map):
    last, whole = rule.masses(frame_map)
    return last / whole


def partition_of(scores, rule):
    """The partition by the score of each (layer, head)."""
    num_layers, num_heads = (1 + max(places) for places in zip(*scores, strict=True))
    static = (
        tuple(head for head in range(num_heads) if rule.is_static(scores[layer, head]))
        for layer in range(num_layers)
    )
    return HeadPartition(num_heads, tuple(static))


@pytest.mark.parametrize("name", CONFIG["sets"])
def test_scores_and_partition_are_the_official_ones(name):
    # Of a head given twice the last map counts.
    scores = {(layer, head): score(RULE, each) for layer, head, each in golden_maps(name)}
    expected = np.load(GOLDEN / "golden.npz")[f"{name}/score"]
    assert [scores[place] for place in np.ndindex(expected.shape)] == expected.ravel().tolist()

    published = json.loads((GOLDEN / f"partition_{name}.json").read_text())
    partition = partition_of(scores, RULE)
    assert partition_layers(partition) == published["layers"]
    assert read_heads(GOLDEN / f"partition_{name}.json").partition == partition


def test_the_threshold_itself_is_static():
    at = torch.tensor([[0.0, 1, 1, 1, 1, 1]])
    assert score(HeadRule(), at) == 0.8
    assert HeadRule().is_static(0.8)
    assert not HeadRule().is_static(np.nextafter(0.8, 0))


def test_constants_are_configurable():
    frame_map = torch.tensor([[5.0, 5, 1, 1, 2]])
    assert score(HeadRule(skip_first=2, last_k=1), frame_map) == 0.5
    assert score(HeadRule(skip_first=0, last_k=2), frame_map) == pytest.approx(3 / 14)


def test_fewer_key_frames_than_last_k_count_all():
    assert score(HeadRule(), torch.ones(3, 3)) == 1.5
    assert not HeadRule().is_informative(5)
    assert HeadRule().is_informative(6)


@pytest.mark.parametrize(
    ("frame_map", "words"),
    [
        (torch.ones(3), "cannot be scored"),
        (torch.ones(3, 1), "more than 1 key frames"),
        (torch.zeros(3, 5), "positive"),
        (torch.full((3, 5), torch.nan), "finite"),
        (torch.full((3, 5), torch.inf), "finite"),
    ],
)
def test_a_map_without_mass_is_refused(frame_map, words):
    with pytest.raises(InputError, match=words):
        score(HeadRule(), frame_map)


@pytest.mark.parametrize("values", [{"threshold": float("nan")}, {"skip_first": -1}, {"last_k": 0}])
def test_bad_constants_are_refused(values):
    with pytest.raises(InputError, match="HeadRule"):
        HeadRule(**values)
