"""Few layers at true shapes: the same rows for all, no number for a wrong one, work as it is."""

import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import fkv
from torch.utils.flop_counter import FlopCounterMode

from forcing_kv.export.cost.work import clean_flops, steady_history
from forcing_kv.export.model import graphs
from forcing_kv.export.model.capture import graph_sources
from forcing_kv.export.model.fusion import FusionOptions
from forcing_kv.export.model.rewrite import sort_heads_
from forcing_kv.plugins.registry import STEADY_ATTENTION
from forcing_kv.plugins.steady_attention.reference import attend_blocks
from forcing_kv.runtime_trt.errors import BackendUnavailableError, InputError
from forcing_kv.runtime_trt.rollout.ports import PARTS, kv_name
from forcing_kv.runtime_trt.rollout.timeline import steady_plan
from forcing_kv.runtime_trt.session import Session
from forcing_kv.tools.bench.options import SuiteOptions
from forcing_kv.tools.bench.pytorch.backend import TorchBackend
from forcing_kv.tools.bench.pytorch.options import TorchOptions
from forcing_kv.tools.bench.report.rows import append_row
from forcing_kv.tools.bench.report.tables import write_report
from forcing_kv.tools.bench.subjects import SUBJECTS, Subject
from forcing_kv.tools.bench.suite.runner import selected
from forcing_kv.tools.bench.suite.true_shape_items import true_shape_items
from forcing_kv.tools.bench.true_shapes import core, measure
from forcing_kv.tools.bench.true_shapes.measure import CaseRequest, measure_case
from forcing_kv.tools.bench.true_shapes.opened import place_of
from forcing_kv.tools.bench.true_shapes.pools import fill_history
from forcing_kv.tools.bench.workloads import case_flop, few_layers, workload


@pytest.fixture
def measured(tiny, tmp_path, monkeypatch):
    """Measures a subject on the tiny workload; the process keeps its cores."""
    monkeypatch.setattr(measure, "pin_to_one_core", lambda: 3)
    monkeypatch.setattr(measure, "product_gflops", lambda dtype: 50.0)
    monkeypatch.setattr(measure, "require_dtype", lambda dtype: None)

    def run(subject, case="steady-chunk", dtype="float32"):
        subject = SUBJECTS[subject] if isinstance(subject, str) else subject
        work = tiny(subject.policy).as_dtype(dtype)
        run = {"asked_chunks": 1, "round": 0}
        return measure_case(CaseRequest(subject, case, work, work, tmp_path, run, "abc"))

    return run


@pytest.mark.parametrize(
    ("subject", "case", "dtype", "passes"),
    [
        ("eager-dense", "steady-chunk", "float32", 3),
        ("eager-dense", "steady-step", "bfloat16", 1),
        ("eager-dense", "clip", "float32", 21),
        ("eager-forcing-kv", "steady-chunk", "float32", 3),
        ("operators", "steady-chunk", "float32", 3),
        ("operators", "steady-chunk", "bfloat16", 3),
        ("operators", "steady-step", "float32", 1),
        ("operators", "clip", "float32", 21),
    ],
)
def test_right_subject_is_measured(subject, case, dtype, passes, measured):
    row = measured(subject, case, dtype)
    assert row.status == "ok", row.error
    assert row.kind == case
    assert row.run["core"] == 3
    metrics = row.metrics
    assert len(metrics["pass_cpu_ms"]) == passes
    assert 0 < metrics["steps_cpu_ms"] <= metrics["cpu_time_ms"] + 1
    flop = metrics["gflops"] * metrics["cpu_time_ms"] * 1e6
    assert metrics["share_of_bound"] == pytest.approx(metrics["gflops"] / 50, rel=0.1, abs=0.01)
    assert flop / 1e12 == pytest.approx(metrics["tflop"], rel=0.5, abs=1e-3)
    compressed = case != "steady-step" and subject != "eager-dense"
    assert row.gate["kept"] == ("equal" if compressed else "none")


