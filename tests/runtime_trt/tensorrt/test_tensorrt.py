"""Opening and running TensorRT engines, with stand-ins for CUDA and for TensorRT."""

import gc
import hashlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import PurePath

import numpy as np
import pytest
from fake_tensorrt import FakeTensorRt
from host_cuda import HostCuda
from manifests import edit

from forcing_kv.export.tensorrt.options import EngineOptions
from forcing_kv.export.tensorrt.stripped import shared_weights, write_stripped
from forcing_kv.runtime_trt.bundle.constants import parse_table, read_constants, write_table
from forcing_kv.runtime_trt.bundle.hashes import sha256_of
from forcing_kv.runtime_trt.bundle.manifest import MANIFEST_FILE, Bundle, read_manifest
from forcing_kv.runtime_trt.cuda.runtime import DRIVER_HINT
from forcing_kv.runtime_trt.errors import BackendUnavailableError, BundleError, ForcingKvError
from forcing_kv.runtime_trt.open import choose_backend, open_backend
from forcing_kv.runtime_trt.session import Session
from forcing_kv.runtime_trt.tensorrt.jit_cache import JitCache
from forcing_kv.runtime_trt.tensorrt.open import open_tensorrt


class Deployment:
    """A bundle with stand-in engines."""

    def __init__(self, bundle, monkeypatch, *, sm=89, version="11.4.0.106", **cuda_options):
        self.bundle = bundle
        self.cuda = HostCuda(sm=sm, **cuda_options)
        self.trt = FakeTensorRt(self.cuda, bundle, read_manifest(bundle), version)
        monkeypatch.setitem(sys.modules, "tensorrt", self.trt)
        monkeypatch.setitem(sys.modules, "tensorrt_lean", self.trt)

    def record(self, *, sm=89, version="11.4.0.106", options=None, **plan_changes):
        """Write plans and add their record to the manifest, as `fkv build` does."""
        folder = f"engines/tensorrt-sm{sm}"
        tables = self.weight_tables() if (options or {}).get("strip_weights") else {}
        stripped = {
            graph: {
                name: hashlib.sha256(content).hexdigest()
                for name, _, content in read_constants(self.bundle, table)
            }
            for graph, table in tables.items()
        }
        paths = self.trt.write_plans(self.bundle / folder, stripped, **plan_changes)
        for graph, table in tables.items():
            path = paths[f"{graph} weights"] = self.bundle / folder / f"{graph}.weights.json"
            write_table(path, table)
        files = {f"{folder}/{path.name}": sha256_of(path) for path in paths.values()}
        manifest = read_manifest(self.bundle)
        graphs = {
            name: asdict(replace(info, file=f"{folder}/{name}.plan",
                                 sha256=files[f"{folder}/{name}.plan"]))
            for name, info in manifest.graphs.items()
        }  # fmt: skip
        record = {
            "backend": "tensorrt", "target": f"sm{sm}", "folder": folder, "files": files,
            "graphs": graphs, "environment": {"tensorrt": version, "sm": str(sm)},
            "options": options or {}, "build_seconds": 1.0,
            "details": {name: {"weight_nbytes": 1000, "scratch_nbytes": 5000} for name in graphs},
        }  # fmt: skip
        edit(self.bundle, lambda content: content["engines"].append(record))
        return paths

    def weight_tables(self):
        """By graph, where its large weights lie."""
        tables = {}
        for name, info in read_manifest(self.bundle).graphs.items():
            table = shared_weights(self.bundle / info.file)
            write_stripped(self.bundle / "table.json", table, PurePath("graphs"))
            path = self.bundle / "table.json"
            tables[name] = parse_table(path.read_bytes(), path)
        return tables

    def open(self, name="tensorrt", **options):
        with Bundle(self.bundle) as bundle:
            return open_tensorrt(bundle, name, cuda=self.cuda, **options)


