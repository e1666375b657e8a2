"""Linear layers in FP8: the rounding, the layer, the graphs, the bundle, the engines."""

import json
import math
from contextlib import closing
from dataclasses import asdict, replace

import numpy as np
import onnx
import pytest
import torch
from command_line import fkv
from hypothesis import given
from hypothesis import strategies as st
from manifests import edit
from shared_exports import export_once

from forcing_kv.export.bundle.onnx_graph import onnx_model
from forcing_kv.export.bundle.read import read_bundle_weights
from forcing_kv.export.bundle.write import BundleLabels
from forcing_kv.export.checkpoint.fp8_file import FP8_FORMAT, FP8_SCHEMA_VERSION, read_fp8
from forcing_kv.export.cost.memory import engine_nbytes
from forcing_kv.export.inductor.build import build_inductor
from forcing_kv.export.inductor.compile import InductorOptions
from forcing_kv.export.model import fp8
from forcing_kv.export.model.capture import GraphSource
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.model.fp8 import FP8, Fp8Linear, round_to_fp8
from forcing_kv.export.model.fp8_layers import (
    block_linears,
    dequantized,
    quantize_,
    scale_of,
    scales_for,
)
from forcing_kv.export.model.fusion import fuse_gelu_, fuse_qkv_
from forcing_kv.export.tensorrt.stripped import shared_weights
from forcing_kv.export.verify.bundle import verify_bundle
from forcing_kv.runtime_trt.bundle.fp8 import LINEARS, Fp8Scales, LinearScales
from forcing_kv.runtime_trt.bundle.manifest import read_manifest
from forcing_kv.runtime_trt.bundle.schema import load_as
from forcing_kv.runtime_trt.dtypes import DTYPES
from forcing_kv.runtime_trt.errors import BackendUnavailableError, BundleError, InputError
from forcing_kv.runtime_trt.open import open_backend
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.schedule import Schedule

SHAPE = ModelShape(
    2, dim=64, ffn_dim=96, num_heads=2, in_channels=2, text_len=8, text_dim=8, freq_dim=8
)


def model_of(seed=0):
    torch.manual_seed(seed)
    model = CausalWanModel(SHAPE).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def amax_of(model, skip=()):
    names = [linear.name for linear in block_linears(model)]
    return {name: 6.0 for name in names if not name.startswith(tuple(skip))}


def export(folder, dtype="float32", skip=()):
    config = RolloutConfig(
        SHAPE, ChunkShape(3, 8, 12), CachePolicy(), HeadPartition(2, ((), (0,))),
        Schedule((1000, 500)), dtype,
    )  # fmt: skip
    model = model_of()
    scales = scales_for(model, amax_of(model, skip))
    export_once(model, config, folder, BundleLabels("small"), fp8=scales)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return export(tmp_path_factory.mktemp("fp8") / "bundle")


@pytest.fixture(scope="module")
def half_bundle(tmp_path_factory):
    return export(tmp_path_factory.mktemp("fp8") / "half", "float16")


def all_e4m3():
    """Every finite E4M3 value, from the format's definition: bias 7, no infinities."""
    values = [
        mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        for exponent in range(16)
        for mantissa in range(8)
        if (exponent, mantissa) != (15, 7)
    ]
    return np.array(sorted({sign * value for value in values for sign in (1, -1)}))


@given(
    st.lists(st.floats(-2000, 2000, width=32), min_size=1, max_size=20),
    st.integers(-14, 4),
)
def test_rounding_takes_the_nearest_value_and_saturates(numbers, exponent):
    grid, scale = all_e4m3(), 2.0**exponent
    x = torch.tensor(numbers, dtype=torch.float32)
    found = round_to_fp8(x, scale).float().numpy().astype(np.float64)
    scaled = np.clip(x.numpy().astype(np.float64) / scale, -448, 448)
    distance = np.abs(grid[None] - scaled[:, None]).min(1)
    assert (np.abs(found - scaled) == distance).all()
    # What 8 bits hold is exact in both 16-bit types, times the scale too.
    for dtype in (torch.bfloat16, torch.float16):
        assert (torch.tensor(found).to(dtype).double().numpy() == found).all()