def test_wrong_subject_gets_no_number(measured):
    class Forgetful(TorchBackend):
        def _forward(self, *arguments):
            for pool in self.pools["k"]:
                pool[0] += 9
            return super()._forward(*arguments)

    @contextmanager
    def open_it(work, device, clock):
        options = TorchOptions("grouped")
        with Session(Forgetful(work.load(device), work.config, device, options)) as session:
            yield session

    row = measured(Subject("forgetful", "forcing-kv", "", open_it))
    assert (row.status, row.metrics) == ("gate_failed", {})
    assert row.gate["error"] > row.gate["bound"] == 1e-4


def test_failure_is_a_row(measured, monkeypatch):
    def refuse(dtype):
        raise BackendUnavailableError("no bfloat16 here")

    monkeypatch.setattr(measure, "require_dtype", refuse)
    row = measured("eager-dense", dtype="bfloat16")
    assert row.status == "failed"
    assert row.error.startswith("BackendUnavailableError: no bfloat16 here")


def test_reference_is_made_once_and_by_the_source_that_is_there(measured, tiny, tmp_path):
    measured("operators", "steady-step")
    place = place_of(tmp_path, tiny())
    made = (place / "steady-step.npz").stat().st_mtime_ns
    measured("operators", "steady-step")
    assert (place / "steady-step.npz").stat().st_mtime_ns == made
    (place / "source").write_text("an older one")
    assert place_of(tmp_path, tiny()) == place
    assert [file.name for file in place.iterdir()] == ["source"]


def test_every_backend_gets_the_same_rows(tiny):
    config = tiny().config
    plan = steady_plan(config.policy, config.chunk.num_frames)
    held = {
        kv_name("hist", part, layer): np.full((layout.num_rows, config.model.head_dim), np.nan, "f")
        for layer, layout in enumerate(config.layouts)
        for part in PARTS
    }
    arrays = SimpleNamespace(config=config, buffers=held)
    tensors = {name: torch.full(array.shape, torch.nan) for name, array in held.items()}
    packages = SimpleNamespace(config=config, tensors=tensors)
    for backend in (arrays, packages):
        fill_history(backend, plan)
    for name, rows in held.items():
        assert np.array_equal(rows, tensors[name].numpy())
        assert np.array_equal(rows, torch.from_numpy(rows).bfloat16().float().numpy())
    assert len({rows.tobytes() for rows in held.values()}) == len(held)


def test_work_of_a_cut_clean_pass_is_what_its_graph_does(tiny, monkeypatch):
    def attend(q, k, v, attn_mask=None):
        return (q @ k.mT).softmax(-1) @ v

    monkeypatch.setitem(
        graphs.OPERATORS, STEADY_ATTENTION, lambda *given: attend_blocks(attend, *given)
    )
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    work = tiny()
    config = work.config
    model = sort_heads_(work.load("cpu"), config.partition)
    fusion = FusionOptions(clean_graph=True, time_tables=True)
    counted = {}
    for source in graph_sources(model, config, fusion):
        if source.name.endswith("_steady"):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                source.module(*source.arguments)
            counted[source.name] = counter.get_total_flops()
    history = steady_history(config)
    assert counted["clean_steady"] == clean_flops(config, history)
    assert counted["step_steady"] == case_flop(config, "steady-step")
    steps = config.schedule.num_steps * counted["step_steady"]
    assert case_flop(config, "steady-chunk", cut=True) == steps + counted["clean_steady"]


def test_few_layers_attend_to_as_much_as_all():
    for layers in (2, 4, 30):
        ratio = [
            case_flop(workload("wan-1.3b", "480p", policy, "float32", layers=layers).config, "clip")
            for policy in ("dense", "forcing-kv")
        ]
        assert ratio[0] / ratio[1] == pytest.approx(1.49, abs=0.01)
    for layers in (1, 31):
        with pytest.raises(InputError, match=f"--layers is {layers}; give 2 .* to 30"):
            few_layers(layers)