@pytest.fixture
def deployment(copied_bundle, monkeypatch):
    return Deployment(copied_bundle, monkeypatch)


@pytest.mark.parametrize("use_graphs", [True, False], ids=["captured", "enqueued"])
def test_an_engine_runs_a_video(deployment, prompts, use_graphs):
    deployment.record()
    reference = Session(open_backend(deployment.bundle, "onnxruntime", num_threads=1))
    with Session(deployment.open(use_graphs=use_graphs)) as session, reference:
        for each in (session, reference):
            each.set_prompt(prompts(0))
        for _ in range(4):
            found, wanted = session.generate_chunk(), reference.generate_chunk()
            np.testing.assert_array_equal(found.latents, wanted.latents)
        assert list(session.backend.load_ms)[:2] == ["check", "load plans"]
        assert session.backend_name == "tensorrt"
    gc.collect()
    assert not deployment.cuda.live
    assert not deployment.trt.live


def test_a_cache_that_cannot_be_kept_does_not_keep_the_memory(deployment, monkeypatch):
    deployment.record()
    session = Session(deployment.open())

    def fail(_):
        raise RuntimeError("the device is in error")

    monkeypatch.setattr(JitCache, "save", fail)
    with pytest.raises(RuntimeError, match="device is in error"):
        session.close()
    gc.collect()
    assert not deployment.cuda.live
    assert not deployment.trt.live


def renamed(infos):
    return [[f"arg_{i}", info.shape, info.dtype] for i, info in enumerate(infos)]


def test_tensors_of_torch_tensorrt_are_bound_by_position(deployment, prompts):
    paths = deployment.record(options={"frontend": "torch-tensorrt"})
    graphs = read_manifest(deployment.bundle).graphs
    for name, graph in graphs.items():
        content = json.loads(paths[name].read_text())
        # One name as in the graph does not make the others so.
        content["inputs"][1:] = renamed(graph.inputs)[1:]
        content["outputs"] = [[f"out_{tensor[0]}", *tensor[1:]] for tensor in content["outputs"]]
        paths[name].write_text(json.dumps(content))
    renew_hashes(deployment.bundle)
    reference = Session(open_backend(deployment.bundle, "onnxruntime", num_threads=1))
    with Session(deployment.open()) as session, reference:
        for each in (session, reference):
            each.set_prompt(prompts(0))
        for _ in range(3):
            found, wanted = session.generate_chunk(), reference.generate_chunk()
            np.testing.assert_array_equal(found.latents, wanted.latents)

    content = json.loads(paths["step"].read_text())
    del content["inputs"][3]
    paths["step"].write_text(json.dumps(content))
    renew_hashes(deployment.bundle)
    with pytest.raises(BundleError, match=r"differ from the .*--frontend torch-tensorrt`"):
        deployment.open()


def test_the_mending_command_has_the_options_of_the_build(copied_bundle, monkeypatch):
    deployment = Deployment(copied_bundle, monkeypatch)
    options = EngineOptions(
        "tensorrt", refit=True, workspace_gb=2.5, optimization_level=0, profiling_verbosity="none"
    )
    deployment.record(sm=90, options=options.to_json())
    command = read_manifest(copied_bundle).engines[0].rebuild_command(copied_bundle)
    assert command == (
        f"`fkv build {copied_bundle} --backend tensorrt --refit --workspace-gb 2.5 "
        "--optimization-level 0 --profiling-verbosity none`"
    )
    deployment.record(sm=86, options=EngineOptions("tensorrt-rtx", target="sm86").to_json())
    command = read_manifest(copied_bundle).engines[1].rebuild_command(copied_bundle)
    assert command == f"`fkv build {copied_bundle} --backend tensorrt`"


def test_siblings_share_plans(deployment, prompts):
    deployment.record()
    first = Session(deployment.open())
    second = first.sibling()
    assert len(deployment.trt.live) == 4
    first.close()
    second.set_prompt(prompts(0))
    second.generate_chunk()
    assert len(deployment.trt.live) == 4
    for _ in range(2):
        second.close()
    gc.collect()
    assert not deployment.trt.live