def test_ties_go_to_even():
    x = torch.tensor([1 + 1 / 16, 1 + 3 / 16, -(1 + 1 / 16)])
    assert round_to_fp8(x, 1.0).float().tolist() == [1.0, 1.25, -1.0]


@given(st.floats(1e-3, 1e5))
def test_a_scale_is_the_smallest_power_of_two_that_fits(amax):
    scale = scale_of(amax)
    assert math.frexp(scale)[0] == 0.5
    assert amax <= 448 * scale
    assert amax > 448 * scale / 2 or scale == 2.0**-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scaled_product_is_the_reference(dtype):
    torch.manual_seed(0)
    x, bias = torch.randn(2, 12, 64).to(dtype), torch.randn(96).to(dtype)
    weight = round_to_fp8(torch.randn(96, 64), 2**-6)
    scales = torch.tensor([[2.0**-5]]), torch.tensor([[2.0**-6]])
    wanted, found = (
        body(x, weight, bias, *scales, 2**-5, 2**-6)
        for body in (fp8._reference, fp8._scaled_product)
    )
    assert found.dtype == dtype
    # Both round one float32 sum; its order may differ.
    torch.testing.assert_close(found, wanted, atol=0, rtol=2**-7)


def test_a_layer_keeps_its_8_bits_when_the_model_is_cast():
    linear = model_of().layers[0].ffn[0]
    layer = Fp8Linear.of(linear, LinearScales(2**-6, 2**-10))
    before = layer.weight.detach().view(torch.uint8).clone()
    for cast in (layer.half(), layer.float(), layer.to(torch.bfloat16)):
        assert cast.weight.dtype == FP8
        assert cast.weight.view(torch.uint8).equal(before)
    assert layer.bias.dtype == torch.bfloat16
    assert layer.input_scale.dtype == torch.float32
    model = quantize_(model_of(), scales_for(model_of(), amax_of(model_of())))
    model.cast_(torch.bfloat16)
    kinds = {linear.module.weight.dtype for linear in block_linears(model)}
    assert kinds == {FP8}
    assert model.layers[0].cross_attn.k.weight.dtype == torch.bfloat16


def test_layers_that_are_not_named_stay_as_they_are():
    model = model_of()
    scales = scales_for(model, amax_of(model, skip=["blocks.0."]))
    quantize_(model, scales)
    kinds = {linear.name: type(linear.module) for linear in block_linears(model)}
    assert {kind for name, kind in kinds.items() if name.startswith("blocks.0")} == {
        torch.nn.Linear
    }
    assert {kind for name, kind in kinds.items() if name.startswith("blocks.1")} == {Fp8Linear}
    assert scales.counts == dict.fromkeys(LINEARS, 1)


