"""What `run_kernel` hands to the driver: Triton's own launcher for CUDA, on a stub driver."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs the package triton"),
    pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler (cc)"),
    pytest.mark.skipif(
        not Path(sysconfig.get_path("include"), "Python.h").is_file(), reason="needs Python.h"
    ),
]

WORKER = Path(__file__).parent / "stub_launch_worker.py"

# A device like an H100, and the calls of Triton's launcher. Prints every launch: as many parameters
# as the named kernel has, the two hidden ones among them.
DRIVER = r"""
#include "cuda.h"
#include <stdio.h>
#include <string.h>
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuGetErrorString(CUresult code, const char **text) { *text = "stub"; return 0; }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; return 0; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
    *value = 1024;
    if (which == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN) *value = 232448;
    if (which == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR) *value = 233472;
    if (which == CU_DEVICE_ATTRIBUTE_WARP_SIZE) *value = 32;
    return 0;
}
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return 0; }
CUresult cuCtxSetCurrent(CUcontext context) { return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return 0; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return 0; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return 0; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return 0; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)strdup(name);
    return 0;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
    *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return 0;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute which, int value) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return 0; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute which, CUdeviceptr address) {
    *(CUdeviceptr *)data = address;
    return 0;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters,
                          void **extra) {
    const char *name = (const char *)function;
    int count = strstr(name, "split") ? 13 : strstr(name, "attention") ? 11
              : strstr(name, "segment_similarity") ? 5 : 10;
    printf("launched %lu %u %u %u %u", (unsigned long)config->hStream, config->gridDimX,
           config->gridDimY, config->gridDimZ, config->blockDimX);
    for (int i = 0; i < count; i++) printf(" %lu", *(unsigned long *)parameters[i]);
    printf("\n");
    fflush(stdout);
    return 0;
}
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Lines of the worker and of the stub, in order."""
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    spec = importlib.util.find_spec("triton")
    headers = Path(spec.submodule_search_locations[0], "backends", "nvidia", "include")
    command = ["cc", "-xc", "-", "-shared", "-fPIC", f"-I{headers}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", library], input=DRIVER, text=True, check=True)
    paths = {"TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(library)],
        env={**os.environ, **paths, "LD_LIBRARY_PATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_every_kind_of_kernel_gets_its_tensors_and_no_other_memory_but_what_tma_is_lent(said):
    *said, _ = said
    launches = list(zip(said[::3], said[1::3], said[2::3], strict=True))
    assert len(launches) == 3 + 5
    for (_, *tactic), launched, wanted in launches:
        tma = int(tactic[-1])
        assert launched[0] == "launched"
        assert wanted[0] == "wanted"
        assert launched[1:-2] == wanted[1:], tactic
        lent, profiled = map(int, launched[-2:])
        assert bool(lent) == bool(tma), tactic
        assert profiled == 0


def test_kernels_compiled_together_are_not_compiled_again_and_a_broken_one_fails_at_its_launch(
    said,
):
    assert said[-1] == ["late", "0"]
