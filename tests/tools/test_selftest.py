"""`fkv selftest`: its verdict, its report, and that nothing gets past it."""

import json
import shutil

import pytest

from forcing_kv.runtime_trt.cuda.runtime import Cuda
from forcing_kv.runtime_trt.errors import ForcingKvError
from forcing_kv.tools import selftest


@pytest.fixture
def exported(monkeypatch, digits_bundle):
    """Takes a bundle that is there in place of exporting one."""

    def export(bundle, dtype, *, fp8):
        shutil.copytree(digits_bundle, bundle)
        return {"dtype": dtype, "fp8": fp8}

    monkeypatch.setattr(selftest, "export_random_model", export)


def stages(result):
    return {stage["name"]: stage for stage in json.loads(result.out)["stages"]}


def test_onnxruntime_passes(run_fkv, exported):
    done = run_fkv("selftest", "--backend", "onnxruntime", "--dtype", "float32", "--json")
    assert done.code == 0, done.out
    found = stages(done)
    assert all(stage["passed"] for stage in found.values())
    assert list(found) == [
        "environment", "export", "build", "open, first", "verify, first", "open, second",
        "first equals second",
    ]  # fmt: skip
    assert found["verify, first"]["figures"]["worst_share_of_allowed"] < 1
    assert found["environment"]["figures"]["onnxruntime"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "fp8", "said"),
    [
        ("float32", (), "float32"),
        ("float16", (), "float16"),
        ("float16", ("--fp8",), "float16 with FP8"),
    ],
)
def test_onnxruntime_passes_on_its_own_model(run_fkv, dtype, fp8, said, tmp_path):
    options = ("--backend", "onnxruntime", "--dtype", dtype, "--keep", tmp_path / "kept", *fp8)
    done = run_fkv("selftest", *options)
    assert done.code == 0, done.out
    assert f"selftest --backend onnxruntime ({said}, cpu): PASS" in done.out
    assert (tmp_path / "kept" / "manifest.json").is_file()


@pytest.mark.slow
def test_inductor_passes_on_a_cpu(run_fkv):
    done = run_fkv(
        "selftest", "--backend", "inductor", "--device", "cpu", "--dtype", "float32", "--json"
    )
    assert done.code == 0, done.out
    assert stages(done)["verify, first"]["figures"]["kept_equal"]


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx", "inductor"])
def test_a_machine_without_a_driver_fails_in_one_stage(run_fkv, exported, backend):
    try:
        Cuda()
    except ForcingKvError:
        pass
    else:
        pytest.skip("needs a machine without a GPU")
    done = run_fkv("selftest", "--backend", backend)
    assert done.code == 1
    assert f"### fkv selftest --backend {backend} (float16, cuda): FAIL" in done.out
    assert done.out.count("FAILED") == 1
    assert "**build**: FAILED" in done.out
    assert "Traceback" not in done.out + done.err


def test_what_goes_wrong_unexpectedly_is_in_the_report(run_fkv, exported, monkeypatch):
    def build(*_):
        raise RuntimeError("the compiler is in pieces")

    monkeypatch.setattr(selftest, "build_engine", build)
    done = run_fkv("selftest", "--backend", "onnxruntime", "--dtype", "float32")
    assert done.code == 1
    assert "Traceback" in done.out
    assert "the compiler is in pieces" in done.out
    assert "open, first" not in done.out


def test_another_video_is_a_failure(run_fkv, exported, monkeypatch):
    monkeypatch.setattr(selftest, "compare", lambda *_: {"passed": False, "largest_difference": 1})
    done = run_fkv("selftest", "--backend", "onnxruntime", "--dtype", "float32", "--json")
    assert done.code == 1
    assert json.loads(done.out)["passed"] is False


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ("--backend", "openvino"),
            'Choose from: "tensorrt", "tensorrt-rtx", "inductor", "onnxruntime"',
        ),
        (("--dtype", "int8"), 'Choose from: "float32", "float16", "bfloat16"'),
        (("--device", "tpu"), 'Choose from: "cuda", "cpu"'),
        (("--backend", "tensorrt-rtx", "--device", "cpu"), "runs on a GPU alone"),
    ],
)
def test_mistakes_are_named_before_anything_runs(run_fkv, options, told):
    done = run_fkv("selftest", *options)
    assert done.code == 2
    assert told in done.err
    assert "selftest: environment" not in done.err
