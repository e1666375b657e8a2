"""Real TensorRT-RTX builds without a GPU, and what is built when."""

import json
import math
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import onnx
import pytest
from command_line import fkv
from manifests import edit
from small_bundles import SHAPE, export

from forcing_kv.export.bundle.onnx_graph import INLINE_NBYTES
from forcing_kv.export.tensorrt.builder import BuildLog, BuiltPlan
from forcing_kv.export.tensorrt.options import EngineOptions
from forcing_kv.export.tensorrt.plan import BUILD_VERSION, BuildPlan, GraphBuild, plan_build
from forcing_kv.export.tensorrt.stripped import mark_stripped, shared_weights
from forcing_kv.runtime_trt.bundle.constants import map_constants, parse_table, read_constants
from forcing_kv.runtime_trt.bundle.manifest import read_manifest
from forcing_kv.runtime_trt.dtypes import DTYPES
from forcing_kv.runtime_trt.errors import (
    BundleError,
    ForcingKvError,
    InputError,
    MissingDependencyError,
)


@pytest.fixture(scope="module")
def half_bundle(tmp_path_factory):
    return export(tmp_path_factory.mktemp("rtx") / "half", "float16")


def rtx(bundle, *options, target="sm89"):
    return fkv("build", bundle, "--backend", "tensorrt-rtx", "--target", target, *options)


def needs_rtx():
    pytest.importorskip("tensorrt_rtx", reason="needs the Python package tensorrt-rtx")
    pytest.importorskip("polygraphy", reason="needs the Python package polygraphy")


def test_a_half_bundle_builds_into_fused_attention(half_bundle, tmp_path):
    needs_rtx()
    layers = tmp_path / "layers.json"
    rtx(half_bundle, "--layer-info", layers)
    (record,) = read_manifest(half_bundle).engines
    assert record.target == "sm89"
    # Self- and cross-attention of every layer.
    step, steady = record.details["step"], record.details["step_steady"]
    assert step.num_attention == step.num_fused_attention == 2 * SHAPE.num_layers
    # Layer 1 has two blocks of one head, for which there is no fused kernel at this size.
    assert (steady.num_attention, steady.num_fused_attention) == (5, 3)
    assert step.scratch_nbytes > 0
    found = json.loads(layers.read_text())
    assert sum("_gemm_mha" in layer["tactic"] for layer in found["step"]) == 4
    for graph in record.graphs.values():
        assert (half_bundle / graph.file).stat().st_size > 1000
    plan = half_bundle / record.graphs["evict"].file
    before = {name: detail.build_seconds for name, detail in record.details.items()}

    assert "nothing to do" in rtx(half_bundle).stderr
    assert read_manifest(half_bundle).engines == (record,)

    plan.write_bytes(b"damaged")
    with pytest.raises(BundleError, match=r"evict\.plan: altered since it was built .*`fkv build "):
        fkv("inspect", half_bundle)
    assert fkv("inspect", half_bundle, "--no-check").exit_code == 0
    said = json.loads(rtx(half_bundle, "--dry-run", "--json").stdout)
    assert said["to_build"] == ["evict"]
    rtx(half_bundle)
    (again,) = read_manifest(half_bundle).engines
    assert again.details["step"].build_seconds == before["step"]
    assert not plan.exists(), "the engines that were replaced are still there"
    assert again.folder == "engines/tensorrt-rtx-sm89-2"
    listed = fkv("inspect", half_bundle).stdout
    assert "engines/tensorrt-rtx-sm89-2: tensorrt-rtx for sm89, default options; built" in listed
    assert again.files[again.graphs["evict"].file][:12] in listed


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_dtypes_and_targets_build(tmp_path, dtype):
    needs_rtx()
    bundle = export(tmp_path / "bundle", dtype)
    rtx(bundle, target="sm120" if dtype == "bfloat16" else "sm86")
    (record,) = read_manifest(bundle).engines
    fused = 0 if dtype == "float32" else 2 * SHAPE.num_layers
    assert record.details["step"].num_attention == 2 * SHAPE.num_layers
    assert record.details["step"].num_fused_attention == fused


