"""The suite's first items over a stand-in device: wrong kernels are told, fast ones kept."""

import contextlib
import json

import pytest
import torch
from command_line import fkv

pytest.importorskip("triton", reason="needs Triton: pip install 'forcing-kv[plugins]'")

from forcing_kv.plugins.check.accuracy import reference_outputs
from forcing_kv.plugins.check.cases import OpCase
from forcing_kv.plugins.compile import tuning
from forcing_kv.tools.bench.kernels import bench, checks
from forcing_kv.tools.bench.kernels.baselines import Baseline
from forcing_kv.tools.bench.kernels.timing import DeviceBounds
from forcing_kv.tools.bench.report.environment import describe_environment
from forcing_kv.tools.bench.suite import worker
from forcing_kv.tools.bench.suite.items import SuiteItem

OPS = SuiteItem("wan-1.3b", "480p", "ops", "cpu", kind="ops")
CHECKS = SuiteItem("wan-1.3b", "480p", "checks", "cpu", kind="checks", budget_s=0.5)


class Device:
    """Runs the references in place of the kernels; tactics take the time of their names."""

    wrong: str | None = None
    broken: str | None = None
    crashing: str | None = None
    launched: str = ""

    def __init__(self):
        self.compiled = []

    def run(self, spec, inputs, attributes, outputs, tactic, num_sms):
        self.launched = tactic.name
        if tactic.name == self.broken:
            raise RuntimeError("the compiler gave up")
        for output, value in zip(outputs, reference_outputs(spec, inputs, attributes), strict=True):
            output.copy_(value + (tactic.name == self.wrong))

    def compile(self, calls):
        self.compiled += [(call[0].name, call[4].name) for call in calls]

    def synchronize(self):
        if self.launched == self.crashing:
            raise RuntimeError("an illegal memory access was encountered")

    def time(self, call, warmup, iterations):
        call()
        return [float(len(self.launched))] * iterations


@pytest.fixture
def device(monkeypatch):
    made, build = Device(), OpCase.build
    monkeypatch.setattr(OpCase, "build", lambda case, dtype, seed=0, device="": build(case, dtype))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("Graph", (), {"replay": lambda _: None}))
    monkeypatch.setattr(torch.cuda, "graph", lambda _: contextlib.nullcontext())
    for module in (checks, bench):
        monkeypatch.setattr(module, "run_kernel", made.run)
        monkeypatch.setattr(module, "compile_together", made.compile)
        monkeypatch.setattr(module, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(bench, "time_cold", made.time)
    monkeypatch.setattr(bench, "time_graph", made.time)
    monkeypatch.setattr(bench, "measure_bounds", lambda *_, **__: DeviceBounds(1.0, 1.0))
    monkeypatch.setattr(bench, "baselines", lambda *_: iter(()))
    monkeypatch.setattr(
        bench, "describe_environment", lambda _, commit: describe_environment("cpu", commit)
    )
    # Frames of 6 tokens instead of 1560.
    monkeypatch.setattr(worker, "RESOLUTIONS", {"480p": (4, 6)})
    return made


def test_fastest_tactics_are_kept_for_the_items_after(device, tmp_path, monkeypatch):
    *rows, last = worker._ops(OPS, tmp_path, "abc")
    assert {row.status for row in rows} == {"ok"}
    assert last.kind == "tactics"
    assert last.metrics["FkHeadIndexedAttention"] == ["64x32", 5.0]
    entries = json.loads((tmp_path / worker.TACTICS).read_text())
    assert {entry["op"]: entry["tactic"] for entry in entries}["FkQkNormRope"] == "rows1"
    monkeypatch.setattr(tuning, "_added", {})
    tuning.add_table(tmp_path / worker.TACTICS)
    assert len(tuning._added) == 5


def test_tactic_that_does_not_compile_costs_its_own_row_alone(device, tmp_path):
    device.broken = "64x32"
    *rows, last = worker._ops(OPS, tmp_path, "abc")
    (failed,) = [row for row in rows if row.status != "ok"]
    assert failed.subject == "FkHeadIndexedAttention: triton 64x32"
    assert "the compiler gave up" in failed.error
    assert last.metrics["FkHeadIndexedAttention"][0] == "64x64"


def test_crash_on_the_device_is_told_of_the_tactic_that_crashed(device, tmp_path):
    device.crashing = "64x32"
    failed = [row for row in worker._ops(OPS, tmp_path, "abc") if row.status != "ok"]
    assert [row.subject for row in failed] == ["FkHeadIndexedAttention: triton 64x32"]
    assert "illegal memory access" in failed[0].error


def test_wrong_tactic_is_neither_timed_nor_chosen(device, tmp_path):
    device.wrong = "64x32"
    *rows, last = worker._ops(OPS, tmp_path, "abc")
    failed = [row for row in rows if row.status != "ok"]
    assert [row.subject for row in failed] == ["FkHeadIndexedAttention: triton 64x32"]
    assert not failed[0].metrics
    assert last.metrics["FkHeadIndexedAttention"] == ["64x64", 5.0]


@pytest.mark.parametrize(("broken", "code"), [(None, 0), ("64x32", 1)])
def test_command_fails_where_a_kernel_does_not_run(broken, code, device, monkeypatch):
    device.broken = broken
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = fkv("bench", "ops", "--resolution", "4x6")
    assert result.exit_code == code, result.output


def test_item_is_not_done_without_a_tactic_of_every_operator(device, tmp_path, monkeypatch):
    def refuse(spec, *_):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(bench, "run_kernel", refuse)
    *_, last = worker._ops(OPS, tmp_path, "abc")
    assert (last.kind, last.status) == ("tactics", "failed")
    assert "FkHeadIndexedAttention" in last.error


def test_baseline_that_fails_in_any_way_costs_its_own_row(device, tmp_path, monkeypatch):
    def fail():
        raise AssertionError("the compiler is confused")

    def one(case, inputs):
        yield Baseline("flex", case, inputs, fail)

    monkeypatch.setattr(bench, "baselines", one)
    *rows, last = worker._ops(OPS, tmp_path, "abc")
    failed = [row for row in rows if row.status == "failed"]
    assert [row.error for row in failed] == ["the compiler is confused"] * 4
    assert (last.kind, last.status, len(last.metrics)) == ("tactics", "ok", 5)


def test_checks_count_kernels_and_name_the_wrong_one(device):
    (row,) = worker._checks(CHECKS, "abc")
    assert row.status == "ok"
    assert row.metrics["num_checks"] > 3
    assert len(device.compiled) >= row.metrics["num_checks"]
    device.wrong = "128x128"
    (row,) = worker._checks(CHECKS, "abc")
    assert row.status == "gate_failed"
    assert "head_indexed_attention, no history, bfloat16, 128x128: out is off by" in row.error


def test_command_tells_what_it_measured_before_it_was_stopped(device, monkeypatch, capsys):
    def stop(case, _):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(bench, "baselines", stop)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="the device is gone"):
        fkv("bench", "ops", "--resolution", "4x6")
    assert "triton rows1" in capsys.readouterr().out


def test_checks_go_on_where_kernels_cannot_be_compiled_together(device, monkeypatch):
    def fail(calls):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(checks, "compile_together", fail)
    (row,) = worker._checks(CHECKS, "abc")
    assert row.metrics["num_checks"] > 3