def test_lean_runs_version_compatible_engines_alone(deployment):
    deployment.record()
    with pytest.raises(BackendUnavailableError, match=r"fkv build .*--version-compatible"):
        deployment.open("tensorrt-lean")
    deployment.record(sm=90, options={"version_compatible": True, "hardware_compatible": True})
    with Session(deployment.open("tensorrt-lean")):
        assert deployment.trt.runtime.engine_host_code_allowed


def test_own_engine_before_a_compatible_one(deployment):
    deployment.record(sm=80, options={"hardware_compatible": True})
    deployment.record(sm=89)
    backend = deployment.open()
    assert backend.engine._plans.record.sm == 89
    backend.close()


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-lean"])
def test_a_stripped_engine_gets_the_weights_of_the_bundle(deployment, prompts, name):
    deployment.record(options={"strip_weights": True, "version_compatible": True})
    with Session(deployment.open(name)) as session:
        assert any(engine.stripped for engine in deployment.trt.live)
        session.set_prompt(prompts(0))
        session.generate_chunk()


@pytest.mark.parametrize("fault", ["refused", "unknown", "altered table"])
def test_a_stripped_engine_that_does_not_fit_is_refused(deployment, fault):
    paths = deployment.record(options={"strip_weights": True})
    message = r"the bundle's weights do not fit .*`fkv build .*--strip-weights`"
    if fault == "refused":
        deployment.trt.refuse = "weights"
    elif fault == "unknown":
        content = json.loads(paths["step"].read_text())
        content["stripped"]["model.unheard_of"] = "0" * 64
        paths["step"].write_text(json.dumps(content))
        renew_hashes(deployment.bundle)
        message = r"1 weights are missing, such as \['model\.unheard_of'\]"
    else:
        paths["step weights"].write_text("{}")
        message = r"step\.weights\.json: altered since it was built"
    with pytest.raises(BundleError, match=message):
        deployment.open()
    gc.collect()
    assert not deployment.trt.live


def renew_hashes(bundle):
    """Make the manifest's record of the engine fit the files as they are."""

    def renew(content):
        (record,) = content["engines"]
        record["files"] = {file: sha256_of(bundle / file) for file in record["files"]}
        for graph in record["graphs"].values():
            graph["sha256"] = record["files"][graph["file"]]

    edit(bundle, renew)


REFUSALS = {
    "no engine": ({}, None, r"holds no tensorrt engine; .*`fkv build \S+ --backend tensorrt`"),
    "another GPU": (
        {},
        {"sm": 90},
        r"for sm90, but this GPU \(CPU double\) is sm89; `fkv build",
    ),
    "another version": (
        {},
        {"version": "11.3.0.1"},
        r"built with tensorrt 11\.3\.0\.1, but tensorrt 11\.4\.0\.106 is installed; `fkv build",
    ),
    "older runtime": (
        {"version": "11.2.0.0"},
        {"options": {"version_compatible": True}},
        r"--version-compatible",
    ),
    "too little memory": (
        {"free_nbytes": 20_000},
        {},
        r"needs 0\.\d\d GB of GPU memory, but only 0\.00 GB",
    ),
    "auxiliary streams": ({}, {"num_aux_streams": 2}, r"auxiliary streams.*`fkv build"),
    "other tensors": (
        {},
        {"outputs": [["x0", [1], "float"]]},
        r"differ from the record; `fkv build",
    ),
}


