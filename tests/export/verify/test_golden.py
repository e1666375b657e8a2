"""Golden cases of the official code, on every backend of a CPU; and that a defect fails them."""

import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shared_exports import shared_graphs

from forcing_kv.export.verify.eager import EagerBackend, eager_session
from forcing_kv.export.verify.golden import (
    GoldenCase,
    GoldenReport,
    golden_session,
    schedule_error,
    verify_golden,
)
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.session import Session

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = (
    "dense_selfforcing",
    "fkv_interactive",
    "fkv_retention_half_p1",
    "fkv_selfforcing",
    "fkv_temporal3_nodynamic",
)
CASE = "fkv_retention_half_p1"
ON_ONNX_RUNTIME = [
    "dense_selfforcing",
    "fkv_interactive",
    pytest.param("fkv_selfforcing", marks=pytest.mark.slow),
    pytest.param("fkv_retention_half_p1", marks=pytest.mark.slow),
    pytest.param("fkv_temporal3_nodynamic", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", autouse=True)
def _shared_graphs():
    """What is exported here, other tests of the cases use too."""
    with shared_graphs():
        yield


def fails(case: GoldenCase, checkpoint: Path | None = None) -> bool:
    """Whether any chunk fails; stops at the first."""
    with golden_session(case, "eager", checkpoint) as session:
        return not all(check.passed for check in verify_golden(case, session))


def verify(case: GoldenCase, backend: str = "eager"):
    with golden_session(case, backend) as session:
        report = GoldenReport(case.path.name, backend, schedule_error(case, case.config.schedule))
        report.chunks += verify_golden(case, session)
    return report


@pytest.fixture
def copied_case(tmp_path):
    """A copy of one case whose files may be changed."""
    for file in ("inputs.npz", "weights.safetensors"):
        (tmp_path / file).symlink_to(GOLDEN / file)
    shutil.copytree(GOLDEN / CASE, tmp_path / CASE)
    return tmp_path / CASE


def change_settings(case: Path, **changes):
    file = case / "config.json"
    settings = json.loads(file.read_text())
    settings["forcingkv"].update(changes)
    file.write_text(json.dumps(settings))


def change_golden(case: Path, change):
    file = case / "golden.npz"
    with np.load(file) as data:
        arrays = {key: data[key] for key in data.files}
    change(arrays)
    np.savez(file, **arrays)


def test_every_case_of_the_folder_is_listed():
    assert sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz")) == sorted(
        (*CASES, "head_profile")
    )


def check_report(case: GoldenCase, report: GoldenReport):
    assert len(report.chunks) == 7
    assert report.passed, "\n".join(check.line() for check in report.chunks)
    # Float32 implementations of the same arithmetic agree far better than the tolerance.
    assert max(check.latent_error for check in report.chunks) < 1e-5
    selections = [key for key in case.golden if key.startswith("kept/")]
    assert [check.kept_equal for check in report.chunks].count(True) == len(selections)
    assert bool(selections) == (case.config.policy.num_dynamic_frames > 0)


class RecordingSession(Session):
    """Keeps the latents of every chunk."""

    def generate_chunk(self, *arguments, **options):
        chunk = super().generate_chunk(*arguments, **options)
        self.__dict__.setdefault("latents", []).append(chunk.latents)
        return chunk


@pytest.mark.parametrize("name", CASES)
def test_both_forms_of_a_step_give_the_recorded_results(name):
    torch.set_num_threads(1)
    case, latents = GoldenCase.load(GOLDEN / name), []
    for use_steady in (False, True):
        backend = EagerBackend(case.load_model(), case.config, use_steady=use_steady)
        with (
            RecordingSession(backend) as session,
            mock.patch.object(
                EagerBackend, "_run", autospec=True, side_effect=EagerBackend._run
            ) as run,
        ):
            report = GoldenReport(name, "eager", schedule_error(case, case.config.schedule))
            report.chunks += verify_golden(case, session)
        check_report(case, report)
        assert ("step_steady" in {call.args[1] for call in run.call_args_list}) == use_steady
        latents.append(session.latents)
    np.testing.assert_allclose(*latents, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ON_ONNX_RUNTIME)
def test_onnx_runtime_gives_the_recorded_results(name):
    torch.set_num_threads(1)
    case = GoldenCase.load(GOLDEN / name)
    check_report(case, verify(case, "onnxruntime"))


def test_one_changed_weight_fails(tmp_path):
    weights = load_file(GOLDEN / "weights.safetensors")
    weights["blocks.2.self_attn.q.weight"][5] += 0.05
    save_file(weights, tmp_path / "w.safetensors")
    assert fails(GoldenCase.load(GOLDEN / CASE), tmp_path / "w.safetensors")


def test_one_changed_kept_index_fails(copied_case):
    def change(arrays):
        key = sorted(key for key in arrays if key.startswith("kept/"))[1]
        unused = set(range(99)) - set(arrays[key].tolist())
        arrays[key] = np.sort([*arrays[key][1:], min(unused)])

    change_golden(copied_case, change)
    report = verify(GoldenCase.load(copied_case))
    assert [check.kept_equal for check in report.chunks].count(False) == 1
    assert max(check.latent_error for check in report.chunks) < 1e-5
    assert not report.passed


def test_one_changed_latent_fails(copied_case):
    def change(arrays):
        arrays["latents"][20, 3, 2, 1] += 2e-4

    change_golden(copied_case, change)
    report = verify(GoldenCase.load(copied_case))
    assert [check.passed for check in report.chunks] == [True] * 6 + [False]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_fail(copied_case, value):
    def change(arrays):
        arrays["latents"][0, 0, 0, 0] = value

    change_golden(copied_case, change)
    assert fails(GoldenCase.load(copied_case))


@pytest.mark.parametrize("changes", [{"ar_start": 2}, {"dynamic_temporal_enabled": False}])
def test_another_policy_fails(copied_case, changes):
    change_settings(copied_case, **changes)
    assert fails(GoldenCase.load(copied_case))


def test_another_selection_fails():
    case = GoldenCase.load(GOLDEN / "fkv_selfforcing")

    def most_similar(scores):
        count = case.config.policy.num_kept_segments
        return np.sort(np.argsort(-scores.ravel())[:count]).astype(np.int32)

    with eager_session(case.load_model(), case.config, select=most_similar) as session:
        checks = list(verify_golden(case, session))
    assert not all(check.passed for check in checks)
    wrong = [check.kept_equal for check in checks].index(False)
    assert max(check.latent_error for check in checks[wrong + 1 :]) > 1e-2


@pytest.mark.parametrize("file", ["config.json", "golden.npz", "../inputs.npz"])
def test_a_missing_file_is_named(copied_case, file):
    (copied_case / file).unlink()
    with pytest.raises(InputError, match=Path(file).name):
        GoldenCase.load(copied_case)


@pytest.mark.parametrize("file", ["config.json", "golden.npz"])
def test_a_damaged_file_is_named(copied_case, file):
    (copied_case / file).write_bytes(b"PK\x03\x04 not what it was")
    with pytest.raises(InputError, match=file):
        GoldenCase.load(copied_case)


@pytest.mark.parametrize("entry", ["model", "latent_hw", "denoising_step_list", "head_partition"])
def test_a_missing_setting_is_named(copied_case, entry):
    file = copied_case / "config.json"
    settings = json.loads(file.read_text())
    del settings[entry]
    file.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=entry):
        GoldenCase.load(copied_case).config  # noqa: B018
