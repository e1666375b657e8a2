"""Launches kernels by Triton's own launcher on a stub driver, and says what came of it.

Usage: python stub_launch_worker.py LIBRARY, where LIBRARY is the stub, a libcuda.so.1. For every
kernel it prints the addresses that it must receive and its geometry; the stub prints what it does.
All kernels are compiled before, among them one that cannot be; at the end it prints how many were
compiled nevertheless, if the launch of that one says so.
"""

import ctypes
import os
import sys
from pathlib import Path

import torch
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler.errors import CompilationError
from triton.runtime import driver

from forcing_kv.plugins.bind import triton_run
from forcing_kv.plugins.bind.triton_run import (
    compile_together,
    empty_outputs,
    problem_of,
    run_kernel,
    scratch_memory,
)
from forcing_kv.plugins.check.cases import KERNEL_CASES
from forcing_kv.plugins.compile.launch import Tactic
from forcing_kv.plugins.registry import HEAD_INDEXED_ATTENTION, OPS

NUM_SMS = 3
STREAM = 0x55


def tactics(spec):
    """The first of every kind."""
    kinds = {}
    for tactic in spec.module("kernel").TACTICS:
        kinds.setdefault((tactic.schedule, tactic.tma), tactic)
    return kinds.values()


def cubins():
    return Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin")


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
    calls = []
    for spec in OPS:
        case = [case for case in KERNEL_CASES if case.spec is spec][-1]
        inputs = case.build(torch.bfloat16)
        outputs = empty_outputs(spec, inputs, case.attributes)
        calls += [(spec, inputs, case.attributes, outputs, t, NUM_SMS) for t in tactics(spec)]
    attention = next(call for call in calls if call[0] is HEAD_INDEXED_ATTENTION)
    broken = (*attention[:4], Tactic("broken", 4, blocks={"Q": 48, "K": 32}), NUM_SMS)
    compile_together([broken, *calls])
    compiled = set(cubins())
    for spec, inputs, attributes, outputs, tactic, num_sms in calls:
        scratch.clear()
        print("tactic", spec.torch_name, tactic.name, int(tactic.tma), flush=True)
        run_kernel(spec, inputs, attributes, outputs, tactic, num_sms)
        plan = spec.module("kernel").launch(problem_of(spec, inputs, attributes, num_sms), tactic)
        addresses = [tensor.data_ptr() for tensor in (*inputs, *outputs, *scratch)]
        print("wanted", STREAM, *plan.grid, 32 * plan.num_warps, *addresses, flush=True)
    assert len(compiled) == len(calls)
    try:
        run_kernel(*broken)
    except CompilationError:
        print("late", len(set(cubins()) - compiled))


if __name__ == "__main__":
    main()
