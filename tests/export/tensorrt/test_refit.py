"""Engines of one bundle with the weights of another, over a stand-in of TensorRT."""

import ctypes
import enum
import hashlib
import json
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
from command_line import fkv
from host_cuda import HostCuda
from shared_exports import export_once

from forcing_kv.export.bundle.write import BundleLabels
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.tensorrt import build, plugins
from forcing_kv.export.tensorrt.builder import BuildLog, BuiltPlan
from forcing_kv.export.tensorrt.options import EngineOptions
from forcing_kv.export.tensorrt.plan import plan_build
from forcing_kv.export.tensorrt.refit import graph_weights
from forcing_kv.runtime_trt.bundle.manifest import read_manifest
from forcing_kv.runtime_trt.errors import ForcingKvError, InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.schedule import Schedule

BACKENDS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
SIZES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT32": 4, "INT64": 8, "BOOL": 1, "UINT8": 1}


def export(folder, seed, dtype="float16", policy=None):
    import torch

    torch.manual_seed(seed)
    shape = ModelShape(
        2, dim=64, ffn_dim=64, num_heads=2, in_channels=2, text_len=8, text_dim=8, freq_dim=8
    )
    config = RolloutConfig(
        shape, ChunkShape(3, 8, 12), policy or CachePolicy(), HeadPartition(2, ((), (0,))),
        Schedule((1000, 500)), dtype,
    )  # fmt: skip
    model = CausalWanModel(shape).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    export_once(model, config, folder, BundleLabels("small"))
    return folder


class Refittable:
    """A TensorRT module whose plans are the hashes of their weights, by name."""

    DataType = enum.Enum("DataType", list(SIZES))
    SerializationFlag = enum.Enum("SerializationFlag", ["INCLUDE_REFIT"])

    class ILogger:
        Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING"])

    def __init__(self, name):
        self.__version__, self.__spec__ = "11.4.0.106", ModuleSpec(name, None)
        self.num_refits = 0
        self.fixed, self.wanted, self.loads, self.writes = set(), set(), True, True
        module = self

        class Refitter:
            def __init__(self, engine, logger):
                self.engine, self.given = engine, {}

            def get_all_weights(self):
                return sorted(set(self.engine.weights) - module.fixed)

            def set_named_weights(self, name, weights):
                assert name in self.get_all_weights()
                self.given[name] = weights
                return True

            def get_missing_weights(self):
                return sorted(module.wanted - set(self.given))

            def refit_cuda_engine(self):
                module.num_refits += 1
                self.engine.weights |= {name: w.sha256() for name, w in self.given.items()}
                return True

        self.Refitter = Refitter

    def Weights(self, dtype, address, count):
        nbytes = count * SIZES[dtype.name]
        # Read when it refits, as the real one does.
        return SimpleNamespace(sha256=lambda: sha256(ctypes.string_at(address, nbytes)))

    def Runtime(self, logger):
        return SimpleNamespace(
            deserialize_cuda_engine=lambda plan: (
                Engine(self, json.loads(plan)) if self.loads else None
            )
        )


