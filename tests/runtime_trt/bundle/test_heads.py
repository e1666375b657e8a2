"""Reading partition files: the project's own, the published forms, and everything wrong."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcing_kv.runtime_trt.bundle.heads import parse_partition, partition_layers, read_heads
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import HeadPartition, ModelShape

MODEL = ModelShape(num_layers=3, dim=16, ffn_dim=16, num_heads=4)
LAYERS = [
    {"layer_idx": 0, "static_head": [1, 3], "dynamic_head": [0, 2]},
    {"layer_idx": 1, "static_head": [], "dynamic_head": [0, 1, 2, 3]},
    {"layer_idx": 2, "static_head": [0, 1, 2, 3], "dynamic_head": []},
]
PARTITION = HeadPartition(4, ((1, 3), (), (0, 1, 2, 3)))
PUBLISHED = {
    "format": "forcingkv_offline_head_custom2",
    "profile": "selfforcing_naive_sink_3_thr08",
    "num_layers": 3,
    "num_heads": 4,
    "description": "free text",
    "layers": LAYERS,
}
OWN = {
    **PUBLISHED,
    "format": "forcing_kv.heads",
    "schema_version": 1,
    "model": {"sha256": "ab" * 32},
    "scores": [[0.1, 0.9, 0.2, 0.8], [0.0] * 4, [1.0] * 4],
}
UNSORTED = [
    {"layer_idx": 0, "static_head": [3, 1], "dynamic_head": [2, 0]},
    {"layer_idx": 2, "static_head": [3, 2, 1, 0], "dynamic_head": []},
    {"layer_idx": 1, "static_head": [], "dynamic_head": [3, 2, 1, 0]},
]
WITHOUT_INDEX = [{k: v for k, v in layer.items() if k != "layer_idx"} for layer in LAYERS]


def test_partition_of_published_layers():
    assert partition_layers(PARTITION) == LAYERS


@pytest.mark.parametrize(
    "payload",
    [
        LAYERS,
        PUBLISHED,
        {"layers": LAYERS},
        {"layers": UNSORTED},
        {"layers": {str(layer["layer_idx"]): layer for layer in LAYERS}},
        WITHOUT_INDEX,
        OWN,
    ],
)
@pytest.mark.parametrize("model", [None, MODEL])
def test_every_form_loads(payload, model):
    assert parse_partition(payload, "heads.json", model) == PARTITION


def test_own_file_tells_scores_and_model(tmp_path):
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(OWN))
    found = read_heads(path, MODEL)
    assert found.partition == PARTITION
    assert found.model_sha256 == "ab" * 32
    assert found.scores == tuple(map(tuple, OWN["scores"]))
    assert len(found.sha256) == 64


def test_published_file_tells_nothing_else(tmp_path):
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(LAYERS))
    found = read_heads(path, MODEL)
    assert (found.model_sha256, found.scores) == (None, None)


@given(st.integers(1, 6), st.data())
def test_written_partitions_read_back(num_heads, data):
    layers = data.draw(st.lists(st.sets(st.integers(0, num_heads - 1)), min_size=1, max_size=5))
    partition = HeadPartition(num_heads, tuple(tuple(sorted(heads)) for heads in layers))
    written = json.loads(json.dumps(partition_layers(partition)))
    assert parse_partition(written, "x") == partition


def changed(layer, **entries):
    layers = copy.deepcopy(LAYERS)
    layers[layer].update(entries)
    return layers


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (7, "expected a list of layers .* found int"),
        ({}, "expected a list of layers"),
        ({"heads": []}, "expected a list of layers"),
        ([], r"layers \[0, 1, 2\] are missing: 0 layers found"),
        ([3], "layer 0 is not an object"),
        ([{"static": [0]}], "neither `static_head` nor `dynamic_head`; found .'static'"),
        (
            [{"layer_idx": 0, "static_head": [1, 3], "dynamic_heads": [0, 2]}, *LAYERS[1:]],
            r"layer 0: heads \[0, 2\] are in neither list",
        ),
        (LAYERS[:2], r"layers \[2\] are missing: 2 layers found, 0 to 2 needed"),
        ([LAYERS[0], LAYERS[2]], r"layers \[1\] are missing"),
        ([*LAYERS, {**LAYERS[0], "layer_idx": 3}], r"layers \[3\] are too many"),
        ([*LAYERS, LAYERS[0]], "layer 0 is listed twice"),
        (changed(0, layer_idx="x"), "layer 0: layer_idx is 'x'; it must be an integer"),
        (changed(0, layer_idx=-1), "layer index -1"),
        (changed(0, static_head=[0, 1, 3]), r"layer 0: heads \[0\] are in both lists"),
        (changed(0, static_head=[3]), r"layer 0: heads \[1\] are in neither list"),
        (changed(2, static_head=[0, 1, 2, 3, 4]), r"layer 2: heads \[4\] are outside 0 to 3"),
        (changed(2, static_head=[-1, 0, 1, 2, 3]), r"heads \[-1\] are outside 0 to 3"),
        (changed(0, static_head=[1, 1, 3]), r"heads \[1\] are listed twice"),
        (changed(0, static_head="13"), "layer 0: static_head is '13'; it must be a list"),
        (changed(0, static_head=[1.0, 3]), r"layer 0: static_head\.0 is 1\.0; .* an integer"),
        (changed(0, static_head=[True, 3]), r"layer 0: static_head\.0 is True; .* an integer"),
        ({**PUBLISHED, "num_heads": 0}, "`num_heads` is 0; it must be an integer of 1 to"),
        ({**PUBLISHED, "num_heads": True}, "num_heads is True; it must be an integer"),
        ({**PUBLISHED, "num_heads": 12}, "`num_heads` is 12, but the model has 4"),
        ({**PUBLISHED, "num_layers": 30}, "`num_layers` is 30, but the model has 3"),
        ({**OWN, "schema_version": 2}, "schema version 2; this release reads 1"),
        ({**OWN, "schema_version": None}, "schema version None"),
    ],
)
def test_wrong_content_is_refused_with_a_reason(payload, words):
    with pytest.raises(InputError, match=words) as caught:
        parse_partition(payload, "heads.json", MODEL)
    assert str(caught.value).startswith("heads.json: ")


def test_a_partition_of_another_model_names_the_remedy():
    other = ModelShape(num_layers=4, dim=16, ffn_dim=16, num_heads=4)
    with pytest.raises(InputError, match="fkv calibrate heads"):
        parse_partition(LAYERS, "heads.json", other)


def test_without_a_model_the_highest_head_counts():
    with pytest.raises(InputError, match=r"layer 0: heads \[3\] are in neither list"):
        parse_partition(changed(0, static_head=[1]), "heads.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 10, b"[" * 10**5, b"[NaN]"])
def test_a_file_that_is_not_json_is_refused(tmp_path, content):
    path = tmp_path / "heads.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not readable as a JSON head partition"):
        read_heads(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such head partition file"):
        read_heads(tmp_path / "absent.json")


@pytest.mark.parametrize("scores", [[[0.1]], 3, [["x"] * 4] * 3])
def test_scores_that_do_not_fit_are_refused(tmp_path, scores):
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({**OWN, "scores": scores}))
    with pytest.raises(InputError, match=r"heads\.json: `?scores.* (must|it must be)"):
        read_heads(path)
