"""Arithmetic and traffic of the operators: what a time is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from forcing_kv.plugins.check.cases import OpCase
from forcing_kv.plugins.op_spec import TensorSpec
from forcing_kv.plugins.registry import HEAD_INDEXED_ATTENTION, SEGMENT_SIMILARITY
from forcing_kv.runtime_trt.dtypes import DTYPES


def flops(case: OpCase) -> int:
    """Floating-point operations of the matrix products; 0 where traffic is what counts."""
    if case.spec is not HEAD_INDEXED_ATTENTION:
        return 0
    sizes, new_len = case.sizes, case.integers["new_len"][0]
    keys = sum(case.integers["hist_len"]) + sizes["H"] * new_len
    return 4 * sizes["N"] * keys * sizes["D"]


def traffic_nbytes(case: OpCase, dtype: str) -> int:
    """Bytes that must be read and written at least once.

    Args:
        case: the call.
        dtype: compute dtype.
    """
    sizes, item = case.sizes, DTYPES[dtype].nbytes
    shapes = [tensor.shape(sizes) for tensor in case.spec.inputs]
    full = case.spec.read_sizes(shapes, case.attributes)
    if case.spec is SEGMENT_SIMILARITY:
        return int((full["F"] + 1) * full["T"] * full["G"] * full["D"] * item)
    if case.spec.torch_name == "similarity_eviction":
        # Keys and values, each read once and written once.
        return int(4 * full["G"] * full["M"] * full["S"] * full["D"] * item)
    if case.spec is HEAD_INDEXED_ATTENTION:
        keys = sum(case.integers["hist_len"]) + sizes["H"] * case.integers["new_len"][0]
        return 2 * (keys + sizes["H"] * sizes["N"]) * sizes["D"] * item
    dtypes = [{"T": dtype, "W": "float32"}.get(t.dtype, t.dtype) for t in _tensors(case)]
    return sum(
        prod(shape) * DTYPES[kind].nbytes
        for shape, kind in zip([*shapes, *case.output_shapes()], dtypes, strict=True)
    )


def _tensors(case: OpCase) -> Sequence[TensorSpec]:
    return (*case.spec.inputs, *case.spec.outputs)