class Engine:
    def __init__(self, module, weights):
        self.module, self.weights = module, weights

    def create_serialization_config(self):
        flags = set()
        return SimpleNamespace(flags=flags, set_flag=flags.add)

    def serialize_with_config(self, config):
        assert config.flags == {Refittable.SerializationFlag.INCLUDE_REFIT}
        return json.dumps(self.weights).encode() if self.module.writes else None


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def hashes(path):
    return {name: sha256(weight.content.tobytes()) for name, weight in graph_weights(path).items()}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The same model with two sets of weights."""
    folder = tmp_path_factory.mktemp("refit")
    return export(folder / "old", 0), export(folder / "new", 1)


@pytest.fixture(params=BACKENDS)
def trt(request, monkeypatch):
    """The stand-in as the module of a backend."""
    module = Refittable(BACKENDS[request.param])
    module.backend = request.param
    monkeypatch.setitem(sys.modules, BACKENDS[request.param], module)
    monkeypatch.setattr(plugins, "register_once", lambda *_: None)
    monkeypatch.setattr(
        build, "build_plan",
        lambda path, *_: BuiltPlan(json.dumps(hashes(path)).encode(), BuildLog()),
    )  # fmt: skip
    return module


def make_plan(trt, bundle, refit_from=None, force=False, driver="13.0", **options):
    device = replace(HostCuda(sm=89).device, driver=driver)
    options = EngineOptions(trt.backend, **{"refit": True, "attention": "native", **options})
    return plan_build(bundle, options, force=force, device=device, refit_from=refit_from)


@pytest.fixture
def old(trt, bundles):
    """A bundle with refittable engines."""
    build.run_build(make_plan(trt, bundles[0]))
    return bundles[0]


def test_engines_get_the_weights_of_the_other_bundle(trt, old, bundles):
    new = bundles[1]
    plan = make_plan(trt, new, old, force=True)
    record, layers = build.run_build(plan)
    assert not layers
    for graph in plan.graphs:
        content = json.loads((new / plan.folder / graph.file).read_text())
        with build._builder_file(plan, graph) as path:
            assert content == hashes(path)
        assert record.details[graph.name].refitted
    # Eviction has no weights of the model: its engine is the old one.
    assert trt.num_refits == 3
    before = (old / plan.folder / "step.plan").read_bytes()
    assert (new / plan.folder / "step.plan").read_bytes() != before
    # It is what a build of the same inputs would have made.
    assert not make_plan(trt, new).to_do
    assert read_manifest(new).engines[-1].details == record.details


@pytest.mark.parametrize("fault", ["fixed", "missing", "not loaded", "not written"])
def test_what_the_engine_does_not_take_is_told(trt, old, bundles, fault):
    new = bundles[1]
    plan = make_plan(trt, new, old, force=True)
    (graph,) = (graph for graph in plan.graphs if graph.name == "prompt")
    with build._builder_file(plan, graph) as path:
        name = next(name for name in hashes(path) if name.endswith(".bias"))
    if fault == "fixed":
        trt.fixed, message = {name}, rf"prompt.* not let be replaced: .*{name}"
    elif fault == "missing":
        trt.wanted, message = {"folded"}, r"1 weights are missing, such as \['folded'\]"
    elif fault == "not loaded":
        trt.loads, message = False, r"prompt\.plan: it cannot be loaded"
    else:
        trt.writes = False
        message = r"prompt\.onnx: .*prompt\.plan cannot be written \(TensorRT gives no reason\)"
    before = read_manifest(new).engines
    with pytest.raises(ForcingKvError, match=rf"{message}.*build it without --refit-from"):
        build.run_build(plan)
    assert read_manifest(new).engines == before


def test_another_graph_is_no_fine_tune(trt, old, tmp_path):
    other = export(tmp_path / "other", 1, policy=CachePolicy(num_sink_frames=2))
    with pytest.raises(ForcingKvError, match=r"step\.onnx: it differs .* in more than weights"):
        build.run_build(make_plan(trt, other, old))
    assert not read_manifest(other).engines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tf32": True}, "no engines of .*'step_steady', .* built with these options"),
        ({"refit": False}, "goes with --refit"),
        ({"strip_weights": True}, "neither with --strip-weights"),
    ],
)
def test_sources_that_do_not_fit_are_refused(trt, old, bundles, options, message):
    with pytest.raises(InputError, match=message):
        make_plan(trt, bundles[1], old, **options)
    with pytest.raises(InputError, match="itself"):
        make_plan(trt, old, old)


def test_another_driver_needs_no_other_engine(trt, old):
    assert not make_plan(trt, old, driver="13.1").to_do


def test_a_version_that_loses_biases_is_refused(trt, bundles):
    trt.__version__ = "11.3.0.99"
    if trt.backend == "tensorrt":
        with pytest.raises(ForcingKvError, match=r"may drop the bias .*leave out --refit"):
            make_plan(trt, bundles[0])
    assert make_plan(trt, bundles[0], refit=False).to_do


def test_the_command_needs_a_gpu_to_say_what_it_would_do(bundles):
    arguments = ("--backend", "tensorrt-rtx", "--refit-from", bundles[0], "--dry-run")
    with pytest.raises(InputError, match="leave out --dry-run"):
        fkv("build", bundles[1], *arguments)


def test_the_parser_names_every_weight_as_the_graph_does(bundles):
    """NVIDIA's own: what a fine-tune can change is known to the network by its name."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs the Python package tensorrt-rtx")
    logger = rtx.Logger(rtx.Logger.INTERNAL_ERROR)
    builder = rtx.Builder(logger)
    plan = plan_build(bundles[0], EngineOptions("tensorrt-rtx", target="sm89"))
    for graph in plan.graphs:
        with build._builder_file(plan, graph) as path:
            network = builder.create_network(
                1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            )
            assert rtx.OnnxParser(network, logger).parse_from_file(str(path))
            weights = graph_weights(path)
        unknown = {name for name in weights if not network.mark_weights_refittable(name)}
        assert {weights[name].dtype for name in unknown} <= {"int32", "int64"}
        assert (
            len(weights) - len(unknown)
            == {"prompt": 16, "step": 75, "step_steady": 74, "evict": 2}[graph.name]
        )
