"""The plugins under NVIDIA's own `tensorrt.plugin`, without a builder and without a GPU."""

import importlib.util
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from op_cases import cases_of

from forcing_kv.plugins.check.cases import CASES, OpCase
from forcing_kv.plugins.op_spec import DOMAIN, VERSION
from forcing_kv.plugins.registry import OPS, SIMILARITY_EVICTION

SM, NUM_SMS = 90, 132


def load_stubs():
    path = Path(__file__).parent / "tensorrt_stubs.py"
    spec = importlib.util.spec_from_file_location("tensorrt_stubs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trt(tmp_path_factory):
    """The `tensorrt` module, real or on stub libraries, with our plugins registered."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton: pip install 'forcing-kv[plugins]'")
    stubs = load_stubs()
    if "tensorrt" not in sys.modules and importlib.util.find_spec("tensorrt_libs") is None:
        if (reason := stubs.missing()) is not None:
            pytest.skip(f"needs {reason}")
        stubs.load(tmp_path_factory.mktemp("stubs"))
    tensorrt = pytest.importorskip("tensorrt")
    from forcing_kv.plugins.bind.tensorrt import TargetDevice, register_tensorrt_plugins

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        names = register_tensorrt_plugins(TargetDevice(SM, NUM_SMS))
        assert names == tuple(f"{DOMAIN}::{spec.name}" for spec in OPS)
        yield tensorrt


class Dim:
    """A constant dimension, in place of the builder's expressions."""

    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


class Builder:
    """Stands for TensorRT's expression builder on constants."""

    def __init__(self, trt) -> None:
        operation = trt.DimensionOperation
        self.rules = {
            operation.SUM: lambda a, b: a + b,
            operation.SUB: lambda a, b: a - b,
            operation.PROD: lambda a, b: a * b,
            operation.FLOOR_DIV: lambda a, b: a // b,
        }

    def constant(self, value: int) -> Dim:
        return Dim(value)

    def operation(self, operation, left: Dim, right: Dim) -> Dim:
        return Dim(self.rules[operation](left.value, right.value))


class Scalars(dict):
    """Receives the scalars of a kernel."""

    nbSymExprs = -1


@pytest.fixture
def plugin_of(trt, monkeypatch):
    """Drives a plugin as the builder would: dtypes, shapes, tactics, launch parameters, PTX."""
    import tensorrt_bindings.plugin._tensor as tensors

    monkeypatch.setattr(trt, "IDimensionExpr", Dim)
    monkeypatch.setattr(trt, "DimsExprs", lambda length: [None] * length)
    monkeypatch.setattr(tensors, "SymExprImpl", lambda expression: expression._expr.value)

    def drive(case: OpCase, dtype: str, order=None) -> "Driven":
        return Driven(trt, case, dtype, order)

    return drive


class Driven:
    """One plugin instance and what TensorRT would know about it."""

    def __init__(self, trt, case: OpCase, dtype: str, order=None) -> None:
        self.trt, self.case = trt, case
        self.values: dict[str, np.ndarray] = {}
        spec = case.spec
        kinds = {"T": dtype, "W": "FLOAT", "float32": "FLOAT", "int32": "INT32"}
        self.types = [
            getattr(trt.DataType, kinds[tensor.dtype]) for tensor in (*spec.inputs, *spec.outputs)
        ]
        shapes = [tensor.shape(case.sizes) for tensor in spec.inputs]
        self.shapes = [*shapes, *spec.output_shapes(shapes, case.attributes)]
        creator = trt.get_plugin_registry().get_creator(spec.name, str(VERSION), DOMAIN)
        assert creator is not None
        self.plugin = creator.create_plugin(
            spec.name,
            DOMAIN,
            trt.PluginFieldCollection([self._field(name) for name in order or case.attributes]),
            trt.TensorRTPhase.BUILD,
            trt.QuickPluginCreationRequest.STRICT_AOT,
        )
        self.num_inputs = len(spec.inputs)

    def _field(self, name: str):
        value = self.case.attributes[name]
        is_float = isinstance(value, float)
        kind = self.trt.PluginFieldType.FLOAT64 if is_float else self.trt.PluginFieldType.INT64
        # A field points at its array, so that the array must live as long.
        self.values[name] = np.array([value], np.float64 if is_float else np.int64)
        return self.trt.PluginField(name, self.values[name], kind)

    def output_types(self):
        ranks = [len(shape) for shape in self.shapes[: self.num_inputs]]
        return self.plugin.get_output_data_types(self.types[: self.num_inputs], ranks)

    def output_shapes(self):
        inputs = [[Dim(size) for size in shape] for shape in self.shapes[: self.num_inputs]]
        outputs = self.plugin.get_output_shapes(inputs, [], Builder(self.trt))
        return [tuple(dim.value for dim in shape) for shape in outputs]

    def descriptions(self):
        return [self._description(*pair) for pair in zip(self.types, self.shapes, strict=True)]

    def _description(self, dtype, shape):
        description = self.trt.DynamicPluginTensorDesc()
        inner = self.trt.PluginTensorDesc()
        inner.type, inner.format, inner.dims = dtype, self.trt.TensorFormat.LINEAR, shape
        description.desc = inner
        return description

    def combinations(self):
        return self.plugin.get_supported_format_combinations(self.descriptions(), self.num_inputs)

    def tactics(self):
        described = self.descriptions()
        self.plugin.configure_plugin(described[: self.num_inputs], described[self.num_inputs :])
        return self.plugin.get_valid_tactics()

    def launch(self, tactic: int):
        """Launch geometry, scalars, entry point and PTX of a tactic."""
        self.plugin.set_tactic(tactic)
        geometry, scalars = SimpleNamespace(), Scalars()
        described = self.descriptions()
        self.plugin.get_launch_params(
            [], described, self.num_inputs, geometry, scalars, Builder(self.trt)
        )
        inner = [description.desc for description in described]
        name, ptx = self.plugin.get_kernel(inner[: self.num_inputs], inner[self.num_inputs :])
        return geometry, scalars, name, ptx.decode()

    def prepare(self) -> "Driven":
        """Everything that comes before the tactics."""
        self.output_types()
        self.output_shapes()
        self.combinations()
        return self


@pytest.mark.parametrize("dtype", ["HALF", "BF16"])
def test_types_and_shapes_are_the_specification_s(kernel_case, dtype, plugin_of):
    driven = plugin_of(kernel_case, dtype)
    assert list(driven.output_types()) == driven.types[driven.num_inputs :]
    assert driven.output_shapes() == driven.shapes[driven.num_inputs :]


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.torch_name)
def test_tactics_are_offered_in_the_network_s_types_and_launch(spec, plugin_of):
    from forcing_kv.plugins.compile.launch import SAFE_SHARED_BYTES
    from forcing_kv.plugins.compile.ptx import entry_parameters

    driven = plugin_of(cases_of(spec)[0], "BF16").prepare()
    combination = driven.combinations()
    assert [description.type for description in combination] == driven.types
    tactics = driven.tactics()
    assert 1 in tactics
    every = spec.module("kernel").TACTICS
    assert sorted(tactics) == [n for n, tactic in enumerate(every, 1) if not tactic.torch_only]
    for number in (1, next(n for n, t in enumerate(every, 1) if not t.portable)):
        geometry, scalars, name, ptx = driven.launch(number)
        assert scalars.nbSymExprs == 0
        assert len(entry_parameters(ptx, name)) == len(driven.types)
        assert geometry.block_x == 32 * every[number - 1].num_warps
        assert min(geometry.grid_x, geometry.grid_y, geometry.grid_z) >= 1
        if every[number - 1].portable:
            assert geometry.shared_mem <= SAFE_SHARED_BYTES
            assert ".target sm_80" in ptx
        else:
            assert ".target sm_90a" in ptx


