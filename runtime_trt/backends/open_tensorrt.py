"""Opens the TensorRT or TensorRT-RTX engine of a bundle, everything checked first."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

from forcing_kv.runtime_trt.backends.chunk_graph import ChunkGraphBackend
from forcing_kv.runtime_trt.buffers import require_free_memory
from forcing_kv.runtime_trt.cuda import Cuda
from forcing_kv.runtime_trt.engine_record import EngineRecord
from forcing_kv.runtime_trt.errors import require
from forcing_kv.runtime_trt.flavours import (
    FLAVOURS,
    check_version,
    choose_record,
    find_records,
    nbytes_on_device,
)
from forcing_kv.runtime_trt.manifest import Manifest
from forcing_kv.runtime_trt.tensorrt_engine import LoadedPlans, TensorRtEngine


def checked_record(
    bundle: Path, manifest: Manifest, name: str, cuda: Cuda | None = None
) -> tuple[EngineRecord, Cuda, Any]:
    """Everything that can be known before a TensorRT runtime exists.

    Args:
        bundle: directory of the bundle.
        manifest: its manifest.
        name: tensorrt, tensorrt-lean or tensorrt-rtx.
        cuda: the device; the first GPU if None.

    Returns:
        The engine for this GPU, the device, and the module that runs it.

    Raises:
        BackendUnavailableError: no engine, driver, GPU, version or memory for it.
        BundleError: a plan is missing or altered.
        MissingDependencyError: the runtime is not installed.
    """
    flavour = FLAVOURS[name]
    records = find_records(bundle, manifest, flavour)
    trt = require(flavour.module, extra=flavour.extra)
    cuda = cuda or Cuda(extra=flavour.extra)
    record = choose_record(bundle, records, cuda.device)
    check_version(bundle, record, flavour, str(trt.__version__))
    record.check_files(bundle)
    needed = nbytes_on_device(record, manifest.config)
    require_free_memory(cuda, needed, f"{bundle} on {name}")
    return record, cuda, trt


def open_tensorrt(
    bundle: Path,
    manifest: Manifest,
    name: str,
    *,
    use_graphs: bool = True,
    cuda: Cuda | None = None,
) -> ChunkGraphBackend:
    """Open the engine that fits this GPU.

    Args:
        bundle: directory of the bundle.
        manifest: its manifest.
        name: tensorrt, tensorrt-lean or tensorrt-rtx.
        use_graphs: replay captured chunks.
        cuda: the device; the first GPU if None.

    Raises:
        ForcingKvError: see `checked_record`, or TensorRT refuses a plan; nothing is left allocated.
    """
    start = perf_counter()
    record, cuda, trt = checked_record(bundle, manifest, name, cuda)
    checked = perf_counter()
    engine = TensorRtEngine(LoadedPlans(FLAVOURS[name], trt, bundle, record))
    loaded = perf_counter()
    backend = ChunkGraphBackend(cuda, engine, manifest.config, record.graphs, use_graphs=use_graphs)
    backend.load_ms = {
        "check": 1e3 * (checked - start), "load plans": 1e3 * (loaded - checked), **backend.load_ms
    }  # fmt: skip
    return backend
