"""Opens the Inductor engines of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from forcing_kv.runtime_trt.backends.base import Backend
from forcing_kv.runtime_trt.bundle.constants import read_constants, read_table
from forcing_kv.runtime_trt.bundle.engines import EngineRecord, build_command
from forcing_kv.runtime_trt.bundle.manifest import Manifest
from forcing_kv.runtime_trt.decode.runner import DecodeRunner
from forcing_kv.runtime_trt.errors import BackendUnavailableError, require
from forcing_kv.runtime_trt.inductor.backend import InductorBackend
from forcing_kv.runtime_trt.inductor.decode_runner import InductorDecodeRunner
from forcing_kv.runtime_trt.inductor.package import InductorPackage, check_environment
from forcing_kv.runtime_trt.rollout.config import RolloutConfig

if TYPE_CHECKING:
    from torch import Tensor

    from forcing_kv.runtime_trt.cuda.runtime import Cuda
    from forcing_kv.runtime_trt.inductor.engine import InductorEngine


def inductor_record(bundle: Path, manifest: Manifest) -> EngineRecord:
    """The record of a bundle's Inductor engine, one for CUDA before one for the CPU.

    Raises:
        BackendUnavailableError: there is none.
    """
    records = [record for record in manifest.engines if record.backend == "inductor"]
    if not records:
        raise BackendUnavailableError(
            f"{bundle} holds no inductor engine; make one with {build_command(bundle, 'inductor')}"
        )
    return max(records, key=lambda record: record.environment["device"] == "cuda")


def open_inductor_decoder(
    bundle: Path, manifest: Manifest, kind: str, *, use_graphs: bool = True
) -> DecodeRunner:
    """Open the engine of a decoder.

    Args:
        bundle: directory of the bundle; the decoder's own files are checked by the caller.
        kind: vae or tae.
        use_graphs: on CUDA, replay captured graphs.

    Raises:
        BackendUnavailableError: there is none, or it was compiled for another environment.
        BundleError: a file is missing or altered, or the engine is of another decoder.
    """
    record = inductor_record(bundle, manifest)
    package = open_package(bundle, record.decoder(bundle, kind, manifest.decoders[kind].sha256))
    if package.device.type == "cpu":
        return InductorDecodeRunner(package)
    from forcing_kv.runtime_trt.decode.graph import GraphDecodeRunner

    cuda, engine = _on_cuda(package)
    return GraphDecodeRunner(cuda, engine, package.graphs, use_graphs=use_graphs)


def open_package(bundle: Path, record: EngineRecord) -> InductorPackage:
    """Load the package of a record, or of the part of one that is about a decoder.

    Raises:
        BackendUnavailableError: it was compiled for another environment.
        BundleError: a file is missing or altered.
    """
    device = record.environment["device"]
    check_environment(record.environment, device)
    record.check_files(bundle)
    constants = load_constants(bundle, bundle / record.folder / "constants.json", device)
    (path,) = {bundle / graph.file for graph in record.graphs.values()}
    return InductorPackage(path, record.graphs, constants, device)


def package_backend(
    config: RolloutConfig, package: InductorPackage, *, use_graphs: bool = True
) -> Backend:
    """The backend that runs a loaded package: chunk graphs on CUDA, call by call on the CPU."""
    if package.device.type == "cpu":
        return InductorBackend(config, package)
    from forcing_kv.runtime_trt.cuda.chunk_graph import ChunkGraphBackend

    cuda, engine = _on_cuda(package)
    return ChunkGraphBackend(cuda, engine, config, package.graphs, use_graphs=use_graphs)


def _on_cuda(package: InductorPackage) -> tuple[Cuda, InductorEngine]:
    from forcing_kv.runtime_trt.cuda.runtime import Cuda
    from forcing_kv.runtime_trt.inductor.engine import InductorEngine

    cuda = Cuda(package.device.index or 0, extra="inductor")
    return cuda, InductorEngine(package)


def load_constants(bundle: Path, table: Path, device: str) -> dict[str, Tensor]:
    """Constants of an engine as tensors on `device`."""
    torch = require("torch", extra="inductor")
    tensors = {}
    for name, entry, content in read_constants(bundle, read_table(table)):
        value = torch.from_numpy(content).view(getattr(torch, entry.dtype)).view(entry.shape)
        tensors[name] = value.to(device)
    return tensors
