"""Opens the TensorRT or TensorRT-RTX engines of a bundle, everything checked first."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from forcing_kv.runtime_trt.bundle.engines import EngineRecord
from forcing_kv.runtime_trt.bundle.manifest import Bundle
from forcing_kv.runtime_trt.cuda.buffers import require_free_memory
from forcing_kv.runtime_trt.cuda.chunk_graph import ChunkGraphBackend
from forcing_kv.runtime_trt.cuda.runtime import Cuda
from forcing_kv.runtime_trt.decode.graph import GraphDecodeRunner, plan_decoder_memory
from forcing_kv.runtime_trt.errors import require
from forcing_kv.runtime_trt.tensorrt.engine import LoadedPlans, TensorRtEngine
from forcing_kv.runtime_trt.tensorrt.flavours import (
    FLAVOURS,
    check_version,
    choose_record,
    find_records,
    nbytes_on_device,
)


def fitting_record(
    bundle: Bundle, name: str, cuda: Cuda | None = None
) -> tuple[EngineRecord, Cuda, Any]:
    """The engine of this flavour for this GPU; its plans are not looked at.

    Args:
        name: tensorrt, tensorrt-lean or tensorrt-rtx.
        cuda: the device; the first GPU if None.

    Returns:
        The engine, the device, and the module that runs it.

    Raises:
        BackendUnavailableError: no engine, driver, GPU or version for it.
        BundleError: an engine is not of the bundle's graphs.
        MissingDependencyError: the runtime is not installed.
    """
    flavour = FLAVOURS[name]
    records = find_records(bundle.folder, bundle.manifest, flavour)
    trt = require(flavour.module, extra=flavour.extra)
    cuda = cuda or Cuda(extra=flavour.extra)
    record = choose_record(bundle.folder, records, cuda.device)
    check_version(bundle.folder, record, flavour, str(trt.__version__))
    return record, cuda, trt


def checked_record(
    bundle: Bundle, name: str, cuda: Cuda | None = None
) -> tuple[EngineRecord, Cuda, Any]:
    """Everything that can be known before a TensorRT runtime exists; see `fitting_record`.

    Raises:
        BackendUnavailableError: not enough memory for it.
        BundleError: a plan is missing or altered.
    """
    record, cuda, trt = fitting_record(bundle, name, cuda)
    bundle.check(record.hashes)
    needed = nbytes_on_device(record, bundle.manifest.config)
    require_free_memory(cuda, needed, f"{bundle} on {name}")
    return record, cuda, trt


def open_tensorrt(
    bundle: Bundle,
    name: str,
    *,
    use_graphs: bool = True,
    cuda: Cuda | None = None,
) -> ChunkGraphBackend:
    """Open the engine that fits this GPU.

    Args:
        name: tensorrt, tensorrt-lean or tensorrt-rtx.
        cuda: the device; the first GPU if None.

    Raises:
        ForcingKvError: see `checked_record`, or TensorRT refuses a plan; nothing is left allocated.
    """
    start = perf_counter()
    record, cuda, trt = checked_record(bundle, name, cuda)
    checked = perf_counter()
    engine = TensorRtEngine(LoadedPlans(FLAVOURS[name], trt, bundle, record))
    loaded = perf_counter()
    config = bundle.manifest.config
    backend = ChunkGraphBackend(cuda, engine, config, record.graphs, use_graphs=use_graphs)
    before = {"check": 1e3 * (checked - start), "load plans": 1e3 * (loaded - checked)}
    backend.load_ms = before | backend.load_ms
    return backend


def open_tensorrt_decoder(
    bundle: Bundle,
    kind: str,
    name: str,
    *,
    use_graphs: bool = True,
    cuda: Cuda | None = None,
) -> GraphDecodeRunner:
    """Open the engine of a decoder that fits this GPU; the denoiser's plans are not touched.

    Args:
        bundle: the decoder's own files are checked by the caller.
        kind: vae or tae.
        name: tensorrt, tensorrt-lean or tensorrt-rtx.
        cuda: the device; the first GPU if None.

    Raises:
        ForcingKvError: see `checked_record`, or the plans are of another decoder.
    """
    decoder = bundle.manifest.decoders[kind]
    shared, cuda, trt = fitting_record(bundle, name, cuda)
    record = shared.decoder(bundle.folder, kind, decoder.sha256)
    record.check_graphs(bundle.folder, decoder.graphs)
    bundle.check(record.hashes)
    buffers = plan_decoder_memory(record.graphs, record.scratch_nbytes)
    nbytes = record.weight_nbytes + buffers.nbytes
    require_free_memory(cuda, nbytes, f"the {kind} decoder of {bundle} on {name}")
    engine = TensorRtEngine(LoadedPlans(FLAVOURS[name], trt, bundle, record))
    return GraphDecodeRunner(cuda, engine, record.graphs, use_graphs=use_graphs)
