"""Memory and energy of the device, as far as it tells them."""

from __future__ import annotations

from typing import Any

from forcing_kv.runtime_trt.console import talk
from forcing_kv.runtime_trt.errors import MissingDependencyError, require
from forcing_kv.runtime_trt.rollout.ports import kv_names
from forcing_kv.runtime_trt.session import Session


def reset_peak_memory(device: str) -> None:
    """Forget the peak so far."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(device: str) -> dict[str, int]:
    """Bytes in use on the whole device, and PyTorch's peak; the process's peak on a CPU."""
    if device == "cpu":
        import resource

        return {"process_peak_nbytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    import torch

    free, total = torch.cuda.mem_get_info()
    return {
        "device_used_nbytes": total - free,
        "torch_peak_nbytes": torch.cuda.max_memory_allocated(),
    }


def kv_nbytes(session: Session) -> dict[str, int]:
    """Bytes of the buffers that hold self-attention's keys and values, measured on the buffers.

    Returns:
        `kv_history_nbytes` for the past, and `kv_nbytes` with the running chunk's own rows, which a
        dense cache holds in the same buffer, and those that an eviction hands to the commit where
        they have memory of their own.
    """
    backend: Any = session.backend
    if hasattr(backend, "nbytes_kv"):
        history, own = int(backend.nbytes_kv), int(backend.nbytes_own)
    else:
        layers = range(session.config.model.num_layers)
        history, own, selected = (
            sum(_buffer_nbytes(backend, name) for name in names)
            for names in (
                kv_names("hist", layers),
                kv_names("new", layers),
                kv_names("dyn", session.config.evicted_layers),
            )
        )
        own += selected
    return {"kv_history_nbytes": history, "kv_nbytes": history + own}


def _buffer_nbytes(backend: Any, name: str) -> int:
    """Bytes of one named buffer of a runtime backend."""
    for holder in ("buffers", "tensors"):
        if hasattr(backend, holder):
            return int(getattr(backend, holder)[name].nbytes)
    specs = backend.memory.plan.specs
    return int(specs[name].nbytes) if name in specs else 0


class EnergyMeter:
    """Energy that the GPU used since this object was made, by NVML's counter."""

    def __init__(self, device: str) -> None:
        self._read: Any = None
        if device != "cuda":
            return
        try:
            nvml = require("pynvml")
        except MissingDependencyError as error:
            talk(f"energy is not measured: {error}")
            return
        try:
            nvml.nvmlInit()
            handle = nvml.nvmlDeviceGetHandleByIndex(0)
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except nvml.NVMLError as error:
            talk(f"energy is not measured: the driver does not tell it ({error})")
            return
        self._read = lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        self._start = self._read()

    def joules(self) -> float | None:
        """Joules so far; None where NVML does not say."""
        return None if self._read is None else (self._read() - self._start) / 1e3