def test_q_k_and_v_share_a_scale_and_fuse_bit_by_bit():
    model = model_of()
    model.layers[0].self_attn.v.weight *= 40
    quantize_(model, scales_for(model, amax_of(model)))
    attn, x = model.layers[0].self_attn, torch.randn(12, 64)
    apart = attn.project(x)
    only = attn.project_kv(x)
    fuse_qkv_(model)
    fuse_gelu_(model)
    assert isinstance(model.layers[0].self_attn.qkv, Fp8Linear)
    assert isinstance(model.layers[0].ffn[0], Fp8Linear)
    for found, wanted in zip(attn.project(x), apart, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for found, wanted in zip(attn.project_kv(x), only, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_dequantized_model_has_the_rounded_weights_and_rounds_nothing_else():
    model = model_of()
    assert dequantized(model) is model
    scales = scales_for(model, amax_of(model))
    quantize_(model, scales)
    plain = dequantized(model)
    own, made = (each.layers[1].ffn[2] for each in (model, plain))
    assert isinstance(made, torch.nn.Linear)
    wanted = own.weight.float() * scales.linears["blocks.1.ffn.2"].weight
    assert made.weight.equal(wanted)
    coarse = round_to_fp8(torch.randn(5, 96), scales.linears["blocks.1.ffn.2"].input)
    exact = coarse.float() * scales.linears["blocks.1.ffn.2"].input
    torch.testing.assert_close(own(exact), made(exact))
    assert isinstance(own, Fp8Linear)


class _Layers(torch.nn.Module):
    """Two layers that read one tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        scales = LinearScales(2**-5, 2**-8)
        self.a, self.b = (Fp8Linear.of(torch.nn.Linear(32, 48), scales) for _ in range(2))

    def forward(self, x):
        return self.a(x), self.b(x)


def test_onnx_has_standard_nodes_that_compute_the_same(tmp_path):
    import onnx_ir as ir

    ort = pytest.importorskip("onnxruntime")
    module = _Layers()
    source = GraphSource("layers", module, (torch.zeros(6, 32),), ("x",), ("a", "b"))
    path = tmp_path / "layers.onnx"
    onnx.save(ir.to_proto(onnx_model(source)), path)
    graph = onnx.load(path).graph
    counts = [node.op_type for node in graph.node]
    # One rounding of the shared input; weights are stored in 8 bits.
    assert counts.count("QuantizeLinear") == 1
    assert counts.count("DequantizeLinear") == 3
    kinds = {each.name: each.data_type for each in graph.initializer}
    assert kinds["a.weight"] == kinds["b.weight"] == onnx.TensorProto.FLOAT8E4M3FN
    x = 4 * torch.randn(6, 32)
    x[0, 0] = 1000.0
    found = ort.InferenceSession(path).run(None, {"x": x.numpy()})
    for array, wanted in zip(found, module(x), strict=True):
        np.testing.assert_allclose(array, wanted.detach().numpy(), atol=1e-5, rtol=1e-5)


def test_a_bundle_holds_8_bits_and_gives_them_back(bundle):
    manifest = read_manifest(bundle)
    model = read_bundle_weights(bundle, manifest).model
    wanted = model_of()
    quantize_(wanted, manifest.fp8)
    for linear, other in zip(block_linears(model), block_linears(wanted), strict=True):
        assert isinstance(linear.module, Fp8Linear)
        assert linear.module.scales == other.module.scales
    # Heads are sorted, so self-attention's rows are not where they were.
    for name in ("ffn.0", "ffn.2", "cross_attn.q"):
        left, right = (each.layers[1].get_submodule(name) for each in (model, wanted))
        assert left.weight.view(torch.uint8).equal(right.weight.view(torch.uint8))
    stored = sum(value.nbytes for value in model.state_dict().values())
    counted = engine_nbytes(SHAPE, "float32", manifest.fp8.counts)
    assert sum(counted.values()) == stored
    assert "16 linear layers in FP8" in fkv("inspect", bundle).stdout


def test_a_stripped_engine_could_be_given_the_weights(bundle):
    table = shared_weights(bundle / "graphs/step.onnx")
    assert "float8_e4m3fn" in {entry.dtype for entry in table.values()}
    assert all(DTYPES[entry.dtype].tensorrt for entry in table.values())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_onnxruntime_passes(bundle, half_bundle, dtype):
    folder = bundle if dtype == "float32" else half_bundle
    with closing(open_backend(folder, "onnxruntime", num_threads=1)) as backend:
        report = verify_bundle(folder, backend, num_chunks=3)
    assert report.passed, report.worst.line()
    assert report.fp8


def test_a_wrong_scale_fails(bundle, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    weight = read_manifest(broken).fp8.linears["blocks.0.ffn.0"].weight

    def rescale(scale):
        edit(broken, lambda data: data["fp8"]["linears"]["blocks.0.ffn.0"].update(weight=scale))

    rescale(4 * weight)
    with closing(open_backend(broken, "onnxruntime", num_threads=1)) as backend:
        report = verify_bundle(broken, backend, num_chunks=2)
    assert not report.passed
    rescale(0.3)
    with pytest.raises(BundleError, match="power of two"):
        read_manifest(broken)


def test_rtx_builds_fp8_products_where_there_are_some(half_bundle):
    pytest.importorskip("tensorrt_rtx", reason="needs the Python package tensorrt-rtx")
    pytest.importorskip("polygraphy", reason="needs the Python package polygraphy")
    build = ("build", half_bundle, "--backend", "tensorrt-rtx", "--target")
    with pytest.raises(BackendUnavailableError, match=r"sm86 does not.*sm89"):
        fkv(*build, "sm86")
    assert "12 products in FP8" in fkv(*build, "sm89").stderr
    (record,) = read_manifest(half_bundle).engines
    # q, k and v are one product.
    assert record.details["step"].num_fp8_products == 6 * SHAPE.num_layers
    assert record.details["step"].num_fused_attention == 2 * SHAPE.num_layers


@pytest.mark.slow
def test_inductor_passes_and_shares_the_weights(bundle):
    build_inductor(bundle, InductorOptions("cpu"))
    (record,) = (r for r in read_manifest(bundle).engines if r.backend == "inductor")
    table = json.loads((bundle / record.folder / "constants.json").read_text())
    entry = table["model.blocks.0.self_attn.qkv.weight"]
    assert entry["dtype"] == "float8_e4m3fn"
    assert [piece["file"] for piece in entry["pieces"]] == ["graphs/weights.bin"] * 3
    with closing(open_backend(bundle, "inductor")) as backend:
        report = verify_bundle(bundle, backend, num_chunks=3)
    assert report.passed, report.worst.line()


def record_of(amax, shape=SHAPE):
    return {
        "format": FP8_FORMAT,
        "schema_version": FP8_SCHEMA_VERSION,
        "model": {"sha256": "0" * 64, "shape": asdict(shape)},
        "linears": {name: {"amax": value} for name, value in amax.items()},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a forcing_kv.fp8 file"),
        ({"linears": {"blocks.7.ffn.0": {"amax": 1.0}}}, "unknown layers"),
        ({"linears": {"blocks.0.ffn.0": {"amax": float("nan")}}}, "NaN is no finite number"),
        ({"linears": {"blocks.0.ffn.0": {"amax": -1.0}}}, "no finite magnitude"),
        ({"linears": {"blocks.0.ffn.0": {"amax": 1.0, "max": 2}}}, r"unknown keys .'max'.*amax"),
        ({"linears": {"blocks.0.self_attn.q": {"amax": 1.0}}}, "need one amax"),
        ({"linears": {"blocks.0.ffn.0": {}}}, r"blocks\.0\.ffn\.0: entry 'amax' is missing"),
        ({"model": {"sha256": "0", "shape": {"dim": 3}}}, r"model\.shape: entry 'num_layers' is"),
        (
            {"model": {"sha256": "0", "shape": asdict(replace(SHAPE, ffn_dim=16))}},
            "was made for a model of shape",
        ),
    ],
)
def test_calibrations_that_do_not_fit_are_refused(tmp_path, change, message):
    path = tmp_path / "fp8.json"
    path.write_text(json.dumps(record_of(amax_of(model_of())) | change))
    with pytest.raises(InputError, match=message):
        read_fp8(path, SHAPE)


def test_other_files_and_widths_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such FP8 calibration"):
        read_fp8(tmp_path / "none.json", SHAPE)
    (tmp_path / "text.json").write_text("[")
    with pytest.raises(InputError, match="not readable as a JSON FP8 calibration"):
        read_fp8(tmp_path / "text.json", SHAPE)
    odd = ModelShape(2, dim=24, ffn_dim=96, num_heads=2)
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(record_of({}, odd)))
    with pytest.raises(InputError, match="multiples of 16"):
        read_fp8(path, odd)


def test_scales_of_a_manifest_are_checked():
    assert load_as(Fp8Scales, {"linears": {}}, "fp8") == Fp8Scales({})
    with pytest.raises(InputError, match=r"fp8: linears\.blocks.*: entry 'weight' is missing"):
        load_as(Fp8Scales, {"linears": {"blocks.0.ffn.0": {"input": 1.0}}}, "fp8")
    for name in ("ffn.0", "blocks.0.ffn.1", "blocks.x.ffn.0", "blocks.0.cross_attn.k"):
        with pytest.raises(InputError, match=f"no layer is called '{name}'"):
            load_as(Fp8Scales, {"linears": {name: {"input": 1.0, "weight": 1.0}}}, "fp8")
