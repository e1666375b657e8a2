"""`fkv calibrate fp8`: what it measures and what it writes."""

import json

import numpy as np
import pytest
import torch
from command_line import fkv

from forcing_kv.calibration.fp8.recorder import AmaxRecorder
from forcing_kv.calibration.fp8.scales import Fp8Calibration
from forcing_kv.calibration.model_source import load_shipped
from forcing_kv.export.checkpoint.fp8_file import read_fp8
from forcing_kv.export.model.fp8_layers import block_linears
from forcing_kv.export.request.shipped import shipped_model
from forcing_kv.runtime_trt.bundle.hashes import sha256_of
from forcing_kv.runtime_trt.bundle.manifest import read_manifest
from forcing_kv.runtime_trt.errors import InputError


def run(*options):
    return fkv("calibrate", "fp8", *options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("fp8") / "out"
    prompt = "a digit 3 moving left ."
    result = run(
        *("--out", out, "--num-chunks", 1, "--seeds", 3, "--prompt", prompt),
        *("--skip-layers", 2, "--json"),
    )
    return out, json.loads(result.stdout)


def test_writes_a_file_that_an_export_reads_and_a_picture(written):
    out, record = written
    assert record == json.loads((out / "fp8.json").read_text())
    assert (out / "fp8.png").read_bytes().startswith(b"\x89PNG")
    amax = read_fp8(out / "fp8.json", shipped_model("digits").MODEL).amax
    assert len(amax) == 3 * 8
    assert not any(name.startswith("blocks.2.") for name in amax)
    for entry in record["linears"].values():
        assert 1 <= entry["headroom"] < 2
        # Two roundings of 3 bits: far from nothing, and far from a wrong scale.
        assert 0.005 < entry["error"] < 0.1
    with pytest.raises(InputError, match="--force"):
        run("--out", out)


def test_an_export_takes_the_file(written, tmp_path):
    bundle = tmp_path / "bundle"
    fp8 = written[0] / "fp8.json"
    assert fkv("export", "--fp8", fp8, "--out", bundle, "--json").exit_code == 0
    manifest = read_manifest(bundle)
    assert len(manifest.fp8.linears) == 3 * 8
    assert manifest.provenance["fp8_sha256"] == sha256_of(fp8)
    shown = fkv("inspect", bundle).stdout
    assert "24 linear layers in FP8" in shown


def test_the_largest_input_is_that_of_all_passes(written):
    _, record = written
    source = load_shipped("digits", ["a digit 3 moving left ."])
    found: dict[str, float] = {}

    def keep(name):
        def hook(module, inputs):
            found[name] = max(found.get(name, 0.0), float(inputs[0].abs().max()))

        return hook

    from forcing_kv.export.verify.eager import EagerBackend
    from forcing_kv.runtime_trt.session import Session

    backend = EagerBackend(source.model, Fp8Calibration(source, 1, (3,)).config)
    for linear in block_linears(backend.model):
        linear.module.register_forward_pre_hook(keep(linear.name))
    with Session(backend) as session:
        session.set_prompt(next(iter(source.prompts.values())))
        session.generate_chunk(seed=3)
    for name, entry in record["linears"].items():
        assert entry["amax"] == pytest.approx(found[name], rel=1e-5)


def test_inputs_that_are_not_finite_are_refused():
    recorder = AmaxRecorder()
    recorder("blocks.0.ffn.0", torch.nn.Linear(1, 1), torch.tensor([np.inf]))
    with pytest.raises(InputError, match=r"blocks\.0\.ffn\.0 was not finite"):
        recorder.amax()


@pytest.mark.parametrize("skip", ["9", "0,1,2,3"])
def test_layers_to_skip_must_leave_some(tmp_path, skip):
    with pytest.raises(InputError, match="layers to skip"):
        run("--out", tmp_path / "out", "--skip-layers", skip)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(tmp_path):
    result = run("--out", tmp_path / "out", "--dry-run")
    assert "32 linear layers" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_recorder_needs_pytorch_and_numpy_alone(run_blocked):
    others = ["matplotlib", "onnx", "onnx_ir", "onnxscript", "rich", "safetensors", "cyclopts"]
    done = run_blocked("import forcing_kv.calibration.fp8.recorder", blocked=others)
    assert done.returncode == 0, done.stderr
