"""Opens a bundle's video decoder on a backend, everything checked first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forcing_kv.runtime_trt.buffers import require_free_memory
from forcing_kv.runtime_trt.cuda import Cuda
from forcing_kv.runtime_trt.decoder import DecodeRunner, VideoDecoder, check_decoder_graphs
from forcing_kv.runtime_trt.errors import (
    BackendUnavailableError,
    InputError,
    MissingDependencyError,
    require,
)
from forcing_kv.runtime_trt.flavours import (
    FLAVOURS,
    check_version,
    choose_record,
    find_records,
)
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


def follow_session(
    bundle: Path, manifest: Manifest, kind: str, session_backend: str, **options: Any
) -> VideoDecoder:
    """Open a decoder on the session's backend if the bundle has an engine of it that runs here.

    Otherwise it is ONNX Runtime on the CPU, and `chosen_because` says why. An engine of another
    decoder is an error all the same.

    Args:
        bundle: directory of the bundle.
        manifest: its manifest.
        kind: vae or tae.
        session_backend: name of the backend that makes the latents.
        options: those of `VideoDecoder.open`.

    Raises:
        InputError: the bundle holds no such decoder.
        BundleError: a file is missing or altered, or the engine is of another decoder.
    """
    reason = "as the session"
    if session_backend in DECODE_BACKENDS:
        try:
            decoder = VideoDecoder.open(bundle, manifest, kind, session_backend, **options)
        except (BackendUnavailableError, MissingDependencyError) as error:
            reason = f"{session_backend}: {error}"
        else:
            decoder.chosen_because = reason
            return decoder
    decoder = VideoDecoder.open(bundle, manifest, kind, "onnxruntime", **options)
    decoder.chosen_because = reason
    return decoder


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
    shared = choose_record(bundle, records, cuda.device)
    check_version(bundle, shared, flavour, str(trt.__version__))
    record = shared.decoder(bundle, kind, manifest.decoders[kind].sha256)
    record.check_files(bundle)
    buffers = plan_decoder_memory(record.graphs, record.scratch_nbytes)
    needed = record.weight_nbytes + buffers.nbytes
    require_free_memory(cuda, needed, f"the {kind} decoder of {bundle} on {name}")
    engine = TensorRtEngine(LoadedPlans(flavour, trt, bundle, record))
    return GraphDecodeRunner(cuda, engine, record.graphs, use_graphs=use_graphs)


def _open_inductor(
    bundle: Path, manifest: Manifest, kind: str, *, use_graphs: bool
) -> DecodeRunner:
    from forcing_kv.runtime_trt.backends import inductor_record
    from forcing_kv.runtime_trt.backends.open_inductor import open_package

    shared = inductor_record(bundle, manifest)
    record = shared.decoder(bundle, kind, manifest.decoders[kind].sha256)
    package = open_package(bundle, record)
    if package.device.type == "cpu":
        from forcing_kv.runtime_trt.backends.decode_inductor import InductorDecodeRunner

        return InductorDecodeRunner(package)
    from forcing_kv.runtime_trt.backends.decode_graph import GraphDecodeRunner
    from forcing_kv.runtime_trt.inductor_engine import InductorEngine

    cuda = Cuda(package.device.index or 0, extra="inductor")
    engine = InductorEngine(package)
    return GraphDecodeRunner(cuda, engine, package.graphs, use_graphs=use_graphs)
