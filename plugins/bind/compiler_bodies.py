"""Bodies of the operators that PyTorch's compiler can look into, for `run_decompositions`.

An opaque operator would need this project at load time. On a CPU the compiler gets torch operators;
on CUDA our Triton kernels, which it compiles into the package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from forcing_kv.plugins.bind.torch_library import overload
from forcing_kv.plugins.compile.launch import Tactic
from forcing_kv.plugins.op_spec import DOMAIN, OpSpec, result_of
from forcing_kv.plugins.registry import NODES, OPS, STEADY_ATTENTION
from forcing_kv.plugins.steady_attention.cuda_body import KERNELS, steady_attention
from forcing_kv.runtime_trt.errors import InputError

Bodies = dict[Any, Callable[..., Any]]
"""Torch operator -> what replaces it."""

FIRST_TORCH_FOR_TMA = "2.13"
"""First PyTorch known to lend a package's kernels the memory of their tensor descriptors for every
thread block. 2.11 lends that of one block, and the others write behind it (`cpp_scratch` in
torch/_inductor/codegen/cuda/device_op_overrides.py)."""


def aten_bodies() -> Bodies:
    """Every operator in plain torch operators, without a host read."""
    return {overload(spec): _aten_body(spec) for spec in NODES}


def cuda_bodies(
    tactics: Mapping[str, str] = MappingProxyType({}), attention: str = "torch"
) -> Bodies:
    """Every operator as a launch of its Triton kernel, steady attention as named; for CUDA tensors.

    Args:
        tactics: tactic of an operator by its torch name; where none is named, the one measured for
            the call's problem on this device, or the device's default.
        attention: kernel of FkSteadyAttention, `torch` for the one that PyTorch chooses.

    Raises:
        InputError: no such operator or tactic, or a tactic that this PyTorch cannot package.
    """
    known = [spec.torch_name for spec in OPS]
    unknown = sorted(set(tactics) - set(known))
    if unknown:
        raise InputError(f"tactics name unknown operators {unknown}; there are {known}")
    bodies = {overload(s): _triton_operator(s, tactics.get(s.torch_name)) for s in OPS}
    named = attention in KERNELS
    steady = steady_attention(attention) if named else _aten_body(STEADY_ATTENTION)
    return bodies | {overload(STEADY_ATTENTION): steady}


def packaged_tactics(tactics: Sequence[Tactic]) -> list[Tactic]:
    """Those that AOTInductor of this PyTorch launches rightly."""
    lends = torch.torch_version.TorchVersion(torch.__version__) >= FIRST_TORCH_FOR_TMA
    return [tactic for tactic in tactics if lends or not tactic.tma]


def _aten_body(spec: OpSpec) -> Callable[..., Any]:
    """The reference, unless it reads the host and the operator has another body for compilers."""
    folder = f"forcing_kv.plugins.{spec.torch_name}"
    name = "aten_body" if importlib.util.find_spec(f"{folder}.aten_body") else "reference"
    return getattr(spec.module(name), spec.torch_name)


@cache
def _triton_operator(spec: OpSpec, tactic_name: str | None) -> Callable[..., Any]:
    """A torch operator that the compiler opens and whose kernel it compiles itself."""
    from forcing_kv.plugins.bind.triton_run import (
        accepted_inputs,
        empty_outputs,
        lend_memory,
        multiprocessors,
        problem_of,
        scratch_memory,
        tactic_for,
    )

    kernel = spec.module("kernel")
    tactics = {tactic.name: tactic for tactic in packaged_tactics(kernel.TACTICS)}
    if tactic_name is not None and tactic_name not in tactics:
        raise InputError(
            f"{spec.torch_name} has no tactic {tactic_name!r} for a package of PyTorch "
            f"{torch.__version__}; it has {list(tactics)}"
        )

    def launch(*arguments: Any) -> Any:
        inputs, attributes = spec.split_arguments(arguments)
        readable, strides = accepted_inputs(spec, inputs)
        outputs = empty_outputs(spec, readable, attributes)
        device = readable[0].device.index or 0
        problem = problem_of(spec, readable, attributes, multiprocessors(device))
        problem = replace(problem, row_strides=strides)
        tactic = (
            tactics[tactic_name]
            if tactic_name
            else tactic_for(spec, list(tactics.values()), problem, device)
        )
        plan = kernel.launch(problem, tactic)
        if tactic.tma:
            # For a call outside compiled code, which lends the memory itself.
            lend_memory(readable[0].device)
        torch.library.wrap_triton(plan.kernel)[plan.grid](
            *readable,
            *outputs,
            *scratch_memory(plan, readable[0].device),
            **plan.constants,
            **plan.options,
        )
        return result_of(outputs)

    # PyTorch reads the schema from the signature and ignores one that is given.
    single = len(spec.outputs) == 1
    returns = Tensor if single else tuple[(Tensor,) * len(spec.outputs)]  # type: ignore[misc]
    launch.__signature__ = spec.signature(Tensor, returns)  # type: ignore[attr-defined]
    name = "_".join((spec.torch_name, "triton", *((tactic_name,) if tactic_name else ())))
    return torch.library.triton_op(f"{DOMAIN}::{name}", launch, mutates_args=())