def test_items_come_most_important_first_and_rounds_are_skipped_alone(tmp_path, row):
    items = true_shape_items(2, 2)
    names = [item.name for item in items]
    assert len(set(names)) == len(names)
    groups = list(dict.fromkeys(name.rpartition("/")[0].rpartition("/")[0] for name in names))
    assert groups == [
        "480p/float32/steady-chunk", "480p/bfloat16/steady-chunk", "480p/float32/clip",
        "720p/float32/steady-chunk", "1080p/float32/steady-step", "720p/bfloat16/steady-chunk",
        "1080p/bfloat16/steady-step",
    ]  # fmt: skip
    assert not [name for name in names if "bfloat16" in name and "onnxruntime" in name]
    # The reference of the gate is there before the first that is held against it.
    assert names[:2] == [
        f"480p/float32/steady-chunk/{n}/0" for n in ("eager-dense", "eager-forcing-kv")
    ]
    options = SuiteOptions(tmp_path / "rows.jsonl", tmp_path)
    work = {"model": "wan-1.3b-2-layers", "size": "480p", "dtype": "float32"}
    run = {"asked_chunks": 1, "case": "steady-chunk", "round": 1}
    append_row(options.out, row("steady-chunk", "inductor", workload=work, run=run))
    left = [item.name for item in selected(items, options)]
    assert set(names) - set(left) == {"480p/float32/steady-chunk/inductor/1"}


def test_command_says_how_long_the_table_takes(tmp_path):
    result = fkv(
        "bench", "suite", "--device", "cpu", "--model", "wan-1.3b", "--dtype", "float32",
        "--rounds", "1", "--out", tmp_path / "rows.jsonl", "--dry-run",
    )  # fmt: skip
    assert result.exit_code == 0
    assert "1080p/float32/steady-step/operators/0  predicted" in result.output
    assert "19 items, about 1" in result.output


def test_process_is_pinned_to_one_core():
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        chosen = core.pin_to_one_core()
        assert os.sched_getaffinity(0) == {chosen}
        assert chosen in before
    finally:
        for task in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(task.name), before)
        torch.set_num_threads(threads)


def test_rate_of_a_product(monkeypatch):
    times = iter([0.0, 4.0, 10.0, 12.0, 20.0, 28.0])
    monkeypatch.setattr(core, "process_time", lambda: next(times))
    assert core.product_gflops("float32", 64) == 64**3 / 1e9
    monkeypatch.setattr(core, "has_bfloat16", lambda: False)
    core.require_dtype("float32")
    with pytest.raises(BackendUnavailableError, match="no bfloat16 products on this CPU"):
        core.require_dtype("bfloat16")


def test_report_at_true_shapes(tmp_path, row):
    def case_row(subject, cpu_s, index=0, **changes):
        metrics = {
            "cpu_time_ms": 1e3 * cpu_s, "wall_ms": 1100 * cpu_s, "steps_cpu_ms": 500 * cpu_s,
            "tflop": 6.0, "gflops": 80.0, "share_of_bound": 0.9,
            "memory": {"process_peak_nbytes": 2_000_000_000},
        }  # fmt: skip
        work = {"model": "wan-1.3b-2-layers", "size": "480p", "policy": "x", "dtype": "float32"}
        run = {"asked_chunks": 7, "case": "clip", "round": index}
        return row("clip", subject, workload=work, run=run, **({"metrics": metrics} | changes))

    rows = [case_row("eager-dense", 150), case_row("inductor", 99)]
    rows += [case_row("eager-dense", 160, 1), case_row("inductor", 75)]
    rows.append(case_row("eager-forcing-kv", 90))
    rows.append(case_row("onnxruntime", 1, status="gate_failed", metrics={}))
    report, *charts = write_report(rows, tmp_path)
    text = report.read_text()
    assert "not a GPU's FPS" in text
    assert "on one core of C (FLOP limit 1.49x, published on a GPU 1.50x)" in text
    assert (
        "| eager-dense | 155.0 (150.0–160.0) | 170.5 | 2 | 1.00x | 1.00x | 0.58x | 6.00 | 80.0 |"
        " 90% | 2.00 | 1.0e-06 / 1.0e-04 |" in text
    )
    assert "| inductor | 75.0 (75.0–75.0) | 82.5 | 1 | 2.07x | 2.07x | 1.20x |" in text
    assert "- onnxruntime (wan-1.3b-2-layers 480p float32 cpu): outside its tolerance" in text
    assert [chart.name for chart in charts] == ["true-shapes-float32.png"]
    assert "denoiser FPS" not in text
