"""Rows, suite, report and the numbers beside them."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import fkv

from forcing_kv.export.cost.work import mean_frames, steady_history
from forcing_kv.runtime_trt.console import ExitCode
from forcing_kv.runtime_trt.errors import BackendUnavailableError, InputError
from forcing_kv.tools.bench.cli import finish
from forcing_kv.tools.bench.measure.summary import latency
from forcing_kv.tools.bench.report import environment
from forcing_kv.tools.bench.report.rows import append_row, read_rows
from forcing_kv.tools.bench.report.tables import cells, latest, more_cells, write_report
from forcing_kv.tools.bench.suite import runner
from forcing_kv.tools.bench.suite.items import SuiteItem, predict, suite_items
from forcing_kv.tools.bench.suite.runner import SuiteOptions, run_suite, selected
from forcing_kv.tools.bench.workloads import step_work, workload


def test_rows_come_back(tmp_path, row):
    path = tmp_path / "folder" / "rows.jsonl"
    rows = [row("chunk", "a"), row("chunk", "b", status="failed", error="e", metrics={})]
    for each in rows:
        append_row(path, each)
    assert list(read_rows(path)) == rows
    path.write_text(path.read_text() + '{"schema": 1, "kind": "chunk", "speed": 3}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:3: not a benchmark row"):
        list(read_rows(path))


def test_row_of_a_result_that_is_not_finite_is_json(tmp_path, row):
    gate = {"error": float("inf"), "out": [{"error": float("nan"), "allowed": 0.5}]}
    bad = row("chunk", "a", status="gate_failed", gate=gate, metrics={})
    append_row(tmp_path / "rows.jsonl", bad)
    (back,) = read_rows(tmp_path / "rows.jsonl")
    assert back.gate == {"error": None, "out": [{"error": None, "allowed": 0.5}]}
    assert finish([bad], as_json=True) == ExitCode.CHECK_FAILED


@pytest.mark.parametrize(
    ("printed", "found"),
    [("580.1, 700.00, 1980", ("580.1", "700.00", "1980")), ("", (None, None, None))],
)
def test_what_the_driver_tells(printed, found, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{printed}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    names = ("driver", "power_limit_w", "max_sm_mhz")
    assert environment._driver() == dict(zip(names, found, strict=True))


def test_suite_skips_what_is_done_and_names_what_is_left(tmp_path, row):
    options = SuiteOptions(tmp_path / "rows.jsonl", tmp_path, only=("eager",))
    items = [SuiteItem("tiny", "native", name, "cpu", "float32", num_chunks=5)
             for name in ("eager-dense", "eager-grouped", "onnxruntime")]  # fmt: skip
    append_row(options.out, row("rollout", "eager-dense"))
    append_row(options.out, row("chunk", "eager-grouped"))
    assert [item.subject for item in selected(items, options)] == ["eager-grouped"]


def test_what_failed_before_is_tried_last(tmp_path, row):
    options = SuiteOptions(tmp_path / "rows.jsonl", tmp_path)
    items = [SuiteItem("tiny", "native", name, "cpu", "float32", num_chunks=5)
             for name in ("inductor", "operators")]  # fmt: skip
    append_row(options.out, row("chunk", "inductor", status="failed", error="slow", metrics={}))
    assert [item.subject for item in selected(items, options)] == ["operators", "inductor"]


def test_what_a_budget_cut_off_keeps_its_place_once(tmp_path, row):
    options = SuiteOptions(tmp_path / "rows.jsonl", tmp_path)
    items = [SuiteItem("tiny", "native", name, "cpu", "float32", num_chunks=5)
             for name in ("inductor", "operators")]  # fmt: skip
    cut = row("chunk", "inductor", status="failed", run={"asked_chunks": 5, "cut_off": True})
    for names in (["inductor", "operators"], ["operators", "inductor"]):
        append_row(options.out, cut)
        assert [item.subject for item in selected(items, options)] == names


def test_rows_of_another_gpu_are_kept_apart(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    item = SuiteItem("tiny", "native", "eager-dense", "cuda", "float32", num_chunks=5)
    for gpu, ms in (("A", 300.0), ("B", 100.0)):
        environment = {"device": "cuda", "gpu": gpu, "versions": {}, "commit": "abc"}
        rows = [row(kind, "eager-dense", environment=environment) for kind in ("chunk", "rollout")]
        rows[0].metrics["denoiser_ms"]["median"] = ms
        for each in rows:
            append_row(path, each)
    for gpu, left in (("A", []), ("C", [item])):
        assert selected([item], SuiteOptions(path, tmp_path, gpu=gpu)) == left
    lines = list(cells(list(read_rows(path))))
    assert [(line[2], line[8]) for line in lines] == [("300.00", "1.00x"), ("100.00", "1.00x")]


def test_items_are_ordered_and_predicted():
    items = suite_items("cuda", "wan-1.3b")
    names = [item.name for item in items]
    assert len(set(names)) == len(names)
    assert names[:7] == [
        "480p/checks", "480p/ops", "480p/eager-dense", "480p/operators-graph",
        "480p/inductor-no-autotune", "1080p/eager-dense", "1080p/operators-graph",
    ]  # fmt: skip
    assert [item.name for item in items if item.growth_chunks] == ["480p/inductor-no-autotune"]
    predicted = {item.name: seconds for item, seconds in predict(items)}
    assert all(0 < seconds < item.timeout_s for item, seconds in predict(items))
    # References are made by the first that needs them.
    assert predicted["480p/operators-graph"] > predicted["480p/operators"]
    assert predicted["1080p/eager-dense"] > predicted["480p/eager-dense"]
    assert all(seconds == 0 for _, seconds in predict(suite_items("cpu", "digits")))


@pytest.mark.parametrize(("device", "model"), [("cuda", "digits"), ("cpu", "golden")])
def test_suite_names_its_models(device, model):
    with pytest.raises(InputError, match=f"on --device {device}, not {model}"):
        suite_items(device, model)


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        ("golden", "native", r"'golden' is unknown; choose one of \['wan-1.3b', 'digits'\]"),
        ("digits", "480p", "has one size, native; found '480p'"),
        ("wan-1.3b", "native", "give latent rows.*1080p"),
    ],
)
def test_a_model_or_size_that_is_not_there_is_refused(model, size, message):
    with pytest.raises(InputError, match=message):
        workload(model, size, "dense", "float32")


def test_part_of_no_name_is_refused(tmp_path):
    options = SuiteOptions(tmp_path / "rows.jsonl", tmp_path, only=("inductor", "4k"))
    with pytest.raises(InputError, match="--only 4k: no item has it in its name"):
        selected(suite_items("cpu", "digits"), options)


def test_compilers_keep_their_caches_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/own")
    environment = runner._environment(SuiteOptions(tmp_path / "rows.jsonl", tmp_path / "folder"))
    assert environment["TRITON_CACHE_DIR"] == str(tmp_path / "folder/triton")
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == "/own"
    assert "PATH" in environment


def test_item_that_does_not_end_is_stopped(tmp_path, monkeypatch):
    real = runner.subprocess.Popen
    monkeypatch.setattr(
        runner.subprocess, "Popen", lambda command, **options: real(["sleep", "60"], **options)
    )
    options = SuiteOptions(tmp_path / "rows.jsonl", tmp_path, commit="abc")
    item = SuiteItem("digits", "native", "operators", "cpu", "float32", timeout_s=0.2)
    (found,) = run_suite([item], options, lambda _: None)
    assert found.error == "not finished after 0 s"
    assert "cut_off" not in found.run
    monkeypatch.setattr(runner, "MIN_ITEM_S", 0.0)
    short = replace(options, budget_s=0.2)
    (found,) = run_suite([replace(item, timeout_s=9.0)], short, lambda _: None)
    assert found.error == "not finished after 0 s, the rest of the budget"
    assert list(read_rows(options.out))[1].run["cut_off"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_suite_without_a_gpu_can_only_be_looked_at(tmp_path):
    arguments = ("bench", "suite", "--out", tmp_path / "rows.jsonl")
    result = fkv(*arguments, "--dry-run")
    assert result.exit_code == 0
    assert "480p/ops  predicted   80 s" in result.output
    with pytest.raises(BackendUnavailableError):
        fkv(*arguments)


def test_crash_of_an_item_is_a_row_and_the_next_one_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_WORKER", "forcing_kv.tools.bench.no_such_worker")
    options = SuiteOptions(tmp_path / "rows.jsonl", tmp_path)
    items = [SuiteItem("digits", "native", name, "cpu", "float32") for name in
             ("eager-dense", "operators")]  # fmt: skip
    rows = list(run_suite(items, options, lambda _: None))
    assert [(each.subject, each.status) for each in rows] == [
        ("eager-dense", "failed"),
        ("operators", "failed"),
    ]
    assert "ended with code 1" in rows[0].error
    assert list(read_rows(options.out)) == rows


def test_no_item_begins_without_time(tmp_path):
    said = []
    options = SuiteOptions(tmp_path / "rows.jsonl", tmp_path, budget_s=1.0)
    item = SuiteItem("digits", "native", "eager-dense", "cpu", "float32")
    assert not list(run_suite([item], options, said.append))
    assert "left for the next call" in said[0]


def test_suite_measures_every_subject_of_its_device():
    cuda = {item.subject for item in suite_items("cuda", "wan-1.3b") if item.kind == "subject"}
    cpu = {item.subject for item in suite_items("cpu", "digits")}
    assert {"eager-dense", "eager-forcing-kv", "inductor", "compile-dense-graph"} <= cuda
    assert {"onnxruntime", "eager-dense"} <= cpu


def test_report_of_rows(tmp_path, row):
    slow, fast = row("chunk", "eager-dense"), row("chunk", "inductor")
    slow.metrics["denoiser_ms"]["median"] = 300.0
    failed = row("chunk", "compile-dense", status="failed", error="boom\nplace", metrics={})
    rollout = row("rollout", "inductor", run={"asked_chunks": 5, "num_chunks": 50})
    rows = [row("chunk", "inductor"), slow, fast, rollout, failed]
    assert len(latest(rows)) == 4
    rows.append(row("decode", "inductor", metrics={"with_tae_fps": 101.5}))
    run, growth = {"asked_chunks": 500, "num_chunks": 480}, {"growth": 1.0004, "chunk_ms": [1.0]}
    rows.append(row("growth", "inductor", metrics=growth, run=run))
    lines = {line[1]: line for line in cells(rows)}
    assert lines["inductor"][8] == "3.00x"
    assert lines["inductor"][5] == "104.00"
    assert lines["inductor"][11:] == ["101.50, –", "1.000x over 480 chunks"]
    assert lines["eager-dense"][11:] == ["", ""]
    assert lines["compile-dense"][2] == "failed"
    rows[3] = row("rollout", "inductor", run={"asked_chunks": 5, "num_chunks": 49})
    assert {line[1]: line for line in cells(rows)}["inductor"][5] == ""
    written = write_report(rows, tmp_path)
    text = written[0].read_text()
    assert "boom" in text
    assert "| inductor | 100.00 | 120.00 |" in text
    assert "| tiny float32 cpu: faster than | eager-dense |" in text
    assert "| inductor | 3.00x |" in text
    assert all(path.stat().st_size for path in written)


def test_report_of_memory_energy_and_load(tmp_path, row):
    chunk = row("chunk", "inductor")
    chunk.metrics.update(memory={"device_used_nbytes": 9_870_000_000}, joules_per_chunk=98.76)
    load = {"build_ms": 130_000.0, "open_ms": 2100.0, "time_to_first_latents_ms": 171.25}
    rollout = {"jitter_ms": 1.5, "end_to_end": {"latents_fps": 70.0}, "chunk_ms": [1.0]}
    growth = {"growth": 1.0, "chunk_ms": [1.0] * 8}
    run = {"asked_chunks": 500, "num_chunks": 8}
    rows = [
        chunk,
        row("load", "inductor", metrics=load),
        row("rollout", "inductor", metrics=rollout),
    ]
    rows.append(row("growth", "inductor", metrics=growth, run=run))
    (line,) = more_cells(rows)
    assert line[2:] == ["1.50", "70.00", "171.2", "9.87", "98.8", "", "130.0", "2.1"]
    names = [path.name.partition("-")[0] for path in write_report(rows, tmp_path)]
    assert names == ["report.md", "fps", "latency", "growth"]


def test_report_of_operators(tmp_path, row):
    time_ms = {"median": 0.5, "p20": 0.4, "p80": 0.6}
    metrics = {"time_ms": time_ms, "gbs": 900.0, "bound": "copy", "fraction_of_bound": 0.25}
    gate = {"out": {"passed": True}}
    rows = [row("ops", "FkQkNormRope: triton rows1", metrics=metrics, gate=gate)]
    rows.append(row("ops", "FkQkNormRope: torch", status="failed", error="no\nplace", gate=None))
    rows.append(row("ops", "FkQkNormRope: triton rows2", status="gate_failed", gate=gate))
    assert not list(cells(rows))
    text = write_report(rows, tmp_path)[0].read_text()
    assert (
        "| FkQkNormRope: triton rows1 | 0.5000 (0.4000-0.6000) |  | 900 | 25% copy | yes |" in text
    )
    assert "| FkQkNormRope: torch | no |  |  |  |  |" in text
    assert "| FkQkNormRope: triton rows2 | outside its tolerance, not timed |" in text
    assert "- FkQkNormRope: triton rows2 (tiny float32 cpu): outside its tolerance" in text


def test_work_of_a_step_at_480p():
    config = workload("wan-1.3b", "480p", "forcing-kv", "bfloat16").config
    assert sum(len(heads) for heads in config.partition.static_heads) == 134
    work = step_work(config)
    assert (work.linear_flop + work.cross_flop) / 1e12 == pytest.approx(12.15, abs=0.01)
    assert work.self_flop / 1e12 == pytest.approx(7.55, rel=0.01)
    assert mean_frames(config, steady_history(config)) == pytest.approx(5.61, abs=0.03)
    assert work.ideal_ms("NVIDIA H200") == pytest.approx(24.9, abs=0.2)
    assert work.ideal_ms("another") is None


def test_latency_summary():
    found = latency([10.0] * 90 + [20.0] * 10)
    assert found["p50_ms"] == 10.0
    assert found["p99_ms"] == 20.0
    assert found["jitter_ms"] == 10.0
    assert found["growth"] == 2.0
    assert json.dumps(found)
    assert np.isclose(latency([5.0])["growth"], 1.0)
