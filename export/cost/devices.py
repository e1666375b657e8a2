"""GPUs that `fkv plan` knows: memory, arithmetic peak and bandwidth, from NVIDIA's data sheets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.runtime_trt.errors import InputError, unknown_name

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


# GeForce: NVIDIA's GA102, Ada and RTX Blackwell architecture whitepapers, and for the smaller ones
# the product pages' cores and boost clocks. Their tensor cores sum in float32 at half of the rate
# that is advertised (which is with sums in float16): 1,024 FLOPs a clock and multiprocessor, twice
# float32's without tensor cores. Professional and data-centre cards do not halve it.
# Others: NVIDIA's data sheets (A100, H100, H200, L4, L40S, A10G of AWS's G5, RTX 6000 Ada, GH200,
# HGX B200 and B300), the RTX PRO 6000 Blackwell's in the RTX Blackwell PRO whitepaper, H20 as its
# server vendors publish it. All without sparsity. Memory of B200 and B300 is what systems report.
# Not compared with the documents line by line yet: the GeForce cards but for the RTX 4090, A10G,
# RTX 6000 Ada, GH200 and the B300's memory.
_DEVICES = (
    Device("rtx3060", "GeForce RTX 3060", 12, 25.5, 12.7, 360, has_fp8=False),
    Device("rtx3090", "GeForce RTX 3090", 24, 71.2, 35.6, 936, has_fp8=False),
    Device("rtx4060", "GeForce RTX 4060", 8, 30.2, 15.1, 272),
    Device("rtx4060ti-8gb", "GeForce RTX 4060 Ti 8GB", 8, 44.1, 22.1, 288),
    Device("rtx4060ti", "GeForce RTX 4060 Ti 16GB", 16, 44.1, 22.1, 288),
    Device("rtx4070", "GeForce RTX 4070", 12, 58.3, 29.1, 504),
    Device("rtx4070super", "GeForce RTX 4070 SUPER", 12, 71.0, 35.5, 504),
    Device("rtx4070ti", "GeForce RTX 4070 Ti", 12, 80.2, 40.1, 504),
    Device("rtx4070tisuper", "GeForce RTX 4070 Ti SUPER", 16, 88.2, 44.1, 672),
    Device("rtx4080", "GeForce RTX 4080", 16, 97.5, 48.7, 717),
    Device("rtx4080super", "GeForce RTX 4080 SUPER", 16, 104.4, 52.2, 736),
    Device("rtx4090", "GeForce RTX 4090", 24, 165.2, 82.6, 1008),
    Device("rtx5060", "GeForce RTX 5060", 8, 38.4, 19.2, 448),
    Device("rtx5060ti-8gb", "GeForce RTX 5060 Ti 8GB", 8, 47.4, 23.7, 448),
    Device("rtx5060ti", "GeForce RTX 5060 Ti 16GB", 16, 47.4, 23.7, 448),
    Device("rtx5070", "GeForce RTX 5070", 12, 61.7, 30.9, 672),
    Device("rtx5070ti", "GeForce RTX 5070 Ti", 16, 87.9, 43.9, 896),
    Device("rtx5080", "GeForce RTX 5080", 16, 112.6, 56.3, 960),
    Device("rtx5090", "GeForce RTX 5090", 32, 209.5, 104.8, 1792),
    Device("rtx6000ada", "RTX 6000 Ada Generation", 48, 364.2, 91.1, 960),
    Device("rtxpro6000", "RTX PRO 6000 Blackwell", 96, 503.8, 126.0, 1792),
    Device("a10g", "A10G", 24, 70, 35, 600, has_fp8=False),
    Device("l4", "L4", 24, 121, 30.3, 300),
    Device("l40s", "L40S", 48, 362, 91.6, 864),
    Device("a100-40gb", "A100 40GB", 40, 312, 19.5, 1555, has_fp8=False),
    Device("a100-pcie", "A100 80GB PCIe", 80, 312, 19.5, 1935, has_fp8=False),
    Device("a100", "A100 80GB SXM", 80, 312, 19.5, 2039, has_fp8=False),
    Device("h20", "H20", 96, 148, 44, 4000),
    Device("h100-pcie", "H100 80GB PCIe", 80, 756, 51, 2000),
    Device("h100-nvl", "H100 NVL", 94, 835, 60, 3900),
    Device("h100", "H100 80GB SXM", 80, 989, 67, 3350),
    Device("gh200", "GH200 96GB", 96, 989, 67, 4000),
    Device("gh200-144gb", "GH200 144GB", 144, 989, 67, 4900),
    Device("h200", "H200 SXM", 141, 989, 67, 4800),
    Device("b200", "B200", 180, 2250, 75, 7700),
    Device("b300", "B300", 268, 2250, 75, 8000),
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
    """A device by name, as listed or as its maker calls it, such as `NVIDIA GeForce RTX 4090`.

    Raises:
        InputError: there is none; suggests near names and lists all.
    """
    for device in _DEVICES:
        if _plain(name) in (_plain(device.name), _plain(device.title)):
            return device
    raise unknown_name("device", _plain(name) or name, DEVICES)


def _plain(name: str) -> str:
    """A name without its maker, its family, and how it is set."""
    return re.sub(r"nvidia|geforce|[ _-]", "", name.lower())