@pytest.mark.parametrize(("machine", "record", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_does_not_fit_is_refused(copied_bundle, monkeypatch, machine, record, message):
    deployment = Deployment(copied_bundle, monkeypatch, **machine)
    if record is not None:
        deployment.record(**record)
    with pytest.raises((BackendUnavailableError, BundleError), match=message):
        deployment.open()
    gc.collect()
    assert not deployment.cuda.live
    assert not deployment.trt.live


def test_a_newer_runtime_runs_a_version_compatible_engine(copied_bundle, monkeypatch):
    deployment = Deployment(copied_bundle, monkeypatch, version="11.5.0.1")
    deployment.record(options={"version_compatible": True})
    deployment.open().close()


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_a_tampered_plan_never_reaches_tensorrt(deployment, damage):
    paths = deployment.record()
    if damage == "altered":
        paths["step"].write_text("{}")
    else:
        paths["step"].unlink()
    with pytest.raises(BundleError, match=rf"step\.plan: {damage}.*`fkv build"):
        deployment.open()
    assert not hasattr(deployment.trt, "runtime")


@pytest.mark.parametrize("what", ["deserialize", "context", "address", "launch"])
def test_what_tensorrt_refuses_is_told_in_its_words(deployment, what):
    deployment.record()
    deployment.trt.refuse = what
    said = {"deserialize": "magic tag", "context": "nvidia-smi", "address": "no reason",
            "launch": "cask failure"}  # fmt: skip
    with pytest.raises(ForcingKvError, match=said[what]):
        deployment.open()
    gc.collect()
    assert not deployment.cuda.live
    assert not deployment.trt.live


def test_an_engine_that_cannot_be_captured_says_how_to_go_on(deployment):
    deployment.record()
    deployment.trt.capturable = False
    with pytest.raises(ForcingKvError, match=r"cannot capture graph prompt.*--no-cuda-graph"):
        deployment.open()
    deployment.open(use_graphs=False).close()


class NoDriver:
    """`cuda.bindings.runtime` on a machine without a driver."""

    class cudaError_t:
        cudaSuccess = 0

    def __init__(self, driver):
        self._driver = driver

    def cudaDriverGetVersion(self):
        return 0, self._driver

    def cudaRuntimeGetVersion(self):
        return 0, 13050

    def cudaGetDeviceCount(self):
        return 0, 0


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (0, r"no NVIDIA driver was found here; .*nvidia-smi"),
        (
            12080,
            r"supports CUDA 12\.8, .* needs CUDA 13, .* driver 580 or newer .*-13-0.* onnxruntime$",
        ),
        (13000, r"GPU 0 was asked for, but the driver reports 0"),
    ],
    ids=["no driver", "old driver", "no GPU"],
)
def test_the_driver_is_checked_before_tensorrt_is_touched(deployment, monkeypatch, driver, message):
    deployment.record()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", NoDriver(driver))
    with pytest.raises(BackendUnavailableError, match=message):
        open_backend(deployment.bundle, "tensorrt")
    assert not hasattr(deployment.trt, "runtime")
    name, why = choose_backend("auto", deployment.bundle)
    assert name == "onnxruntime"
    assert DRIVER_HINT in why or "GPU" in why or "driver" in why


def test_a_damaged_record_is_named_and_nothing_is_opened(deployment):
    """Every entry of an engine's record, taken out or replaced."""
    deployment.record()
    content = json.loads((deployment.bundle / MANIFEST_FILE).read_text())

    def entries(node, place=()):
        for key in node if isinstance(node, dict) else ():
            yield (*place, key)
            yield from entries(node[key], (*place, key))

    refused = 0
    for place in entries(content["engines"][0]):
        for value in ("taken out", None, "x", [], {}, 5):
            damaged = json.loads(json.dumps(content))
            holder = damaged["engines"][0]
            for key in place[:-1]:
                holder = holder[key]
            if value == "taken out":
                del holder[place[-1]]
            else:
                holder[place[-1]] = value
            edit(deployment.bundle, lambda data, new=damaged: data.update(new))
            try:  # Names for people may be anything.
                deployment.open(use_graphs=False).close()
            except ForcingKvError:
                refused += 1
    assert refused > 100
    gc.collect()
    assert not deployment.cuda.live
    assert not deployment.trt.live
