"""Launches compiled PTX as TensorRT would: inputs, then outputs, and no Triton and no torch.

The proof that what is embedded in an engine computes what the kernel computes, and a way to run the
kernels from a process that has only cuda-bindings.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from forcing_kv.plugins.compile.launch import SAFE_SHARED_BYTES
from forcing_kv.plugins.compile.ptx import CompiledKernel, entry_parameters
from forcing_kv.runtime_trt.errors import BackendUnavailableError, require


class LoadedKernel:
    """A compiled kernel, loaded into the current CUDA context; use it as a context manager.

    Leaving the context unloads the kernel: wait for its launches before.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
        BackendUnavailableError: the driver refuses the PTX, or a CUDA call fails.
    """

    def __init__(self, kernel: CompiledKernel) -> None:
        self._driver: Any = require("cuda.bindings.driver")
        self._kernel = kernel
        self._num_parameters = len(entry_parameters(kernel.ptx, kernel.name))
        self._module = self._call("cuModuleLoadData", kernel.ptx.encode() + b"\0")
        self._function = self._call("cuModuleGetFunction", self._module, kernel.name.encode())
        if kernel.shared_bytes > SAFE_SHARED_BYTES:
            attribute = (
                self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            )
            self._call("cuFuncSetAttribute", self._function, attribute, kernel.shared_bytes)

    def __enter__(self) -> LoadedKernel:
        return self

    def __exit__(self, *_: object) -> None:
        self._call("cuModuleUnload", self._module)

    def launch(self, addresses: Sequence[int], stream: int) -> None:
        """Enqueue the kernel.

        Args:
            addresses: device addresses of the inputs and then the outputs, each contiguous and
                aligned as the operator's contract says (`TensorSpec.alignment`).
            stream: CUDA stream; nothing is waited for.

        Raises:
            ValueError: the number of addresses or the alignment of one is wrong.
            BackendUnavailableError: the launch fails.
        """
        if len(addresses) != self._num_parameters:
            raise ValueError(
                f"{self._kernel.name} takes {self._num_parameters} addresses, found "
                f"{len(addresses)}"
            )
        for place, (address, nbytes) in enumerate(
            zip(addresses, self._kernel.alignments, strict=False)
        ):
            if address % nbytes:
                raise ValueError(
                    f"{self._kernel.name}: address {place} is {address:#x}, which is not aligned "
                    f"to {nbytes} bytes"
                )
        types = (ctypes.c_void_p,) * len(addresses)
        self._call(
            "cuLaunchKernel",
            self._function,
            *self._kernel.launch.grid,
            *(self._kernel.block_threads, 1, 1),
            self._kernel.shared_bytes,
            stream,
            (tuple(addresses), types),
            0,
        )

    def _call(self, function: str, *arguments: Any) -> Any:
        status, *results = getattr(self._driver, function)(*arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise BackendUnavailableError(f"{function} failed with {status.name}")
        return results[0] if results else None