def test_a_place_for_layers_is_checked_before_the_build(half_bundle, tmp_path):
    needs_rtx()
    (tmp_path / "file").touch()
    before = read_manifest(half_bundle).engines
    with pytest.raises(InputError, match="not a writable folder; choose another --layer-info"):
        rtx(half_bundle, "--force", "--layer-info", tmp_path / "file" / "layers.json")
    assert read_manifest(half_bundle).engines == before


def test_a_failed_build_leaves_the_bundle_as_it_was(half_bundle, monkeypatch):
    needs_rtx()
    from forcing_kv.export.tensorrt import build

    before = sorted(path.relative_to(half_bundle) for path in half_bundle.rglob("*"))
    engines = read_manifest(half_bundle).engines

    def fail(*_):
        raise ForcingKvError("made to fail")

    monkeypatch.setattr(build, "build_plan", fail)
    with pytest.raises(ForcingKvError, match="made to fail"):
        rtx(half_bundle, target="sm86")
    assert sorted(path.relative_to(half_bundle) for path in half_bundle.rglob("*")) == before
    assert read_manifest(half_bundle).engines == engines


@pytest.mark.parametrize("place", ["log", "progress"])
def test_ctrl_c_stops_the_builder(half_bundle, monkeypatch, capfd, place):
    """Wherever Python happens to be when the signal arrives: the builder drops exceptions."""
    needs_rtx()
    from forcing_kv.export.tensorrt import build
    from forcing_kv.export.tensorrt import builder as engine_builder

    calls = []

    def interrupt(*_, **__):
        calls.append(place)
        if len(calls) == 20:
            signal.raise_signal(signal.SIGINT)

    if place == "log":
        monkeypatch.setattr(engine_builder.BuildLog, "read", interrupt)
    # A shell's background job ignores it.
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGINT)
    engines = read_manifest(half_bundle).engines
    plan = plan_build(half_bundle, EngineOptions("tensorrt-rtx", target="sm89"), force=True)
    with pytest.raises(KeyboardInterrupt):
        build.run_build(plan, interrupt if place == "progress" else lambda *_: None)
    assert signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, earlier)
    assert read_manifest(half_bundle).engines == engines
    assert not capfd.readouterr().out


def test_an_error_is_told_in_the_builders_words_alone(half_bundle, capfd):
    needs_rtx()
    with pytest.raises(ForcingKvError, match=r"^prompt\.onnx: .* for sm86: .*workspace limit"):
        rtx(half_bundle, "--workspace-gb", "1e-7", target="sm86")
    assert "Invalid Engine" not in "".join(capfd.readouterr())


STRIPPED = EngineOptions("tensorrt-rtx", target="sm89", strip_weights=True)


