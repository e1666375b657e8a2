"""What a launch of embedded PTX hands to the driver: the real cuda-bindings on a stub driver."""

import importlib.util
import shutil
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.skipif(
        not importlib.util.find_spec("cuda"), reason="needs the Python package cuda-bindings"
    ),
    pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler (cc)"),
]

# Prints every call. Refuses PTX without an entry point as the driver does, with error 218.
DRIVER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <stdint.h>
int cuGetProcAddress_v2(const char *symbol, void **address, int version, uint64_t flags, int *ok) {
    char name[256];
    snprintf(name, sizeof name, "stub_%s", symbol);
    *address = dlsym(RTLD_DEFAULT, name);
    if (ok) *ok = *address ? 0 : 1;
    return *address ? 0 : 500;
}
int stub_cuModuleLoadData(void **module, const char *ptx) {
    *module = (void *)0x11;
    return strstr(ptx, ".entry run(") ? 0 : 218;
}
int stub_cuModuleGetFunction(void **function, void *module, const char *name) {
    printf("function %s of %p\n", name, module);
    *function = (void *)0x22;
    return 0;
}
int stub_cuFuncSetAttribute(void *function, int attribute, int value) {
    printf("attribute %d of %p is %d\n", attribute, function, value);
    return 0;
}
int stub_cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                        void *stream, void **parameters, void **extra) {
    printf("launch %p grid %u %u %u block %u %u %u shared %u stream %p extra %p:", function,
           grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, extra);
    for (int i = 0; i < 3; i++) printf(" %#lx", *(unsigned long *)parameters[i]);
    printf("\n");
    return 0;
}
int stub_cuModuleUnload(void *module) {
    printf("unload %p\n", module);
    fflush(stdout);
    return 0;
}
"""

SCRIPT = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
from forcing_kv.plugins.compile.launch import Launch
from forcing_kv.plugins.compile.ptx import CompiledKernel
from forcing_kv.plugins.compile.ptx_launch import LoadedKernel

ptx = ".visible .entry run(" + ",".join(f".param .u64 p{i}" for i in range(3)) + ") {}"
launch = Launch(None, {}, (5, 6, 7), num_warps=4, num_stages=1)
with LoadedKernel(CompiledKernel("run", ptx, launch, int(sys.argv[2]), 90, (16, 4, 16))) as kernel:
    kernel.launch(eval(sys.argv[3]), 0x55)
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    target = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    command = ["cc", "-xc", "-", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", target]
    subprocess.run([*command, "-ldl"], input=DRIVER, text=True, check=True)
    return target


def launched(driver, shared_bytes, addresses, script=SCRIPT):
    arguments = [sys.executable, "-c", script, str(driver), str(shared_bytes), str(addresses)]
    return subprocess.run(arguments, capture_output=True, text=True)


def test_driver_gets_addresses_geometry_and_shared_memory_in_order(driver):
    done = launched(driver, 100 * 1024, [0x7F0000000010, 0x7F0000000020, 0x10])
    assert done.stdout.splitlines() == [
        "function run of 0x11",
        "attribute 8 of 0x22 is 102400",
        (
            "launch 0x22 grid 5 6 7 block 128 1 1 shared 102400 stream 0x55 extra (nil): "
            "0x7f0000000010 0x7f0000000020 0x10"
        ),
        "unload 0x11",
    ], done.stderr


def test_a_row_of_a_table_of_lengths_is_a_good_address(driver):
    assert " 0x10 0x3c 0x30" in launched(driver, 0, [16, 48 + 12, 48]).stdout


def test_shared_memory_that_every_device_grants_is_not_asked_for(driver):
    assert "attribute" not in launched(driver, 48 * 1024, [16, 32, 48]).stdout


@pytest.mark.parametrize(
    ("addresses", "message"),
    [
        ([16, 32], "run takes 3 addresses, found 2"),
        ([16, 36, 40], "address 2 is 0x28, which is not aligned to 16 bytes"),
        ([16, 34, 48], "address 1 is 0x22, which is not aligned to 4 bytes"),
    ],
)
def test_wrong_addresses_launch_nothing(driver, addresses, message):
    done = launched(driver, 0, addresses)
    assert message in done.stderr
    assert "launch" not in done.stdout
    assert "unload" in done.stdout


def test_ptx_that_the_driver_refuses_is_an_error(driver):
    done = launched(driver, 0, [16, 32, 48], SCRIPT.replace(".entry run(", ".entry run ("))
    assert "cuModuleLoadData failed with CUDA_ERROR_INVALID_PTX" in done.stderr
