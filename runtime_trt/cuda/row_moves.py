"""One launch that copies many runs of rows: a kernel that takes the moves as its parameter.

Runs of rows as nodes of a captured graph would be a hundred copies one after another, and a batch
of copies (`cudaMemcpyBatchAsync`) cannot be captured. The kernel is PTX, which the driver compiles
for whatever GPU there is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

from forcing_kv.runtime_trt.errors import ForcingKvError, require

MAX_MOVES = 1020
"""In one launch: a kernel's parameters are 32,764 bytes at most."""

_THREADS = 256
_MAX_BLOCKS = 64
"""Blocks of one move."""


@dataclass(frozen=True)
class PitchedMove:
    """`height` runs of `width` bytes between pitched places on the device."""

    source: int
    target: int
    source_pitch: int
    target_pitch: int
    width: int
    height: int


class _Move(ctypes.Structure):
    """`PitchedMove` as the kernel reads it."""

    _fields_ = (
        ("source", ctypes.c_uint64),
        ("target", ctypes.c_uint64),
        ("source_pitch", ctypes.c_uint32),
        ("target_pitch", ctypes.c_uint32),
        ("width", ctypes.c_uint32),
        ("height", ctypes.c_uint32),
    )


_Table = _Move * MAX_MOVES


@dataclass(frozen=True)
class Launch:
    """One launch: moves that run at the same time, in any order."""

    unit: int
    """Bytes that a thread copies at a time: 16, or 4 where something is aligned no better."""
    grid: tuple[int, int, int]
    table: Any
    """The kernel's parameter."""


def launches(moves: Sequence[PitchedMove]) -> Iterator[Launch]:
    """The launches that do all moves; for none, one that does nothing."""
    for first in range(0, max(1, len(moves)), MAX_MOVES):
        some = moves[first : first + MAX_MOVES]
        fields = [value for move in some for value in astuple(move)[:5]]
        unit = 4 if any(value % 16 for value in fields) else 16
        assert not any(value % 4 for value in fields), "rows of a K/V cache are whole words"
        units = max((move.width * move.height // unit for move in some), default=0)
        assert units < 2**32 - _THREADS * _MAX_BLOCKS, "a move is too large for the kernel's index"
        blocks = min(_MAX_BLOCKS, max(1, -(-units // _THREADS)))
        table = _Table(*(_Move(*astuple(move)) for move in some))
        yield Launch(unit, (blocks, max(1, len(some)), 1), table)


def enqueue(launch: Launch, device: int, stream: int) -> None:
    """Launch on a stream of the current device; the parameter is copied at once.

    Raises:
        ForcingKvError: the driver refuses the kernel or the launch.
    """
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(launch.table))
    function, block = _function(device, launch.unit), (_THREADS, 1, 1)
    parameters = ctypes.addressof(pointers)
    _call("cuLaunchKernel", function, *launch.grid, *block, 0, stream, parameters, 0)


@cache
def _function(device: int, unit: int) -> Any:
    """The kernel in the context of a device, for the life of the process."""
    module = _call("cuModuleLoadData", ptx(unit).encode() + b"\0")
    return _call("cuModuleGetFunction", module, b"move_rows")


def _call(function: str, *arguments: Any) -> Any:
    driver: Any = require("cuda.bindings.driver", extra="trt")
    status, *results = getattr(driver, function)(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise ForcingKvError(f"{function} failed with {status.name}")
    return results[0] if results else None


def ptx(unit: int) -> str:
    """The kernel: block row y does move y, unit by unit."""
    vector = ("4", "v4.u32", "{%r20,%r21,%r22,%r23}")
    shift, kind, data = vector if unit == 16 else ("2", "u32", "%r20")
    text = _PTX.replace("SIZE", str(ctypes.sizeof(_Table))).replace("UNIT", str(unit))
    return text.replace("SHIFT", shift).replace("KIND", kind).replace("DATA", data)


_PTX = """.version 8.1
.target sm_80
.address_size 64

.visible .entry move_rows(.param .align 8 .b8 moves[SIZE])
.maxntid 256, 1, 1
{
    .reg .pred %p<2>;
    .reg .b32 %r<24>;
    .reg .b64 %rd<12>;

    mov.b64 %rd0, moves;
    mov.u32 %r0, %ctaid.y;
    mul.wide.u32 %rd1, %r0, 32;
    add.s64 %rd0, %rd0, %rd1;
    ld.param.u64 %rd2, [%rd0];              // source
    ld.param.u64 %rd3, [%rd0+8];            // target
    ld.param.v2.u32 {%r1, %r2}, [%rd0+16];  // their pitches
    ld.param.v2.u32 {%r3, %r4}, [%rd0+24];  // width, height
    shr.u32 %r5, %r3, SHIFT;                // units of a run
    mul.lo.u32 %r6, %r5, %r4;               // units of the move
    mov.u32 %r7, %ntid.x;
    mov.u32 %r8, %ctaid.x;
    mov.u32 %r9, %tid.x;
    mad.lo.u32 %r10, %r8, %r7, %r9;         // this thread's unit
    setp.ge.u32 %p0, %r10, %r6;
    @%p0 bra done;
    mov.u32 %r11, %nctaid.x;
    mul.lo.u32 %r12, %r11, %r7;
next:
    div.u32 %r13, %r10, %r5;                // run
    mul.lo.u32 %r14, %r13, %r5;
    sub.u32 %r15, %r10, %r14;               // unit within the run
    mul.wide.u32 %rd4, %r15, UNIT;
    mul.wide.u32 %rd5, %r13, %r1;
    add.s64 %rd6, %rd2, %rd5;
    add.s64 %rd6, %rd6, %rd4;
    mul.wide.u32 %rd7, %r13, %r2;
    add.s64 %rd8, %rd3, %rd7;
    add.s64 %rd8, %rd8, %rd4;
    ld.global.KIND DATA, [%rd6];
    st.global.KIND [%rd8], DATA;
    add.u32 %r10, %r10, %r12;
    setp.lt.u32 %p0, %r10, %r6;
    @%p0 bra next;
done:
    ret;
}
"""