def test_reordered_attributes_are_refused(plugin_of):
    case = cases_of(SIMILARITY_EVICTION)[0]
    order = list(case.attributes)
    first, second = order.index("row_offset"), order.index("rows_per_head")
    order[first], order[second] = order[second], order[first]
    driven = plugin_of(case, "HALF", order).prepare()
    with pytest.raises(ValueError, match="attributes in another order"):
        driven.launch(1)


def test_dynamic_shapes_are_refused(plugin_of):
    driven = plugin_of(CASES[0], "HALF")
    driven.output_types()
    driven.output_shapes()
    driven.shapes[0] = (-1, *driven.shapes[0][1:])
    with pytest.raises(ValueError, match="must have fixed shapes"):
        driven.combinations()


def test_portable_tactics_alone_can_be_offered(trt):
    from forcing_kv.plugins.bind.tensorrt import PluginKernels, TargetDevice
    from forcing_kv.plugins.compile.ptx import tensor_dtypes
    from forcing_kv.plugins.registry import HEAD_INDEXED_ATTENTION

    kernels = PluginKernels(HEAD_INDEXED_ATTENTION, TargetDevice(SM, NUM_SMS, portable_only=True))
    case = cases_of(HEAD_INDEXED_ATTENTION)[0]
    shapes = [tensor.shape(case.sizes) for tensor in case.spec.inputs]
    dtypes = tensor_dtypes(case.spec, "float16")
    offered = kernels.offered(kernels.problem(shapes, dtypes, case.attributes), dtypes)
    assert [n for n, t in enumerate(kernels.tactics, 1) if t.portable] == offered


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.torch_name)
def test_signatures_follow_the_specification(spec, trt):
    from tensorrt_bindings.plugin._lib import QDP_REGISTRY

    definition = QDP_REGISTRY[f"{DOMAIN}::{spec.name}"]
    inputs = [tensor.name for tensor in spec.inputs]
    attributes = [attribute.name for attribute in spec.attributes]
    assert definition.num_outputs == len(spec.outputs)
    assert list(definition.input_tensor_names) == inputs
    assert list(definition.input_attrs) == attributes
    assert definition.aot_impl_attr_names == attributes
    parameters = list(inspect.signature(definition.aot_impl_func).parameters)
    assert parameters == [*inputs, *attributes, "outputs", "tactic"]


def test_registering_twice_is_refused(trt):
    from forcing_kv.plugins.bind.tensorrt import TargetDevice, register_tensorrt_plugins

    with pytest.raises(ValueError, match="already has"):
        register_tensorrt_plugins(TargetDevice(SM, NUM_SMS))


def test_converters_of_torch_tensorrt_take_the_torch_names(trt, monkeypatch):
    from forcing_kv.plugins.bind.tensorrt import TargetDevice
    from forcing_kv.plugins.bind.torch_tensorrt import register_converters

    calls = []
    fake = SimpleNamespace(
        generate_plugin_converter=lambda plugin_id, **options: calls.append((plugin_id, options))
    )
    monkeypatch.setitem(sys.modules, "torch_tensorrt.dynamo.conversion.plugins", fake)
    for package in ("torch_tensorrt", "torch_tensorrt.dynamo", "torch_tensorrt.dynamo.conversion"):
        monkeypatch.setitem(sys.modules, package, SimpleNamespace(__path__=[]))
    names = register_converters(TargetDevice(SM, NUM_SMS))
    assert names == tuple(f"{DOMAIN}::{spec.torch_name}" for spec in OPS)
    assert [name for name, _ in calls] == list(names)
    assert all(options["use_aot_if_available"] for _, options in calls)
