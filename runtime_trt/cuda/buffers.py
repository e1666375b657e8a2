"""Device memory by name: one allocation, fixed addresses, pinned host mirrors of its parts."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.cuda.runtime import Cuda
from forcing_kv.runtime_trt.dtypes import DTYPES, widened
from forcing_kv.runtime_trt.errors import BackendUnavailableError, InputError

ALIGNMENT = 256
"""What TensorRT asks of a binding's address, and what cudaMalloc gives."""


@dataclass(frozen=True)
class BufferSpec:
    """One dense row-major buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].nbytes

    @property
    def padded_nbytes(self) -> int:
        """Bytes that it takes, next buffer aligned."""
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class MemoryPlan:
    """Where every buffer lies, before anything is allocated."""

    offsets: Mapping[str, int]
    specs: Mapping[str, BufferSpec]
    nbytes: int
    guests: Mapping[str, BufferSpec] = field(default_factory=dict)
    """Buffers that lie within another one, which is idle while they are in use."""

    @classmethod
    def of(cls, specs: Sequence[BufferSpec]) -> MemoryPlan:
        """Lay buffers out one after another, in the given order.

        Raises:
            InputError: a name occurs twice.
        """
        offsets: dict[str, int] = {}
        end = 0
        for spec in specs:
            if spec.name in offsets:
                raise InputError(f"buffer {spec.name!r} occurs twice; names must differ")
            offsets[spec.name] = end
            end += spec.padded_nbytes
        return cls(offsets, {spec.name: spec for spec in specs}, end)

    def with_guests(self, host: str, start: int, guests: Sequence[BufferSpec]) -> MemoryPlan:
        """The plan with further buffers inside buffer `host`, from byte `start` of it on."""
        inner = MemoryPlan.of(guests)
        assert start % ALIGNMENT == 0, f"byte {start} of {host} is not aligned"
        assert start + inner.nbytes <= self.specs[host].nbytes, f"{host} is too small for guests"
        begin = self.offsets[host] + start
        offsets = {name: begin + offset for name, offset in inner.offsets.items()}
        return replace(self, offsets={**self.offsets, **offsets}, guests=inner.specs)

    def spec(self, name: str) -> BufferSpec:
        """A buffer, whether it has memory of its own or not."""
        return self.specs[name] if name in self.specs else self.guests[name]

    def span(self, names: Sequence[str]) -> tuple[int, int]:
        """(offset, nbytes) of buffers that lie next to each other, in this order."""
        begin = end = self.offsets[names[0]]
        for name in names:
            assert self.offsets[name] == end, f"{name} does not follow the buffer before it"
            end += self.specs[name].padded_nbytes
        return begin, end - begin


class DeviceMemory:
    """One allocation on the device that holds every buffer of a plan.

    Raises:
        BackendUnavailableError: there is not enough free memory.
    """

    def __init__(self, cuda: Cuda, plan: MemoryPlan) -> None:
        require_free_memory(cuda, plan.nbytes, "a session on this engine")
        self.plan = plan
        self.base = cuda.malloc(plan.nbytes)
        assert self.base % ALIGNMENT == 0, f"device memory at {self.base:#x} is not aligned"

    def clear(self, cuda: Cuda, stream: int) -> None:
        """Fill every buffer with zeros, in stream order.

        An engine may read rows beyond the valid prefix and mask them later: no NaN may lie there.
        """
        cuda.fill(self.base, 0, self.plan.nbytes, stream)

    def address(self, name: str) -> int:
        """Device address of a buffer; fixed for the life of this object."""
        return self.base + self.plan.offsets[name]

    def read(self, cuda: Cuda, name: str, stream: int) -> NDArray[Any]:
        """Copy a buffer to the host, bfloat16 as float32; waits for `stream`."""
        return read_from(cuda, self.address(name), self.plan.spec(name), stream)

    def write(self, cuda: Cuda, name: str, array: NDArray[Any], stream: int) -> None:
        """Copy an array of the buffer's shape to the device; waits for `stream`."""
        spec = self.plan.specs[name]
        source = np.ascontiguousarray(array, DTYPES[spec.dtype].numpy)
        assert source.shape == spec.shape, f"{name}: {source.shape} given, {spec.shape} needed"
        cuda.copy(self.address(name), source.ctypes.data, spec.nbytes, stream)
        cuda.synchronize(stream)


def read_from(cuda: Cuda, address: int, spec: BufferSpec, stream: int) -> NDArray[Any]:
    """Copy what lies at an address to the host, bfloat16 as float32; waits for `stream`."""
    array = np.empty(spec.shape, DTYPES[spec.dtype].numpy)
    cuda.copy(array.ctypes.data, address, spec.nbytes, stream)
    cuda.synchronize(stream)
    return widened(array, spec.dtype)


class PinnedMirror:
    """Pinned host memory laid out like a run of neighbouring buffers."""

    def __init__(self, cuda: Cuda, plan: MemoryPlan, names: Sequence[str]) -> None:
        begin, self.nbytes = plan.span(names)
        self.address = cuda.malloc_host(self.nbytes)
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(self.address))
        memory[:] = 0
        self.arrays: dict[str, NDArray[Any]] = {}
        """Views of the pinned memory, by buffer name; dead after `close` of the owner."""
        for name in names:
            spec, offset = plan.specs[name], plan.offsets[name] - begin
            view = memory[offset : offset + spec.nbytes].view(DTYPES[spec.dtype].numpy)
            self.arrays[name] = view.reshape(spec.shape)


def require_free_memory(cuda: Cuda, nbytes: int, what: str) -> None:
    """Check that the device has room.

    Raises:
        BackendUnavailableError: it has not; says how much is needed and how much is free.
    """
    free = cuda.free_nbytes()
    if nbytes > free:
        raise BackendUnavailableError(
            f"{what} needs {nbytes / 1e9:.2f} GB of GPU memory, but only {free / 1e9:.2f} GB of "
            f"{cuda.device.total_nbytes / 1e9:.2f} GB are free on {cuda.device.name}; stop other "
            "processes on this GPU (`nvidia-smi`), or export a smaller resolution or cache policy "
            "(`fkv plan` predicts the size)"
        )
