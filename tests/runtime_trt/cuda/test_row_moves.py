"""The kernel of a commit: its instructions, and what the real cuda-bindings hand to the driver."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forcing_kv.runtime_trt.cuda.row_moves import MAX_MOVES, PitchedMove, launches, ptx

LINE = re.compile(r"(?:@(%\w+) )?([\w.]+)\s*(.*)")


class Thread:
    """Runs the kernel's PTX for one thread; device memory is this process's."""

    def __init__(self, lines, launch, block, thread):
        self.lines, self.table = lines, launch.table
        self.values = {
            "%ntid.x": 256, "%tid.x": thread, "%nctaid.x": launch.grid[0],
            "%ctaid.x": block[0], "%ctaid.y": block[1], "moves": ctypes.addressof(launch.table),
        }  # fmt: skip

    def value(self, name):
        return self.values[name] if name in self.values else int(name)

    def place(self, text):
        register, _, offset = text.strip("[]").partition("+")
        return self.value(register) + int(offset or 0)

    def run(self):
        labels = {line[:-1]: at for at, line in enumerate(self.lines) if line.endswith(":")}
        at = 0
        while True:
            line = self.lines[at]
            at += 1
            if line.endswith(":") or line.startswith("."):
                continue
            predicate, name, rest = LINE.fullmatch(line).groups()
            if predicate and not self.values[predicate]:
                continue
            if name == "ret":
                return
            if name == "bra":
                at = labels[rest]
                continue
            self.step(name, re.findall(r"\{[^}]*\}|[^,\s]+", rest))

    def step(self, name, operands):
        kind, *_ = name.split(".")
        if kind in ("ld", "st"):
            target, place = operands if kind == "ld" else operands[::-1]
            registers = re.findall(r"%\w+", target)
            wide = ctypes.c_uint64 if name.endswith("u64") else ctypes.c_uint32
            words = (wide * len(registers)).from_address(self.place(place))
            for i, register in enumerate(registers):
                if kind == "ld":
                    self.values[register] = words[i]
                else:
                    words[i] = self.values[register]
            return
        target, *sources = operands
        a, b, c = (*map(self.value, sources), 0, 0)[:3]
        result = {
            "mov": lambda: a, "add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b,
            "mad": lambda: a * b + c, "shr": lambda: a >> b, "div": lambda: a // b,
            "setp": lambda: a >= b if ".ge." in name else a < b,
        }[kind]()  # fmt: skip
        bits = 64 if name.endswith("64") or ".wide" in name else 32
        self.values[target] = result if kind == "setp" else result % 2**bits


def run(launch):
    body = ptx(launch.unit).partition("{\n")[2].rpartition("}")[0]
    lines = [line.partition("//")[0].strip().rstrip(";") for line in body.splitlines()]
    lines = [line for line in lines if line]
    for y in range(launch.grid[1]):
        for x in range(launch.grid[0]):
            for thread in range(256):
                Thread(lines, launch, (x, y), thread).run()


@settings(max_examples=12)
@given(
    unit=st.sampled_from([4, 16]),
    shapes=st.lists(st.tuples(*[st.integers(1, 5)] * 2, *[st.integers(0, 3)] * 2), max_size=3),
)
def test_the_kernel_moves_every_run_and_nothing_else(unit, shapes):
    size = 4096
    source, target = (np.zeros(size + 16, np.uint8) for _ in range(2))
    source[:] = np.random.default_rng(0).integers(0, 256, len(source))
    wanted = target.copy()
    begin = [-array.ctypes.data % 16 for array in (source, target)]
    moves = []
    for i, (units, height, gap, shift) in enumerate(shapes):
        width, pitches = unit * units, (unit * (units + gap), unit * (units + shift))
        offsets = [begin[0] + unit * (shift + 7 * i), begin[1] + 1024 * i + unit * gap]
        addresses = (source.ctypes.data + offsets[0], target.ctypes.data + offsets[1])
        moves.append(PitchedMove(*addresses, *pitches, width, height))
        for row in range(height):
            first, end = (
                offset + row * pitch for offset, pitch in zip(offsets, pitches, strict=True)
            )
            wanted[end : end + width] = source[first : first + width]
    (launch,) = launches(moves)
    assert unit == 4 or launch.unit == 16
    run(launch)
    np.testing.assert_array_equal(target, wanted)


def test_many_moves_take_as_few_launches_as_parameters_allow():
    move = PitchedMove(0, 1 << 20, 256, 256, 256, 1000)
    assert [launch.grid for launch in launches([move])] == [(63, 1, 1)]
    grids = [launch.grid[1] for launch in launches([move] * (MAX_MOVES + 5))]
    assert grids == [MAX_MOVES, 5]
    assert ctypes.sizeof(next(launches([])).table) <= 32_764


@pytest.mark.parametrize("unit", [4, 16])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_the_assembler_takes_the_kernel(tmp_path, unit, arch):
    assembler = shutil.which("ptxas")
    if assembler is None:
        pytest.skip("needs ptxas of NVIDIA's toolkit")
    file = tmp_path / "moves.ptx"
    file.write_text(ptx(unit))
    command = [assembler, f"-arch={arch}", "-v", str(file), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores" in done.stderr


DRIVER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
int cuGetProcAddress_v2(const char *symbol, void **address, int version, uint64_t flags, int *ok) {
    char name[256];
    snprintf(name, sizeof name, "stub_%s", symbol);
    *address = dlsym(RTLD_DEFAULT, name);
    if (ok) *ok = *address ? 0 : 1;
    return *address ? 0 : 500;
}
int stub_cuModuleLoadData(void **module, const char *ptx) {
    *module = (void *)(strstr(ptx, "ld.global.v4.u32") ? 0x16 : 0x4);
    printf("load %p\n", *module);
    return strstr(ptx, ".entry move_rows(") ? 0 : 218;
}
int stub_cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = module;
    return strcmp(name, "move_rows") ? 500 : 0;
}
int stub_cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                        void *stream, void **parameters, void **extra) {
    struct { uint64_t source, target; uint32_t pitches[2], width, height; } move;
    memcpy(&move, parameters[0], sizeof move);
    printf("launch %p grid %u %u %u block %u %u %u shared %u stream %p extra %p: "
           "%#lx %#lx %u %u %u %u\n", function, grid_x, grid_y, grid_z, block_x, block_y, block_z,
           shared, stream, extra, move.source, move.target, move.pitches[0], move.pitches[1],
           move.width, move.height);
    fflush(stdout);
    return grid_y == 7 ? 1 : 0;
}
"""

