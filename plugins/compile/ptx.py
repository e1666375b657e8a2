"""Compiles an operator's kernel to PTX, on any machine, in the form that TensorRT embeds.

Triton appends two hidden parameters to every kernel, pointers to scratch memory, which a launch by
anybody else than Triton does not pass. They are unread when the scratch sizes are 0; that is
checked and they are removed, so that the parameters are the operator's inputs and outputs and
nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forcing_kv.plugins.compile.launch import (
    FIRST_TMA_SM,
    NEWER_PTX_VERSIONS,
    PTX_VERSION,
    SHARED_LIMIT_BYTES,
    Launch,
    Problem,
    PtxError,
    SharedMemoryError,
    Tactic,
)
from forcing_kv.plugins.op_spec import WIDE_ALIGNMENT, OpSpec
from forcing_kv.runtime_trt.dtypes import DTYPES
from forcing_kv.runtime_trt.errors import require

_NUM_HIDDEN = 2
_PARAMETER = re.compile(r"\.param\s+\.u64\s+(?:\.ptr\s+\.\w+\s+(?:\.align\s+\d+\s+)?)?(\w+)")


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel ready to be launched with the operator's inputs and outputs as its parameters.

    That of a tactic for PyTorch alone takes memory behind them: what its launch names and, for TMA,
    Triton's hidden parameters.
    """

    name: str
    ptx: str
    """PTX text, hidden parameters removed unless they are for TMA."""
    launch: Launch
    shared_bytes: int
    """Dynamic shared memory of a thread block."""
    sm: int
    """Compute capability that it was compiled for, 90 for 9.0."""
    alignments: tuple[int, ...]
    """Bytes that each parameter's address must be a multiple of; TMA's hidden ones aside."""

    @property
    def arch(self) -> str:
        """Target as the PTX assembler names it."""
        return f"sm_{self.sm}a" if self.sm >= 90 else f"sm_{self.sm}"

    @property
    def block_threads(self) -> int:
        return self.launch.num_warps * 32


def tensor_dtypes(spec: OpSpec, dtype: str) -> tuple[str, ...]:
    """Dtypes of the inputs and then the outputs in a compute dtype, weights in float32."""
    known = {"T": dtype, "W": "float32"}
    return tuple(known.get(each.dtype, each.dtype) for each in (*spec.inputs, *spec.outputs))


def compile_kernel(
    spec: OpSpec,
    problem: Problem,
    dtypes: Sequence[str],
    tactic: Tactic,
    device_sm: int,
) -> CompiledKernel:
    """Compile one tactic for one device; needs no GPU.

    Args:
        dtypes: dtypes of the inputs and then the outputs, see `tensor_dtypes`.
        device_sm: compute capability of the device, 90 for 9.0.

    Returns:
        The kernel for `tactic.target_sm(device_sm)`.

    Raises:
        SharedMemoryError: it takes more shared memory than the tactic may on the device, or TMA
            that the device does not have.
        MissingDependencyError: Triton is not installed.
        PtxError: it wants scratch memory or has other parameters than the operator.
        ValueError: the device is not supported.
    """
    if device_sm not in SHARED_LIMIT_BYTES:
        raise ValueError(
            f"no kernels for compute capability {device_sm}; supported are "
            f"{sorted(SHARED_LIMIT_BYTES)}"
        )
    plan = spec.module("kernel").launch(problem, tactic)
    pointers = _pointers(spec, plan, dtypes, tactic)
    target_sm = tactic.target_sm(device_sm)
    where = f"{spec.name}, tactic {tactic.name}, sm_{target_sm}"
    if not tactic.runs_on(device_sm):
        raise SharedMemoryError(f"{where}: needs compute capability {FIRST_TMA_SM}")
    alignments = tuple(tensor.alignment for tensor in (*spec.inputs, *spec.outputs))
    alignments += (WIDE_ALIGNMENT,) * len(plan.scratch)
    compiled = _compile(plan, pointers, alignments, target_sm)
    metadata = compiled.metadata
    if metadata.profile_scratch_size or (metadata.global_scratch_size and not tactic.tma):
        raise PtxError(f"{where}: the kernel wants hidden memory, which a plugin cannot give")
    limit = tactic.shared_limit(device_sm)
    if metadata.shared > limit:
        raise SharedMemoryError(
            f"{where}: takes {metadata.shared} bytes of shared memory, {limit} are allowed"
        )
    ptx = compiled.asm["ptx"]
    if not tactic.tma:
        ptx = strip_hidden_parameters(ptx, metadata.name, len(pointers), where)
    if re.search(r"^\s*\.(file|loc|section)\b", ptx, re.MULTILINE):
        raise PtxError(f"{where}: the PTX carries debug information, which may hold paths")
    return CompiledKernel(metadata.name, ptx, plan, metadata.shared, target_sm, alignments)


