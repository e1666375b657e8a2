"""GPUs that `fkv plan` knows: memory, arithmetic peak and bandwidth, from NVIDIA's data sheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.runtime_trt.errors import InputError

SUSTAINED = 0.8
"""Share of the data sheet's peak that large matrix products reach: 790 of 989 TFLOP/s in bfloat16
on an H200."""


@dataclass(frozen=True)
class Device:
    """One GPU."""

    name: str
    title: str
    memory_gib: int
    """Memory as sold; 24 GB on the box are 24 GiB."""
    tflops_16bit: float
    """Peak of dense bfloat16 and float16 matrix products with float32 sums, TFLOP/s."""
    tflops_float32: float
    """Peak of float32 arithmetic without tensor cores, TFLOP/s."""
    bandwidth_gbps: float
    """Peak memory bandwidth, GB/s."""
    has_fp8: bool = True
    """Whether it has FP8 matrix products, at twice the 16-bit rate: Ada and later."""

    def sustained_tflops(self, dtype: DType) -> float:
        """Arithmetic rate to plan with, TFLOP/s."""
        return SUSTAINED * (self.tflops_float32 if dtype == "float32" else self.tflops_16bit)

    @property
    def sustained_fp8_tflops(self) -> float:
        """Rate of FP8 products with float32 sums, TFLOP/s.

        Raises:
            InputError: the device has none.
        """
        if not self.has_fp8:
            having = [device.name for device in _DEVICES if device.has_fp8]
            raise InputError(f"{self.name} has no FP8 products; choose one of {having}")
        return SUSTAINED * 2 * self.tflops_16bit


_DEVICES = (
    Device("rtx4080", "GeForce RTX 4080", 16, 97.5, 48.7, 717),
    Device("rtx4090", "GeForce RTX 4090", 24, 165.2, 82.6, 1008),
    Device("rtx5090", "GeForce RTX 5090", 32, 209.5, 104.8, 1792),
    Device("l40s", "L40S", 48, 362, 91.6, 864),
    Device("a100", "A100 80GB SXM", 80, 312, 19.5, 2039, has_fp8=False),
    Device("h100", "H100 80GB SXM", 80, 989, 67, 3350),
    Device("h200", "H200 SXM", 141, 989, 67, 4800),
    Device("b200", "B200", 180, 2250, 75, 7700),
)
DEVICES: Mapping[str, Device] = MappingProxyType({device.name: device for device in _DEVICES})
"""Every known device by name."""

MEASURED_TFLOPS: Mapping[str, float] = MappingProxyType(
    {"NVIDIA H200": 790.0, "NVIDIA H100 80GB HBM3": 798.0}
)
"""CUDA's name of a device -> TFLOP/s of a bfloat16 product of 8192 x 8192 x 8192 on random data,
through PyTorch: the bound that measured times stand beside."""

MEMORY_SIZES_GIB = (16, 24, 32, 80, 141)
"""Memory of the cards that people deploy on."""


def find_device(name: str) -> Device:
    """A device by name.

    Raises:
        InputError: there is none.
    """
    if name not in DEVICES:
        raise InputError(f"device {name!r} is unknown; choose one of {list(DEVICES)}")
    return DEVICES[name]
