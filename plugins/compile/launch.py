"""How a Triton kernel is launched: the same plan for torch, for PTX and for TensorRT.

A kernel's arguments are the operator's inputs, then its outputs, then compile-time constants; a
tactic for PyTorch alone may want scratch memory behind the outputs.
Shapes are compile-time constants, so that a plan needs no scalars at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from forcing_kv.plugins.op_spec import Attributes

SAFE_SHARED_BYTES = 48 * 1024
"""Dynamic shared memory that every CUDA device grants without being asked."""

SHARED_LIMIT_BYTES = {
    80: 163 * 1024,
    86: 99 * 1024,
    87: 163 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    110: 227 * 1024,
    120: 99 * 1024,
    121: 99 * 1024,
}
"""Supported devices by compute capability, and the dynamic shared memory that a thread block can be
granted there: 1 KB less than a multiprocessor has (largest configuration in `cuda_occupancy.h` of
CUDA 13.0: 164 KB for 8.0 and 8.7, 100 KB for other 8.x and 12.x, 228 KB for 9.0 to 11.0)."""

PTX_VERSION = 87
"""PTX version to write, 87 for 8.7: the oldest that knows every device not in
`NEWER_PTX_VERSIONS`, so that it asks for no newer driver than the device does (r570)."""

NEWER_PTX_VERSIONS = {103: 88, 110: 90, 121: 88}
"""Oldest PTX version of devices that came later: 8.8 is of CUDA 12.9, 9.0 of CUDA 13.0."""

FIRST_TMA_SM = 90
"""First compute capability whose tensor memory accelerator loads tiles."""

PORTABLE_SM = 80
"""Target of the portable tactics: their PTX runs on every device from here on."""


class PtxError(RuntimeError):
    """A compiled kernel that must not be embedded, and why."""


class SharedMemoryError(PtxError):
    """A tactic that does not fit the device."""


@dataclass(frozen=True)
class Tactic:
    """One way to run an operator's kernel."""

    name: str
    num_warps: int
    """Warps of a thread block."""
    num_stages: int = 2
    """Depth of the software pipeline."""
    blocks: Mapping[str, int] = field(default_factory=dict)
    """Tile sizes, by the kernel's constant names."""
    schedule: str = "tiles"
    """How the work is dealt to thread blocks, where a kernel knows several ways."""
    least_shared_kb: int = 0
    """Dynamic shared memory of the devices that it is made for: on those that grant less it is not
    what is taken unmeasured."""
    portable: bool = False
    """Compiled for PORTABLE_SM and within SAFE_SHARED_BYTES, whatever the device."""
    tma: bool = False
    """Loads through tensor descriptors, which a thread block writes into memory that it is lent by
    Triton's launcher: for devices from FIRST_TMA_SM on."""
    torch_only: bool = False
    """Takes memory beside its inputs and outputs: for launches by PyTorch, which has it to give,
    and not for TensorRT."""

    def runs_on(self, device_sm: int) -> bool:
        """Whether a device (90 for 9.0) has the units that it needs; its memory is asked later."""
        return not self.tma or device_sm >= FIRST_TMA_SM

    def target_sm(self, device_sm: int) -> int:
        """Compute capability to compile for (90 for 9.0) on a device."""
        return PORTABLE_SM if self.portable else device_sm

    def shared_limit(self, device_sm: int) -> int:
        """Most bytes of dynamic shared memory that it may take on a device."""
        return SAFE_SHARED_BYTES if self.portable else SHARED_LIMIT_BYTES[device_sm]


def default_tactic(tactics: Sequence[Tactic], device_sm: int) -> Tactic:
    """The tactic to use where none was measured.

    The first that is compiled for the device and made for its shared memory; a device that is not
    known takes the first portable one.
    """
    granted = SHARED_LIMIT_BYTES.get(device_sm)
    return next(
        tactic
        for tactic in tactics
        if (tactic.portable if granted is None else _suits(tactic, granted))
    )


def _suits(tactic: Tactic, granted: int) -> bool:
    return not tactic.portable and tactic.least_shared_kb * 1024 <= granted


@dataclass(frozen=True)
class Problem:
    """Everything static about one call of an operator."""

    sizes: Mapping[str, int]
    """Size of every named axis."""
    attributes: Attributes
    dtype: str
    """Compute dtype: float16, bfloat16 or float32."""
    num_sms: int
    """Streaming multiprocessors of the device."""
    row_strides: Mapping[str, int] = field(default_factory=dict)
    """Elements from row to row of those inputs whose rows are not dense."""


@dataclass(frozen=True)
class Scratch:
    """Memory that a kernel wants for the time of a launch, as a parameter behind the outputs."""

    name: str
    """Parameter name, without `_ptr`."""
    shape: tuple[int, ...]
    dtype: str
    zeroed: bool = False
    """Whether it must hold zeros at the start; else it may hold anything."""


@dataclass(frozen=True)
class Launch:
    """A kernel with its constants and its launch geometry."""

    kernel: Any
    constants: Mapping[str, Any]
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    scratch: tuple[Scratch, ...] = ()
    """Memory for a launch, in the order of the kernel's parameters."""

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told beside arguments and grid."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def next_power_of_2(value: int) -> int:
    """Smallest power of two that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()


def ceil_div(value: int, divisor: int) -> int:
    """`value / divisor`, rounded up."""
    return -(-value // divisor)