def test_a_stripped_build_records_where_its_weights_are(half_bundle, monkeypatch):
    """The builder itself needs a GPU for this; everything around it does not."""
    needs_rtx()
    from forcing_kv.export.tensorrt import build

    wanted = {}

    def build_plan(path, *_):
        # ONNX's own loader reads the weights, for which it wants their file and not a link.
        copied = half_bundle / "graphs" / "given.onnx"
        shutil.copyfile(path, copied)
        values = onnx.load(copied).graph.initializer
        copied.unlink()
        contents = {each.name: onnx.numpy_helper.to_array(each).tobytes() for each in values}
        wanted[path.stem] = {n: c for n, c in contents.items() if len(c) > INLINE_NBYTES}
        return BuiltPlan(b"plan", BuildLog(nbytes={"weights": 0}), shared_weights(path))

    monkeypatch.setattr(build, "build_plan", build_plan)
    before = read_manifest(half_bundle).engines
    record, _ = build.run_build(plan_build(half_bundle, STRIPPED, force=True))
    assert set(wanted) == {"prompt", "step", "step_steady", "evict"}
    for name, contents in wanted.items():
        file = f"{record.folder}/{name}.weights.json"
        table = parse_table((half_bundle / file).read_bytes(), half_bundle / file)
        found = {n: bytes(content) for n, _, content in read_constants(half_bundle, table)}
        assert found == contents
        assert file in record.files
        assert record.details[name].weight_nbytes == sum(map(len, contents.values()))
    assert len(wanted["step"]) > 10
    assert not plan_build(half_bundle, STRIPPED).to_do
    (half_bundle / record.folder / "step.weights.json").write_text("{}")
    assert [graph.name for graph in plan_build(half_bundle, STRIPPED).to_do] == ["step"]
    build.run_build(plan_build(half_bundle, STRIPPED))
    assert not plan_build(half_bundle, STRIPPED).to_do
    edit(half_bundle, lambda data: data.update(engines=[each.to_json() for each in before]))


