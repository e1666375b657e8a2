"""Launches kernels by Triton's own launcher on a stub driver, and says what came of it.

Usage: python stub_launch_worker.py LIBRARY, where LIBRARY is the stub, a libcuda.so.1. For every
kernel it prints the addresses that it must receive and its geometry; the stub prints what it does.
"""

import ctypes
import sys

import torch
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

from forcing_kv.plugins import triton_run
from forcing_kv.plugins.cases import cases_of
from forcing_kv.plugins.registry import OPS, op_module
from forcing_kv.plugins.triton_run import empty_outputs, problem_of, run_kernel, scratch_memory

NUM_SMS = 3
STREAM = 0x55


def tactics(spec):
    """The first of every kind."""
    kinds = {}
    for tactic in op_module(spec, "kernel").TACTICS:
        kinds.setdefault((tactic.schedule, tactic.tma), tactic)
    return kinds.values()


def main() -> None:
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    device = CudaDriver()
    device.get_current_device = lambda: 0
    device.get_current_stream = lambda index: STREAM
    device.get_device_capability = lambda index: (9, 0)
    driver.set_active(device)
    scratch = []

    def remember(plan, where):
        scratch[:] = scratch_memory(plan, where)
        return scratch

    triton_run.scratch_memory = remember
    for spec in OPS:
        case = cases_of(spec)[-1]
        inputs = case.build(torch.bfloat16)
        outputs = empty_outputs(spec, inputs, case.attributes)
        for tactic in tactics(spec):
            scratch.clear()
            print("tactic", spec.torch_name, tactic.name, int(tactic.tma), flush=True)
            run_kernel(spec, inputs, case.attributes, outputs, tactic, NUM_SMS)
            problem = problem_of(spec, inputs, case.attributes, NUM_SMS)
            plan = op_module(spec, "kernel").launch(problem, tactic)
            addresses = [tensor.data_ptr() for tensor in (*inputs, *outputs, *scratch)]
            print("wanted", STREAM, *plan.grid, 32 * plan.num_warps, *addresses, flush=True)


if __name__ == "__main__":
    main()
