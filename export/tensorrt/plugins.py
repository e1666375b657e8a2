"""Registers our operators as TensorRT plugins for a build."""

from __future__ import annotations

from collections.abc import Callable

from forcing_kv.export.tensorrt.options import EngineOptions
from forcing_kv.plugins.bind.tensorrt import TargetDevice
from forcing_kv.plugins.compile.launch import PORTABLE_SM
from forcing_kv.runtime_trt.cuda.runtime import Cuda
from forcing_kv.runtime_trt.errors import ForcingKvError

Register = Callable[[TargetDevice], object]

_registered: dict[Register, TargetDevice] = {}


def register_once(register: Register, options: EngineOptions) -> None:
    """Register every operator, once per process, as TensorRT's registry wants it.

    Args:
        register: `register_tensorrt_plugins`, or `register_converters` for Torch-TensorRT.
        options: how to build. The kernels of a hardware-compatible engine are portable: PTX for one
            architecture does not run on those before it.

    Raises:
        MissingDependencyError: TensorRT or Triton is not installed.
        BackendUnavailableError: there is no GPU to build for.
        ForcingKvError: this process has registered them for other engines.
    """
    device = Cuda().device
    compatible = options.hardware_compatible
    sm = PORTABLE_SM if compatible else device.sm
    target = TargetDevice(sm, device.num_sms, portable_only=compatible)
    if register not in _registered:
        register(target)
        _registered[register] = target
    if (known := _registered[register]) != target:
        raise ForcingKvError(
            f"this process has registered plugins for {known}, and TensorRT keeps them; build for "
            f"{target} in another"
        )