def _pointers(spec: OpSpec, plan: Launch, dtypes: Sequence[str], tactic: Tactic) -> dict[str, str]:
    """The kernel's pointers with Triton's types: inputs, outputs, and memory that it asks for."""
    dtypes = (*dtypes, *(scratch.dtype for scratch in plan.scratch))
    names = plan.kernel.arg_names[: len(dtypes)]
    expected = [f"{tensor.name}_ptr" for tensor in (*spec.inputs, *spec.outputs)]
    expected += [f"{scratch.name}_ptr" for scratch in plan.scratch]
    takes_memory = bool(plan.scratch) or tactic.tma
    assert takes_memory == tactic.torch_only, f"{tactic.name} takes {plan.scratch}"
    assert names == expected, f"{spec.name}: the kernel takes {names}, not {expected}"
    return dict(zip(names, (f"*{DTYPES[dtype].triton}" for dtype in dtypes), strict=True))


def _compile(
    plan: Launch, pointers: Mapping[str, str], alignments: Sequence[int], target_sm: int
) -> Any:
    """Triton's compiled kernel."""
    triton = require("triton")
    compiler = require("triton.compiler")
    gpu_target = require("triton.backends.compiler").GPUTarget
    signature = {**pointers, **dict.fromkeys(plan.constants, "constexpr")}
    # It buys wide loads.
    aligned = {(i,): [["tt.divisibility", nbytes]] for i, nbytes in enumerate(alignments)}
    ptx_version = NEWER_PTX_VERSIONS.get(target_sm, PTX_VERSION)
    with triton.knobs.compilation.scope():
        # Line information would carry this machine's paths into the engine.
        triton.knobs.compilation.disable_line_info = True
        return triton.compile(
            compiler.ASTSource(plan.kernel, signature, dict(plan.constants), aligned),
            target=gpu_target("cuda", target_sm, 32),
            options={**plan.options, "ptx_version": ptx_version},
        )


def entry_parameters(ptx: str, name: str) -> tuple[str, ...]:
    """Names of the entry point's parameters, in order.

    Raises:
        PtxError: there is no such entry point, or a parameter is not a 64-bit pointer.
    """
    listing = _parameter_list(ptx, name)
    found = tuple(_PARAMETER.findall(listing))
    if len(found) != listing.count(".param"):
        raise PtxError(f"{name}: a parameter is not a 64-bit pointer:{listing}")
    return found


def strip_hidden_parameters(ptx: str, name: str, num_visible: int, where: str) -> str:
    """Remove Triton's hidden parameters from the entry point.

    Args:
        ptx: PTX as Triton wrote it.
        num_visible: parameters that the operator has.

    Returns:
        PTX whose entry point has `num_visible` parameters.

    Raises:
        PtxError: the number of hidden parameters is not the known one, or one of them is read.
    """
    parameters = entry_parameters(ptx, name)
    hidden = parameters[num_visible:]
    if len(hidden) != _NUM_HIDDEN:
        raise PtxError(
            f"{where}: {len(parameters)} parameters, expected {num_visible} and {_NUM_HIDDEN} "
            "hidden ones; this Triton is not a version that this code knows"
        )
    listing = _parameter_list(ptx, name)
    visible = ",".join(listing.split(",")[:num_visible]) + "\n"
    body = ptx.replace(listing, "", 1)
    read = [parameter for parameter in hidden if re.search(rf"\b{parameter}\b", body)]
    if read:
        raise PtxError(f"{where}: the kernel reads its hidden parameters {read}")
    return ptx.replace(listing, visible, 1)


def _parameter_list(ptx: str, name: str) -> str:
    """Text between the parentheses of the entry point."""
    match = re.search(rf"\.entry\s+{re.escape(name)}\s*\(([^)]*)\)", ptx)
    if match is None:
        raise PtxError(f"the PTX has no entry point {name}")
    return match.group(1)