def test_the_builder_knows_the_stripped_weights_by_name(half_bundle):
    """The names in the table against NVIDIA's parser, which gives them to the network."""
    needs_rtx()
    import tensorrt_rtx as trt

    from forcing_kv.export.tensorrt import build

    plan = plan_build(half_bundle, STRIPPED)
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    for graph in plan.graphs:
        with build._builder_file(plan, graph) as path:
            flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            network = builder.create_network(flags)
            assert trt.OnnxParser(network, logger).parse_from_file(str(path))
            table = mark_stripped(network, path)
            assert all(network.are_weights_marked_refittable(name) for name in table)
            # What the network holds under those names is what the table points to.
            held = set()
            for i in range(network.num_layers):
                layer = network.get_layer(i)
                if layer.type == trt.LayerType.CONSTANT:
                    layer.__class__ = trt.IConstantLayer
                    held.add((layer.name, layer.weights.tobytes()))
            for name, entry, content in map_constants(path.parent, table):
                assert (name, content.tobytes()) in held
                dtype = getattr(trt.DataType, DTYPES[entry.dtype].tensorrt)
                weights = trt.Weights(dtype, content.ctypes.data, math.prod(entry.shape))
                assert weights.nbytes == content.nbytes
                assert weights.numpy().tobytes() == content.tobytes()
            assert bool(table) == (graph.name != "evict")
            unknown = path.with_name("other.onnx")
            unknown.write_bytes(path.read_bytes().replace(b".ffn.0.weight", b".ffn.9.weight"))
            if graph.name == "step":
                with pytest.raises(ForcingKvError, match=r"ffn\.9\.weight.*without --strip"):
                    mark_stripped(network, unknown)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorrt-rtx", "target": "sm90"}, "cannot build for sm90"),
        ({"backend": "tensorrt-rtx", "target": "sm75"}, "cannot build for sm75"),
        ({"backend": "tensorrt", "target": "sm90"}, "takes no --target"),
        ({"backend": "tensorrt-rtx", "version_compatible": True}, "--version-compatible"),
        ({"backend": "tensorrt-rtx", "frontend": "torch-tensorrt"}, "--frontend"),
        (
            {"backend": "tensorrt", "frontend": "torch-tensorrt", "strip_weights": True},
            "leave out --strip-weights",
        ),
        ({"backend": "tensorrt", "optimization_level": 6}, "0 to 5"),
        ({"backend": "tensorrt", "workspace_gb": 0.0}, "positive"),
        ({"backend": "openvino"}, "allowed are"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        EngineOptions(**options)


@pytest.mark.parametrize(
    ("backend", "options", "named"),
    [
        ("inductor", ["--refit", "--target", "sm89", "--optimization-level", "0"], "--target, --r"),
        ("tensorrt-rtx", ["--device", "cpu", "--text-rows", "4"], "--device, --text-rows"),
        ("tensorrt", ["--no-autotune"], "--no-autotune"),
    ],
)
def test_options_of_another_backend_are_not_passed_over(half_bundle, backend, options, named):
    with pytest.raises(InputError, match=f"--backend {backend} does not have {named}"):
        fkv("build", half_bundle, "--backend", backend, *options)


def test_the_timing_cache_is_of_one_gpu_and_version(half_bundle):
    manifest = read_manifest(half_bundle)
    found = {
        BuildPlan(half_bundle, manifest, EngineOptions("tensorrt"), environment, ()).timing_cache
        for environment in (
            {"tensorrt": "11.4.0.106", "sm": "90", "gpu": "NVIDIA H100 80GB HBM3"},
            {"tensorrt": "11.4.0.106", "sm": "90", "gpu": "NVIDIA H200"},
            {"tensorrt": "11.5.0.1", "sm": "90", "gpu": "NVIDIA H200"},
        )
    }
    assert found == {
        f"engines/timing-nvidia-h100-80gb-hbm3-11.4.0.106-{BUILD_VERSION}.cache",
        f"engines/timing-nvidia-h200-11.4.0.106-{BUILD_VERSION}.cache",
        f"engines/timing-nvidia-h200-11.5.0.1-{BUILD_VERSION}.cache",
    }
    rtx_plan = BuildPlan(half_bundle, manifest, STRIPPED, {"sm": "89"}, ())
    assert rtx_plan.timing_cache is None


def test_the_builder_gets_no_timing_cache_but_the_one_that_is_recorded(half_bundle, tmp_path):
    from forcing_kv.export.tensorrt import build

    bundle = tmp_path / "bundle"
    shutil.copytree(half_bundle, bundle)
    environment = {"tensorrt": "11.4.0.106", "sm": "90"}

    def plan():
        manifest = read_manifest(bundle)
        return BuildPlan(bundle, manifest, EngineOptions("tensorrt"), environment, ())

    kept = bundle / plan().timing_cache
    kept.parent.mkdir(exist_ok=True)
    kept.write_bytes(b"somebody's")
    with build._timing_cache(plan()) as path:
        assert not path.exists()
    caches = build._keep_timing_cache(plan(), b"measured")
    assert kept.read_bytes() == b"measured"
    edit(bundle, lambda data: data.update(timing_caches=caches))
    with build._timing_cache(plan()) as path:
        assert path.read_bytes() == b"measured"
    assert not path.exists()
    kept.write_bytes(b"altered")
    message = r"\.cache: altered since it was written .*; `fkv build` without it measures anew"
    with pytest.raises(BundleError, match=message), build._timing_cache(plan()):
        pass
    kept.unlink()
    with build._timing_cache(plan()) as path:
        assert not path.exists()


def test_what_is_missing_is_named(half_bundle, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"forcing-kv\[trt\]"):
        fkv("build", half_bundle, "--backend", "tensorrt", "--dry-run")


def test_plugins_of_a_compatible_engine_are_portable(monkeypatch):
    from host_cuda import HostCuda

    from forcing_kv.export.tensorrt import plugins as plugin_setup

    monkeypatch.setattr(plugin_setup, "Cuda", lambda: HostCuda(sm=90))
    monkeypatch.setattr(plugin_setup, "_registered", {})
    targets = []
    own = EngineOptions("tensorrt")
    compatible = EngineOptions("tensorrt", hardware_compatible=True)
    for _ in range(2):
        plugin_setup.register_once(targets.append, own)
    with pytest.raises(ForcingKvError, match=r"build for .*portable_only=True.* in another"):
        plugin_setup.register_once(targets.append, compatible)
    monkeypatch.setattr(plugin_setup, "_registered", {})
    plugin_setup.register_once(targets.append, compatible)
    monkeypatch.setattr(plugin_setup, "_registered", {})
    plugin_setup.register_once(targets.append, EngineOptions("tensorrt", portable_kernels=True))
    found = [(target.sm, target.portable_only) for target in targets]
    assert found == [(90, False), (80, True), (90, True)]
    with pytest.raises(InputError, match=r"does not have --portable-kernels \(it has no plugins"):
        EngineOptions("tensorrt-rtx", target="sm89", portable_kernels=True)


def test_nodes_that_became_no_plugins_are_named(half_bundle):
    """NVIDIA's own parser, without our plugins: it takes the functions' bodies."""
    needs_rtx()
    from forcing_kv.export.tensorrt.builder import build_plan

    path, options = half_bundle / "graphs/evict.onnx", EngineOptions("tensorrt-rtx", target="sm89")
    with pytest.raises(ForcingKvError) as caught:
        build_plan(path, options)
    nodes = onnx.load(path, load_external_data=False).graph.node
    names = [node.name for node in nodes if node.domain == "forcing_kv"]
    assert f"evict.onnx: 0 of {len(names)} custom nodes became plugins" in str(caught.value)
    assert all(name in str(caught.value) for name in names[:3])


def test_plugins_are_counted_and_their_refusal_names_the_portable_ones(half_bundle, monkeypatch):
    from forcing_kv.export.tensorrt.builder import _remedy
    from forcing_kv.export.tensorrt.plugins import check_plugin_layers

    kinds = SimpleNamespace(PLUGIN_V3="plugin")
    path = half_bundle / "graphs/evict.onnx"
    nodes = onnx.load(path, load_external_data=False).graph.node
    names = [node.name for node in nodes if node.domain == "forcing_kv"]
    layers = [SimpleNamespace(name=name, type="plugin") for name in names]
    layers.insert(1, SimpleNamespace(name="cast", type="cast"))

    def checked():
        network = SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)
        return check_plugin_layers(SimpleNamespace(LayerType=kinds), network, path)

    assert checked() == len(names) > 1
    layers[0].type = "cast"
    with pytest.raises(ForcingKvError, match=rf"bodies of \['{names[0]}'\] \(1\)"):
        checked()
    own = EngineOptions("tensorrt")
    assert "build with --portable-kernels" in _remedy(2, own)
    assert not _remedy(0, own)
    assert not _remedy(2, replace(own, portable_kernels=True))


