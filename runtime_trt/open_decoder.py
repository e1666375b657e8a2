"""Opens a bundle's video decoder on a backend, everything checked first."""

from __future__ import annotations

from pathlib import Path

from forcing_kv.runtime_trt.buffers import require_free_memory
from forcing_kv.runtime_trt.cuda import Cuda
from forcing_kv.runtime_trt.decode_runner import DecodeRunner, check_decoder_graphs
from forcing_kv.runtime_trt.engine_record import (
    FLAVOURS,
    EngineRecord,
    check_plans,
    check_version,
    choose_record,
    decoder_content,
    find_records,
)
from forcing_kv.runtime_trt.errors import InputError, require
from forcing_kv.runtime_trt.manifest import Manifest, check_decoder_files

_ONNXRUNTIME_DEVICES = {"onnxruntime": "cpu", "onnxruntime-cuda": "cuda"}

DECODE_BACKENDS = (*FLAVOURS, "inductor", *_ONNXRUNTIME_DEVICES)
"""Every backend that can run a decoder."""


def open_runner(
    bundle: Path,
    manifest: Manifest,
    kind: str,
    backend: str,
    *,
    num_threads: int = 0,
    use_graphs: bool = True,
) -> DecodeRunner:
    """Open a decoder's graphs; arguments and errors as `VideoDecoder.open`."""
    check_choice(bundle, manifest, kind, backend)
    info = manifest.decoders[kind]
    check_decoder_graphs(info, str(bundle))
    check_decoder_files(bundle, info)
    if backend in FLAVOURS:
        return open_tensorrt_decoder(bundle, manifest, kind, backend, use_graphs=use_graphs)
    if backend == "inductor":
        return _open_inductor(bundle, manifest, kind, use_graphs=use_graphs)
    from forcing_kv.runtime_trt.backends.decode_onnxruntime import OnnxRuntimeDecodeRunner

    device = _ONNXRUNTIME_DEVICES[backend]
    return OnnxRuntimeDecodeRunner(bundle, info.graphs, num_threads, device)


def check_choice(bundle: Path, manifest: Manifest, kind: str, backend: str) -> None:
    """Refuse what no machine could open.

    Raises:
        InputError: the bundle holds no such decoder, or there is no such backend.
    """
    if kind not in manifest.decoders:
        raise InputError(
            f"{bundle}: holds no {kind} decoder (it has {list(manifest.decoders)}); add one "
            f"with `fkv add-decoder {bundle} --{kind} FILE`"
        )
    if backend not in DECODE_BACKENDS:
        raise InputError(
            f"decode backend {backend!r} is unknown; choose one of {list(DECODE_BACKENDS)}"
        )


def open_tensorrt_decoder(
    bundle: Path,
    manifest: Manifest,
    kind: str,
    name: str,
    *,
    use_graphs: bool = True,
    cuda: Cuda | None = None,
) -> DecodeRunner:
    """Open the engine of a decoder that fits this GPU; the denoiser's plans are not touched.

    Args:
        bundle: directory of the bundle; the decoder's own files are checked by the caller.
        manifest: its manifest.
        kind: vae or tae.
        name: tensorrt, tensorrt-lean or tensorrt-rtx.
        use_graphs: replay captured graphs.
        cuda: the device; the first GPU if None.

    Raises:
        BackendUnavailableError: no engine, driver, GPU, version or memory for it.
        BundleError: a plan is missing, altered, or of another decoder.
        MissingDependencyError: the runtime is not installed.
    """
    from forcing_kv.runtime_trt.backends.decode_graph import GraphDecodeRunner, plan_decoder_memory
    from forcing_kv.runtime_trt.tensorrt_engine import LoadedPlans, TensorRtEngine

    flavour = FLAVOURS[name]
    records = find_records(bundle, manifest, flavour)
    trt = require(flavour.module, extra=flavour.extra)
    cuda = cuda or Cuda(extra=flavour.extra)
    shared = choose_record(records, cuda.device)
    check_version(shared, flavour, str(trt.__version__))
    record: EngineRecord = shared.decoder(kind, manifest.decoders[kind])
    check_plans(record)
    buffers = plan_decoder_memory(record.graphs, record.scratch_nbytes)
    needed = record.weight_nbytes + buffers.nbytes
    require_free_memory(cuda, needed, f"the {kind} decoder of {bundle} on {name}")
    engine = TensorRtEngine(LoadedPlans(flavour, trt, record))
    return GraphDecodeRunner(cuda, engine, record.graphs, use_graphs=use_graphs)


def _open_inductor(
    bundle: Path, manifest: Manifest, kind: str, *, use_graphs: bool
) -> DecodeRunner:
    from forcing_kv.runtime_trt.backends import inductor_record
    from forcing_kv.runtime_trt.backends.open_inductor import open_package

    record = inductor_record(bundle, manifest)
    content = decoder_content(bundle, record, kind, manifest.decoders[kind])
    package = open_package(bundle, content)
    if package.device.type == "cpu":
        from forcing_kv.runtime_trt.backends.decode_inductor import InductorDecodeRunner

        return InductorDecodeRunner(package)
    from forcing_kv.runtime_trt.backends.decode_graph import GraphDecodeRunner
    from forcing_kv.runtime_trt.inductor_engine import InductorEngine

    cuda = Cuda(package.device.index or 0, extra="inductor")
    engine = InductorEngine(package)
    return GraphDecodeRunner(cuda, engine, package.graphs, use_graphs=use_graphs)
