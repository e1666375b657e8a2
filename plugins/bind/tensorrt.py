"""Registers an operator as a TensorRT plugin whose kernels are embedded in the engine.

The plugin is a quickly deployable one (`tensorrt.plugin`: register, autotune, aot_impl). TensorRT
times the offered tactics, and the PTX of the winner goes into the engine, so that neither Python
nor a plugin library is needed to run it. Everything is made from the operator's specification;
TensorRT's decorators look at signatures, hence the functions are given theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import GenericAlias
from typing import Any
from weakref import WeakKeyDictionary

from forcing_kv.plugins.compile.launch import (
    SHARED_LIMIT_BYTES,
    Problem,
    PtxError,
    SharedMemoryError,
    Tactic,
)
from forcing_kv.plugins.compile.ptx import CompiledKernel, compile_kernel
from forcing_kv.plugins.op_spec import DOMAIN, OpSpec, result_of
from forcing_kv.plugins.registry import OPS
from forcing_kv.runtime_trt.dtypes import DTYPES
from forcing_kv.runtime_trt.errors import require


@dataclass(frozen=True)
class TargetDevice:
    """The device that an engine is built for."""

    sm: int
    """Compute capability, 90 for 9.0."""
    num_sms: int
    """Streaming multiprocessors."""
    portable_only: bool = False
    """Offer the portable tactics alone: should TensorRT refuse PTX for one architecture (such as
    sm_90a) or not grant a kernel more shared memory than every device does."""

    def __post_init__(self) -> None:
        if self.sm not in SHARED_LIMIT_BYTES:
            raise ValueError(
                f"there are no kernels for compute capability {self.sm}; supported are "
                f"{sorted(SHARED_LIMIT_BYTES)}"
            )


class PluginKernels:
    """Kernels of one operator on one device, compiled once per problem and tactic."""

    def __init__(self, spec: OpSpec, device: TargetDevice) -> None:
        self.spec = spec
        self.device = device
        self.tactics: tuple[Tactic, ...] = spec.module("kernel").TACTICS
        self._compiled: dict[tuple[Any, ...], CompiledKernel | None] = {}

    def problem(
        self, shapes: Sequence[Sequence[int]], dtypes: Sequence[str], attributes: Mapping[str, Any]
    ) -> Problem:
        """The static part of a call; checks the shapes.

        Raises:
            ValueError: an input's shape is not what the specification says.
        """
        inputs = shapes[: len(self.spec.inputs)]
        self.spec.check(inputs, attributes)
        sizes = self.spec.read_sizes(inputs, attributes)
        dtype = self.spec.compute_dtype(dtypes[: len(inputs)])
        return Problem(sizes, attributes, dtype, self.device.num_sms)

    def kernel(self, problem: Problem, dtypes: Sequence[str], number: int) -> CompiledKernel:
        """The kernel of a tactic, by its number from 1.

        Raises:
            SharedMemoryError: it does not fit the device.
        """
        kernel = self._compile(problem, dtypes, number)
        if kernel is None:
            raise SharedMemoryError(
                f"{self.spec.name}: tactic {self.tactics[number - 1].name} is not for {self.device}"
            )
        return kernel

    def offered(self, problem: Problem, dtypes: Sequence[str]) -> list[int]:
        """Numbers of the tactics that fit the device; TensorRT wants them positive.

        Raises:
            PtxError: none fits.
        """
        numbers = range(1, len(self.tactics) + 1)
        fitting = [n for n in numbers if self._compile(problem, dtypes, n) is not None]
        if not fitting:
            raise PtxError(f"{self.spec.name}: no tactic fits {self.device} for {problem}")
        return fitting

    def _compile(
        self, problem: Problem, dtypes: Sequence[str], number: int
    ) -> CompiledKernel | None:
        sizes, attributes = (tuple(x.items()) for x in (problem.sizes, problem.attributes))
        key = (sizes, attributes, tuple(dtypes), number)
        if key not in self._compiled:
            tactic = self.tactics[number - 1]
            self._compiled[key] = None
            allowed = tactic.portable or not self.device.portable_only
            if allowed and not tactic.torch_only:
                with suppress(SharedMemoryError):
                    self._compiled[key] = compile_kernel(
                        self.spec, problem, dtypes, tactic, self.device.sm
                    )
        return self._compiled[key]


def register_plugin(spec: OpSpec, device: TargetDevice, name: str | None = None) -> str:
    """Register an operator in TensorRT's plugin registry.

    Args:
        device: the device that engines are built for, in this process from now on.
        name: plugin name; by default the ONNX operator's, by which the ONNX parser finds it.

    Returns:
        The plugin's identifier, `forcing_kv::name`.

    Raises:
        MissingDependencyError: TensorRT is not installed.
        ValueError: the plugin is registered already.
    """
    require("tensorrt")
    plugin_id = f"{DOMAIN}::{name or spec.name}"
    trtp = require("tensorrt.plugin")
    functions = _PluginFunctions(spec, PluginKernels(spec, device))
    trtp.register(plugin_id)(functions.describe())
    trtp.autotune(plugin_id)(functions.autotune())
    trtp.aot_impl(plugin_id)(functions.aot_impl())
    return plugin_id


def register_tensorrt_plugins(device: TargetDevice) -> tuple[str, ...]:
    """Register every operator in TensorRT, once per process, before an ONNX file is parsed.

    Returns:
        Identifiers of the plugins.
    """
    return tuple(register_plugin(spec, device) for spec in OPS)


class _PluginFunctions:
    """The three functions that TensorRT's decorators want, with signatures from the spec."""

    def __init__(self, spec: OpSpec, kernels: PluginKernels) -> None:
        self._spec = spec
        self._kernels = kernels
        self._trt = require("tensorrt")
        self._trtp = require("tensorrt.plugin")
        self._names = {
            getattr(self._trt.DataType, each.tensorrt): each.name
            for each in DTYPES.values()
            if each.plugin
        }
        self._types = {name: value for value, name in self._names.items()}
        # TensorRT hands the attributes by name to `describe` and by position to `aot_impl`.
        self._described: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()

    def describe(self) -> Callable[..., Any]:
        """Shapes and dtypes of the outputs."""

        def describe(*arguments: Any, **attributes: Any) -> Any:
            descriptions = arguments[: len(self._spec.inputs)]
            shapes = self._spec.output_shapes([d.shape_expr for d in descriptions], attributes)
            types = self._spec.output_dtypes(
                [d.dtype for d in descriptions], self._types.__getitem__
            )
            outputs = tuple(
                self._trtp.from_shape_expr(tuple(shape), dtype)
                for shape, dtype in zip(shapes, types, strict=True)
            )
            self._described[outputs[0]] = attributes
            return result_of(outputs)

        tensor = self._trtp.TensorDesc
        count = len(self._spec.outputs)
        returns = tensor if count == 1 else GenericAlias(tuple, (tensor,) * count)
        return self._signed(describe, [], returns)

    def autotune(self) -> Callable[..., Any]:
        """The tactics that fit the device, in the network's types and linear layout."""

        def autotune(*arguments: Any) -> Any:
            inputs, attributes, (outputs,) = self._split(arguments)
            tensors = (*inputs, *outputs)
            dtypes, problem = self._problem(tensors, attributes)
            types = ", ".join(DTYPES[dtype].plugin for dtype in dtypes)
            tactics = self._kernels.offered(problem, dtypes)
            return [self._trtp.AutoTuneCombination(types, "LINEAR", tactics)]

        returns = GenericAlias(list, (self._trtp.AutoTuneCombination,))
        return self._signed(autotune, ["outputs"], returns)

    def aot_impl(self) -> Callable[..., Any]:
        """Entry point, PTX, geometry, and no scalars: sizes are compiled in."""

        def aot_impl(*arguments: Any) -> Any:
            inputs, attributes, (outputs, tactic) = self._split(arguments)
            self._check_order(outputs[0], attributes)
            dtypes, problem = self._problem((*inputs, *outputs), attributes)
            kernel = self._kernels.kernel(problem, dtypes, tactic)
            grid_x, grid_y, grid_z = kernel.launch.grid
            geometry = self._trtp.KernelLaunchParams(
                grid_x, grid_y, grid_z, kernel.block_threads, 1, 1, kernel.shared_bytes
            )
            return kernel.name, kernel.ptx, geometry, self._trtp.SymIntExprs(0)

        trtp = self._trtp
        returns = GenericAlias(tuple, (str, str, trtp.KernelLaunchParams, trtp.SymIntExprs))
        return self._signed(aot_impl, ["outputs", "tactic"], returns)

    def _signed(
        self, function: Callable[..., Any], extra: Sequence[str], returns: Any
    ) -> Callable[..., Any]:
        """Give a function the signature that its decorator checks."""
        tensor = self._trtp.TensorDesc
        known = {"outputs": GenericAlias(tuple, (tensor,)), "tactic": int}
        signature = self._spec.signature(tensor, returns, **{name: known[name] for name in extra})
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    def _split(self, arguments: Sequence[Any]) -> tuple[Any, dict[str, Any], Any]:
        """Inputs, attributes by name, and what follows them."""
        end = len(self._spec.inputs) + len(self._spec.attributes)
        inputs, attributes = self._spec.split_arguments(arguments[:end])
        return inputs, attributes, arguments[end:]

    def _problem(
        self, tensors: Sequence[Any], attributes: dict[str, Any]
    ) -> tuple[tuple[str, ...], Problem]:
        shapes = [tuple(int(size) for size in tensor.shape) for tensor in tensors]
        if any(size < 0 for shape in shapes for size in shape):
            raise ValueError(
                f"{self._spec.name}: the graph must have fixed shapes, found {shapes}; export it "
                "again without dynamic axes"
            )
        dtypes = tuple(self._dtype_name(tensor.dtype) for tensor in tensors)
        return dtypes, self._kernels.problem(shapes, dtypes, attributes)

    def _dtype_name(self, dtype: Any) -> str:
        if dtype not in self._names:
            raise ValueError(
                f"{self._spec.name}: TensorRT type {dtype} found, supported are "
                f"{sorted(self._types)}"
            )
        return self._names[dtype]

    def _check_order(self, output: Any, attributes: dict[str, Any]) -> None:
        described = self._described.get(output)
        if described is not None and described != attributes:
            raise ValueError(
                f"{self._spec.name}: TensorRT passed the attributes in another order than they "
                f"were registered in: by name {described}, by position {attributes}; the node's "
                f"attributes must stand in the order {[a.name for a in self._spec.attributes]}"
            )