def test_an_engine_that_tells_no_size_counts_as_its_plan(half_bundle):
    from forcing_kv.export.tensorrt import build

    graph = GraphBuild("step", read_manifest(half_bundle).graphs["step"], None, "0", None)
    detail = build._detail(graph, BuiltPlan(b"x" * 1000, BuildLog()), 1.0)
    assert detail.weight_nbytes == 1000


def test_torch_tensorrt_is_asked_for_by_name(half_bundle):
    from forcing_kv.export.tensorrt.torch_frontend import build_plan_from_torch

    options = EngineOptions("tensorrt", frontend="torch-tensorrt")
    with pytest.raises(MissingDependencyError, match="pip install torch-tensorrt"):
        build_plan_from_torch(half_bundle, read_manifest(half_bundle), "step", options)


def test_the_log_is_read():
    log = BuildLog()
    log.read("Total Activation Memory: 9044480 bytes", problem=False)
    log.read(
        "Layers:\nName: a_mha, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [1] }], "
        "TacticName: _gemm_mha_v2_0x33, StreamId: 0, Metadata: [ONNX Layer: node_1]\n"
        "Name: p, LayerType: PluginV3, Inputs: []",
        problem=False,
    )
    log.read("it will be slow", problem=True)
    assert log.nbytes == {"activation": 9044480}
    assert log.num_fused_attention == 1
    assert [layer.kind for layer in log.layers] == ["kgen", "PluginV3"]
    assert log.layers[0].source == "[ONNX Layer: node_1]"
    assert log.problems == ["it will be slow"]
    assert replace(log.layers[1], name="q").tactic == ""
