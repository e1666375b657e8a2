"""A bundle's backend against eager PyTorch: passes where it should, and names what is wrong."""

import json

import numpy as np
import pytest
from shared_exports import export_once

from forcing_kv.export.bundle.read import read_bundle_weights
from forcing_kv.export.bundle.write import BundleLabels
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.verify.bundle import verify_bundle
from forcing_kv.runtime_trt.bundle.manifest import read_manifest
from forcing_kv.runtime_trt.open import open_backend
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.schedule import Schedule


def exported(folder, dtype, *, equal=False, spoil=""):
    """A random model.

    Args:
        equal: with biases and norms as they are initialised, and equal layers.
        spoil: name of a weight that gets a NaN.
    """
    import torch

    torch.manual_seed(0)
    shape = ModelShape(
        2, dim=24, ffn_dim=16, num_heads=3, in_channels=2, text_len=4, text_dim=5, freq_dim=8
    )
    # Heads are reordered, so the reference must read them in exported order.
    config = RolloutConfig(
        shape, ChunkShape(3, 4, 6), CachePolicy(), HeadPartition(3, ((0,), (1, 2))),
        Schedule((1000, 500)), dtype,
    )  # fmt: skip
    model = CausalWanModel(shape).requires_grad_(False)
    if equal:
        model.blocks[1].load_state_dict(model.blocks[0].state_dict())
    else:
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    if spoil:
        model.get_parameter(spoil).data.flatten()[1] = float("nan")
    export_once(model, config, folder, BundleLabels("tiny"), allow_non_finite=bool(spoil))
    return folder


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_onnxruntime_passes(tmp_path, dtype):
    bundle = exported(tmp_path / "bundle", dtype)
    backend = open_backend(bundle, "onnxruntime", num_threads=1)
    report = verify_bundle(bundle, backend)
    assert report.passed, report
    names = {check.tensor for check in report.tensors}
    for stem in ("cross_k", "cross_v", "new_k", "new_v"):
        assert {f"{stem}.0", f"{stem}.1"} <= names
    assert {"x0", "x_next"} <= names
    # In 16 bits eager itself may select otherwise than float32, which ends the lockstep run.
    assert {"dyn_k.1", "scores"} <= names or report.notes
    assert len(report.rollout) == 5
    backend.close()


def test_equal_parameters_are_stored_once_and_read_back_each(tmp_path):
    bundle = exported(tmp_path / "bundle", "float32", equal=True)
    weights = read_bundle_weights(bundle, read_manifest(bundle))
    left, right = (block.ffn.state_dict() for block in weights.model.blocks)
    assert all(left[name].equal(right[name]) for name in left)
    places = [weights.entries[f"blocks.{layer}.ffn.0.weight"].pieces for layer in (0, 1)]
    assert places[0] == places[1]
    backend = open_backend(bundle, "onnxruntime", num_threads=1)
    report = verify_bundle(bundle, backend)
    assert report.passed, report
    backend.close()


def test_a_fault_is_found_in_its_layer(tmp_path):
    bundle = exported(tmp_path / "bundle", "float32")
    backend = open_backend(bundle, "onnxruntime", num_threads=1)
    run = backend._graphs["step"].run

    def faulty():
        run()
        backend.buffers["new_v.1"][0, 0] += 0.5

    backend._graphs["step"].run = faulty
    report = verify_bundle(bundle, backend)
    assert not report.passed
    assert (report.worst.graph, report.worst.tensor, report.worst.layer) == ("step", "new_v.1", 1)
    assert "layer 1" in report.worst.line()
    assert report.to_json()["passed"] is False
    assert np.isfinite(report.worst.error)
    backend.close()


def test_what_an_engine_does_not_return_is_not_compared(tmp_path, monkeypatch):
    """A fused engine: its clean pass alone returns K and V, and it takes fewer text rows."""
    bundle = exported(tmp_path / "bundle", "float32")
    backend = open_backend(bundle, "onnxruntime", num_threads=1)
    returned = {"prompt": ["cross_k.0"], "step": ["x0", "x_next"], "clean": ["new_k.1"]}
    monkeypatch.setattr(type(backend), "outputs_of", lambda _, graph: returned.get(graph))
    monkeypatch.setattr(type(backend), "num_text_rows", 3)
    report = verify_bundle(bundle, backend)
    assert report.passed, report
    checks = {check.tensor: check for check in report.tensors}
    assert {name for name in checks if name[:3] in ("cro", "new")} == {"cross_k.0", "new_k.1"}
    assert checks["new_k.1"].step == backend.config.schedule.num_steps
    assert {"x0", "x_next", "scores"} <= set(checks)
    backend.close()


def test_what_is_not_finite_outranks_every_error_and_the_first_is_named(tmp_path):
    """The weight itself, and the first output that it reaches: not one that merely differs more."""
    bundle = exported(tmp_path / "bundle", "float32", spoil="blocks.0.ffn.0.weight")
    backend = open_backend(bundle, "onnxruntime", num_threads=1)
    report = verify_bundle(bundle, backend)
    backend.close()
    assert not report.passed
    assert list(report.bad_weights) == ["blocks.0.ffn.0.weight"]
    assert "weight blocks.0.ffn.0.weight holds 1 NaN" in report.verdict
    worst = report.worst
    assert (worst.graph, worst.layer, worst.chunk, worst.step) == ("step", 1, 0, 0)
    assert worst.tensor == "new_k.1"
    assert "336 values are NaN or infinite" in worst.line()
    # Keys of layer 0 are finite in the first step; what it makes is the input of the next.
    assert [check.tensor for check in report.tensors if check.passed][-1].startswith("cross_")
    (before,) = (check for check in report.tensors if check.tensor == "new_k.0")
    assert (before.chunk, before.step) == (0, 1)
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["passed"] is False
    assert content["tensors"][0]["error"] == "infinite"


def test_what_an_engine_alone_makes_infinite_is_named_where_it_begins(tmp_path):
    bundle = exported(tmp_path / "bundle", "float32")
    backend = open_backend(bundle, "onnxruntime", num_threads=1)
    run = backend._graphs["step"].run

    def faulty():
        run()
        backend.buffers["new_k.0"] += 100.0
        backend.buffers["new_v.1"][0, 0] = np.inf

    backend._graphs["step"].run = faulty
    report = verify_bundle(bundle, backend)
    backend.close()
    assert report.bad_weights == {}
    assert (report.worst.tensor, report.worst.num_non_finite) == ("new_v.1", 1)
    assert report.verdict.startswith("worst tensor: step: new_v.1, layer 1 (chunk 0, step 0)")
