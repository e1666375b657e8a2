"""The table of measured tactics."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from forcing_kv.plugins.compile import tuning
from forcing_kv.plugins.compile.launch import Problem, Tactic
from forcing_kv.plugins.compile.tuning import TunedTactic, best_tactic, read_table, update_table
from forcing_kv.plugins.registry import QK_NORM_ROPE
from forcing_kv.runtime_trt.errors import InputError

TACTICS = (
    Tactic("small", 4, portable=True),
    Tactic("wide", 8, least_shared_kb=227),
    Tactic("deep", 8, least_shared_kb=99),
)
PROBLEM = Problem({"N": 8, "H": 2, "D": 32}, {}, "bfloat16", 132)
ENTRY = TunedTactic(
    "FkQkNormRope", "GPU", "bfloat16", {"D": 32, "H": 2, "N": 8}, "deep", 0.1, {"wide": 0.2}, "-"
)


def test_committed_table_names_tactics_that_exist():
    pytest.importorskip("triton", reason="needs Triton: pip install 'forcing-kv[plugins]'")
    from forcing_kv.plugins.registry import OPS

    names = {s.name: {t.name for t in s.module("kernel").TACTICS} for s in OPS}
    assert all(entry.tactic in names[entry.op] for entry in read_table().values())


def test_measured_tactic_is_taken_on_its_gpu_alone(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    path.write_text("[]")
    update_table([ENTRY], path)
    monkeypatch.setattr(tuning, "_committed_table", lambda: read_table(path))
    assert best_tactic(QK_NORM_ROPE, TACTICS, PROBLEM, "GPU", 90).name == "deep"
    assert best_tactic(QK_NORM_ROPE, TACTICS[:2], PROBLEM, "GPU", 90).name == "wide"
    assert best_tactic(QK_NORM_ROPE, TACTICS[:1], PROBLEM, "GPU", 75).name == "small"
    assert best_tactic(QK_NORM_ROPE, TACTICS, PROBLEM, "other", 90).name == "wide"
    assert best_tactic(QK_NORM_ROPE, TACTICS, PROBLEM, "other", 86).name == "deep"
    assert best_tactic(QK_NORM_ROPE, TACTICS, PROBLEM, "other", 75).name == "small"


def test_nearest_measured_problem_decides(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    path.write_text("[]")
    update_table([ENTRY, replace(ENTRY, sizes={"D": 32, "H": 2, "N": 800}, tactic="small")], path)
    monkeypatch.setattr(tuning, "_committed_table", dict)
    monkeypatch.setattr(tuning, "_added", {})
    assert best_tactic(QK_NORM_ROPE, TACTICS, PROBLEM, "GPU", 90).name == "wide"
    tuning.add_table(path)
    for num_tokens, name in ((9, "deep"), (500, "small")):
        problem = replace(PROBLEM, sizes=PROBLEM.sizes | {"N": num_tokens})
        assert best_tactic(QK_NORM_ROPE, TACTICS, problem, "GPU", 90).name == name


def test_later_measurement_replaces_the_earlier(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("[]")
    update_table([ENTRY], path)
    update_table([replace(ENTRY, tactic="wide"), replace(ENTRY, gpu="other")], path)
    assert [entry.tactic for entry in read_table(path).values()] == ["wide", "deep"]


def test_table_survives_a_writer_that_is_stopped(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    update_table([ENTRY], path)

    def stop(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        update_table([replace(ENTRY, tactic="wide")], path)
    assert [entry.tactic for entry in read_table(path).values()] == ["deep"]


def test_unknown_field_is_refused_with_the_known_ones(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps([asdict(ENTRY) | {"speed": 1}]))
    with pytest.raises(InputError, match=r"unknown keys \['speed'\]"):
        read_table(path)
