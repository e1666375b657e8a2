"""Checked CUDA calls without torch: every status is read, every failure says which call failed.

Addresses, streams, events and graphs are plain integers, so that a test double can stand in for
the whole class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from forcing_kv.runtime_trt.cuda.row_moves import PitchedMove, enqueue, launches
from forcing_kv.runtime_trt.errors import BackendUnavailableError, ForcingKvError, require

FIRST_DRIVERS = {12: 525, 13: 580}
"""First branch of NVIDIA's driver for each CUDA that cuda-bindings may be of (release notes of the
toolkit, minor version compatibility)."""

DRIVER_HINT = (
    "install NVIDIA's driver and check it with `nvidia-smi`, or choose --backend onnxruntime"
)


@dataclass(frozen=True)
class DeviceInfo:
    """One GPU and its driver."""

    name: str
    sm: int
    """Compute capability, major * 10 + minor."""
    num_sms: int
    """Streaming multiprocessors."""
    total_nbytes: int
    driver: str
    """Newest CUDA version that the driver supports, such as 13.0."""


class Cuda:
    """The CUDA runtime on one device, through `cuda.bindings.runtime`.

    Args:
        device: index of the GPU.
        extra: extra of `forcing-kv` that brings cuda-bindings, for the error message.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
        BackendUnavailableError: no driver, a driver that is too old, or no such GPU.
    """

    def __init__(self, device: int = 0, extra: str = "trt") -> None:
        self._rt: Any = require("cuda.bindings.runtime", extra=extra)
        self._index = device
        driver = self._call("cudaDriverGetVersion")
        built_for = self._call("cudaRuntimeGetVersion")
        if driver == 0:
            raise BackendUnavailableError(f"no NVIDIA driver was found here; {DRIVER_HINT}")
        if driver // 1000 < built_for // 1000:
            needed = built_for // 1000
            first = FIRST_DRIVERS.get(needed)
            raise BackendUnavailableError(
                f"the NVIDIA driver supports CUDA {_version(driver)}, but the installed "
                f"cuda-bindings needs CUDA {needed}, and no older one is supported; install "
                f"driver {first or 'of that CUDA'} or newer (on data-centre GPUs NVIDIA's package "
                f"cuda-compat-{needed}-0 beside the old driver will do), or choose --backend "
                "onnxruntime"
            )
        count = self._call("cudaGetDeviceCount")
        if device >= count:
            raise BackendUnavailableError(
                f"GPU {device} was asked for, but the driver reports {count}; set "
                "CUDA_VISIBLE_DEVICES"
            )
        self.bind_thread()
        properties = self._call("cudaGetDeviceProperties", device)
        self.device = DeviceInfo(
            properties.name.split(b"\0")[0].decode(),
            properties.major * 10 + properties.minor,
            properties.multiProcessorCount,
            properties.totalGlobalMem,
            _version(driver),
        )

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime.

        Raises:
            ForcingKvError: its status is not success.
        """
        status, *results = getattr(self._rt, function)(*arguments)
        if status != self._rt.cudaError_t.cudaSuccess:
            _, text = self._rt.cudaGetErrorString(status)
            raise CudaError(function, str(status.name), str(text.decode()))
        return results[0] if len(results) == 1 else tuple(results)

    def bind_thread(self) -> None:
        """Make the device current in the calling thread."""
        self._call("cudaSetDevice", self._index)

    def free_nbytes(self) -> int:
        """Device memory that is free now."""
        return int(self._call("cudaMemGetInfo")[0])

    def malloc(self, nbytes: int) -> int:
        """Allocate device memory, aligned to at least 256 bytes."""
        return int(self._call("cudaMalloc", nbytes))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def malloc_host(self, nbytes: int) -> int:
        return int(self._call("cudaMallocHost", nbytes))

    def free_host(self, address: int) -> None:
        self._call("cudaFreeHost", address)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy between any two places, in stream order."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDefault
        self._call("cudaMemcpyAsync", target, source, nbytes, kind, stream)

    def move_rows(self, moves: Sequence[PitchedMove], stream: int) -> None:
        """Copy between places on the device in one launch, so in no order among each other.

        The first call loads the kernel, which no capture allows; without moves that is all.
        """
        for each in launches(moves):
            enqueue(each, self._index, stream)

    def fill(self, address: int, value: int, nbytes: int, stream: int) -> None:
        """Set every byte, in stream order."""
        self._call("cudaMemsetAsync", address, value, nbytes, stream)

    def create_stream(self) -> int:
        """A stream that does not wait for the default stream."""
        flag = self._rt.cudaStreamNonBlocking
        return int(self._call("cudaStreamCreateWithFlags", flag))

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait on the host until the stream is idle."""
        self._call("cudaStreamSynchronize", stream)

    def create_event(self) -> int:
        """An event that can be timed."""
        return int(self._call("cudaEventCreateWithFlags", self._rt.cudaEventDefault))

    def destroy_event(self, event: int) -> None:
        self._call("cudaEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        """Mark this point of the stream."""
        self._call("cudaEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """Let the stream wait until the event's last record has passed."""
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def synchronize_event(self, event: int) -> None:
        """Wait on the host until the event's last record has passed."""
        self._call("cudaEventSynchronize", event)

    def elapsed_ms(self, start: int, end: int) -> float:
        """Time between two passed events."""
        return float(self._call("cudaEventElapsedTime", start, end))

    def begin_capture(self, stream: int) -> None:
        """Record what this thread enqueues, instead of running it."""
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        return int(self._call("cudaStreamEndCapture", stream))

    def graph_nodes(self, graph: int) -> Counter[str]:
        """Number of nodes of each kind: kernel, memcpy, memset, ..."""
        count = self._call("cudaGraphGetNodes", graph)[1]
        nodes, found = self._call("cudaGraphGetNodes", graph, count) if count else ([], 0)
        assert found == count, "the graph changed while it was read"
        prefix = "cudaGraphNodeType"
        kinds = (self._call("cudaGraphNodeGetType", node).name for node in nodes)
        return Counter(kind.removeprefix(prefix).lower() for kind in kinds)

    def instantiate(self, graph: int) -> int:
        return int(self._call("cudaGraphInstantiate", graph, 0))

    def upload(self, executable: int, stream: int) -> None:
        """Send an executable graph to the device in stream order, so that no launch has to."""
        self._call("cudaGraphUpload", executable, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cudaGraphDestroy", graph)

    def launch(self, executable: int, stream: int) -> None:
        self._call("cudaGraphLaunch", executable, stream)

    def destroy_executable(self, executable: int) -> None:
        self._call("cudaGraphExecDestroy", executable)


class CudaError(ForcingKvError):
    """A CUDA call failed; after most of these only a new process can use the GPU again."""

    def __init__(self, function: str, code: str, text: str) -> None:
        super().__init__(f"{function} failed with {code} ({text}){_HINTS.get(code, '')}")
        self.code = code


_HINTS = {
    "cudaErrorMemoryAllocation": "; free memory on this GPU (`nvidia-smi` lists who uses it)",
    "cudaErrorInsufficientDriver": f"; {DRIVER_HINT}",
    "cudaErrorNoDevice": f"; {DRIVER_HINT}",
}


def _version(number: int) -> str:
    """13000 -> 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"
