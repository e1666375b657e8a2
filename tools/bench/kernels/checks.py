"""Whether the operators' kernels compute the right thing on this GPU: the suite's first item.

Every small case in bfloat16 by the tactic that the device takes, then the other tactics and dtypes
as far as the time goes: run, judged by the operator's tolerance class, then captured as a CUDA
graph and replayed, which must give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from forcing_kv.plugins.bind.triton_run import (
    compile_together,
    empty_outputs,
    multiprocessors,
    run_kernel,
)
from forcing_kv.plugins.check.accuracy import output_errors
from forcing_kv.plugins.check.cases import KERNEL_CASES, OpCase
from forcing_kv.plugins.compile.launch import Tactic, default_tactic
from forcing_kv.plugins.op_spec import OpSpec

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_COMPILED_TOGETHER = 32
"""Checks whose kernels are compiled at once."""


@dataclass(frozen=True)
class KernelCheck:
    """Verdict on one tactic for one case."""

    name: str
    """Operator, case, dtype and tactic."""
    passed: bool
    detail: str
    """What is wrong; empty if nothing is."""


def check_kernels(budget_s: float) -> Iterator[KernelCheck]:
    """Check the kernels, what matters most first; compiling them is what takes long.

    Args:
        budget_s: none is begun after this long.

    Yields:
        A verdict for each; tactics that need more shared memory than the device has are left out.
    """
    from triton.errors import TritonError
    from triton.runtime.errors import OutOfResources

    end = perf_counter() + budget_s
    checks = _in_order()
    for first in range(0, len(checks), _COMPILED_TOGETHER):
        if perf_counter() > end:
            return
        some = checks[first : first + _COMPILED_TOGETHER]
        with suppress(RuntimeError):  # After a crash of the device; the checks say so.
            compile_together([_call(*check) for check in some])
        for case, dtype, tactic in some:
            if perf_counter() > end:
                return
            try:
                yield _check(case, dtype, tactic)
            except OutOfResources:
                continue
            except (RuntimeError, TritonError) as error:
                yield KernelCheck(_name(case, dtype, tactic), False, f"does not run: {error}")


def _name(case: OpCase, dtype: torch.dtype, tactic: Tactic) -> str:
    return f"{case.spec.torch_name}, {case.name}, {dtype}, {tactic.name}".replace("torch.", "")


def device_tactics(spec: OpSpec) -> tuple[int, list[Tactic]]:
    """Compute capability of this GPU, and an operator's tactics that run on it."""
    major, minor = torch.cuda.get_device_capability()
    device_sm = 10 * major + minor
    return device_sm, [t for t in spec.module("kernel").TACTICS if t.runs_on(device_sm)]


def _in_order() -> list[tuple[OpCase, torch.dtype, Tactic]]:
    every = []
    for case in KERNEL_CASES:
        device_sm, tactics = device_tactics(case.spec)
        default = default_tactic(tactics, device_sm)
        every += [
            (rank, tactic is not default, case, dtype, tactic)
            for rank, dtype in enumerate(DTYPES)
            for tactic in tactics
        ]
    return [(c, d, t) for _, _, c, d, t in sorted(every, key=lambda entry: entry[:2])]


def _call(case: OpCase, dtype: torch.dtype, tactic: Tactic) -> tuple[Any, ...]:
    """Arguments of `run_kernel`."""
    inputs = case.build(dtype, device="cuda")
    outputs = empty_outputs(case.spec, inputs, case.attributes)
    return case.spec, inputs, case.attributes, outputs, tactic, multiprocessors(0)


def _check(case: OpCase, dtype: torch.dtype, tactic: Tactic) -> KernelCheck:
    call = _call(case, dtype, tactic)
    inputs, outputs = call[1], call[3]
    run = partial(run_kernel, *call)
    poison(outputs)
    run()
    errors = output_errors(case.spec, inputs, case.attributes, outputs)
    found = [f"{e.name} is off by {e.error:.3g}, allowed {e.allowed:.3g}" for e in errors
             if not e.passed]  # fmt: skip
    first = [output.clone() for output in outputs]
    poison(outputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    if not all(torch.equal(a, b) for a, b in zip(first, outputs, strict=True)):
        found.append("a replayed graph gives something else")
    return KernelCheck(_name(case, dtype, tactic), not found, "; ".join(found))


def poison(outputs: Sequence[Tensor]) -> None:
    """Fill outputs with what no kernel writes."""
    for output in outputs:
        output.fill_(float("nan") if output.is_floating_point() else -1)