SCRIPT = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
from forcing_kv.runtime_trt.cuda.row_moves import PitchedMove, enqueue, launches
move = PitchedMove(0x7f0000001000, 0x7f0000002000, 512, 1024, 256, 3)
for moves in ([move, move], [move], [move] * 7):
    for launch in launches(moves):
        enqueue(launch, 0, 0x55)
"""


@pytest.mark.skipif(
    not importlib.util.find_spec("cuda"), reason="needs the Python package cuda-bindings"
)
@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler (cc)")
def test_the_driver_gets_the_table(tmp_path):
    driver = tmp_path / "libcuda.so.1"
    command = ["cc", "-xc", "-", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", driver]
    subprocess.run([*command, "-ldl"], input=DRIVER, text=True, check=True)
    command = [sys.executable, "-c", SCRIPT, str(driver)]
    done = subprocess.run(command, capture_output=True, text=True)
    launch = "launch 0x16 grid 1 {} 1 block 256 1 1 shared 0 stream 0x55 extra (nil): "
    move = "0x7f0000001000 0x7f0000002000 512 1024 256 3"
    # The kernel is loaded once.
    assert done.stdout.splitlines() == [
        "load 0x16", *(launch.format(count) + move for count in (2, 1, 7))
    ], done.stderr  # fmt: skip
    assert "cuLaunchKernel failed with CUDA_ERROR_INVALID_VALUE" in done.stderr
