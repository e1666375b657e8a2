"""Runs an operator's kernel on torch tensors, by Triton's own launcher."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from forcing_kv.plugins.compile.launch import Launch, Problem, Tactic
from forcing_kv.plugins.compile.tuning import best_tactic
from forcing_kv.plugins.op_spec import Attributes, OpSpec
from forcing_kv.runtime_trt.dtypes import dtype_name


@cache
def multiprocessors(device: int) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def problem_of(
    spec: OpSpec, inputs: Sequence[Tensor], attributes: Attributes, num_sms: int
) -> Problem:
    """The static part of a call.

    Raises:
        ValueError: an input's shape is not what the specification says.
    """
    shapes = [tuple(x.shape) for x in inputs]
    spec.check(shapes, attributes)
    compute = spec.compute_dtype([x.dtype for x in inputs])
    sizes = spec.read_sizes(shapes, attributes)
    return Problem(sizes, attributes, dtype_name(compute), num_sms)


def accepted_inputs(spec: OpSpec, inputs: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, int]]:
    """Inputs as the operator's kernel can read them: dense, or with rows apart where it takes that.

    Args:
        inputs: tensors of the specification's inputs; copied where the kernel cannot read them.

    Returns:
        The inputs, and the row strides (in elements) of those whose rows are not dense.
    """
    takes = getattr(spec.module("kernel"), "ROW_STRIDED_INPUTS", ())
    strides = {
        tensor.name: x.stride(0)
        for tensor, x in zip(spec.inputs, inputs, strict=True)
        if tensor.name in takes and not x.is_contiguous() and _has_apart_rows(x)
    }
    readable = [
        x if tensor.name in strides else x.contiguous()
        for tensor, x in zip(spec.inputs, inputs, strict=True)
    ]
    return readable, strides


def _has_apart_rows(x: Tensor) -> bool:
    """Whether x [N, C] has dense rows that begin at multiples of 16 bytes from one another."""
    return x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.stride(0) > 0


def torch_output_dtypes(spec: OpSpec, inputs: Sequence[Tensor]) -> tuple[torch.dtype, ...]:
    """Dtypes of the outputs of a call."""
    return spec.output_dtypes([x.dtype for x in inputs], lambda name: getattr(torch, name))


def empty_outputs(
    spec: OpSpec, inputs: Sequence[Tensor], attributes: Attributes
) -> tuple[Tensor, ...]:
    """Uninitialised outputs on the inputs' device."""
    shapes = spec.output_shapes([x.shape for x in inputs], attributes)
    dtypes = torch_output_dtypes(spec, inputs)
    return tuple(
        inputs[0].new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
    )


def scratch_memory(plan: Launch, device: torch.device) -> tuple[Tensor, ...]:
    """What a kernel wants for one launch; not shared with any other."""
    return tuple(
        (torch.zeros if scratch.zeroed else torch.empty)(
            scratch.shape, dtype=getattr(torch, scratch.dtype), device=device
        )
        for scratch in plan.scratch
    )


def lend_memory(device: torch.device) -> None:
    """Let Triton's launcher take a kernel's hidden memory from PyTorch, from now on."""
    import triton

    def allocate(nbytes: int, alignment: int, stream: int | None) -> Tensor:
        # PyTorch aligns to 512 bytes, Triton asks for 128. What is freed before the kernel has run
        # goes to later work of the same stream alone.
        return torch.empty(nbytes, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)


def plan_call(
    spec: OpSpec,
    inputs: Sequence[Tensor],
    attributes: Attributes,
    outputs: Sequence[Tensor],
    tactic: Tactic,
    num_sms: int,
) -> tuple[Launch, tuple[Tensor, ...]]:
    """How `run_kernel` launches, and with which tensors."""
    readable, strides = accepted_inputs(spec, inputs)
    problem = replace(problem_of(spec, inputs, attributes, num_sms), row_strides=strides)
    plan = spec.module("kernel").launch(problem, tactic)
    return plan, (*readable, *outputs, *scratch_memory(plan, inputs[0].device))


def run_kernel(
    spec: OpSpec,
    inputs: Sequence[Tensor],
    attributes: Attributes,
    outputs: Sequence[Tensor],
    tactic: Tactic,
    num_sms: int,
) -> None:
    """Launch an operator's kernel on the current stream.

    Args:
        inputs: tensors of the specification's inputs; copied if the kernel cannot read them.
        outputs: contiguous tensors of the specification's outputs; written.
        num_sms: multiprocessors to schedule for.
    """
    plan, tensors = plan_call(spec, inputs, attributes, outputs, tactic, num_sms)
    if tactic.tma:
        lend_memory(inputs[0].device)
    plan.kernel[plan.grid](*tensors, **plan.constants, **plan.options)


def compile_together(calls: Iterable[tuple[Any, ...]]) -> None:
    """Compile the kernels of several calls at once, on all cores of the host.

    Their launches find them in Triton's cache. What does not compile is left to its launch, which
    says why.

    Args:
        calls: arguments of `run_kernel`.
    """
    import triton

    plans = [plan_call(*call) for call in calls]
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for plan, tensors in plans:
            plan.kernel.warmup(*tensors, grid=plan.grid, **plan.constants, **plan.options)
    for plan, _ in plans:
        # Kernels in memory may be ones that failed; those on the disk are whole.
        plan.kernel.device_caches.clear()


def tactic_for(spec: OpSpec, tactics: Sequence[Tactic], problem: Problem, device: int) -> Tactic:
    """Which of `tactics` to launch on a CUDA device: the fastest measured, or the default one."""
    major, minor = torch.cuda.get_device_capability(device)
    gpu = torch.cuda.get_device_name(device)
    return best_tactic(spec, tactics, problem, gpu, 10 * major + minor)


def run_on_cuda(spec: OpSpec, *arguments: Any) -> tuple[Tensor, ...]:
    """The operator on CUDA tensors."""
    inputs, attributes = spec.split_arguments(arguments)
    outputs = empty_outputs(spec, inputs, attributes)
    device = inputs[0].device.index or 0
    num_sms = multiprocessors(device)
    tactics = spec.module("kernel").TACTICS
    tactic = tactic_for(spec, tactics, problem_of(spec, inputs, attributes, num_sms), device)
    with torch.cuda.device(device):
        run_kernel(spec, inputs, attributes, outputs, tactic, num_sms)
    return outputs
