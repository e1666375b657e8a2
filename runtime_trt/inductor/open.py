"""Opens the Inductor engines of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from forcing_kv.runtime_trt.backends.base import Backend
from forcing_kv.runtime_trt.bundle.constants import ConstantEntry, parse_table, read_constants
from forcing_kv.runtime_trt.bundle.engines import EngineRecord, build_command
from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo
from forcing_kv.runtime_trt.bundle.manifest import Bundle, Manifest, check_ports
from forcing_kv.runtime_trt.decode.runner import DecodeRunner
from forcing_kv.runtime_trt.errors import (
    BackendUnavailableError,
    BundleError,
    InputError,
    require,
)
from forcing_kv.runtime_trt.inductor.backend import InductorBackend
from forcing_kv.runtime_trt.inductor.decode_runner import InductorDecodeRunner
from forcing_kv.runtime_trt.inductor.package import InductorPackage, check_environment
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.ports import GraphPorts, ports

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


def checked_inductor_record(bundle: Bundle) -> EngineRecord:
    """The same, with everything checked that can be before its library is loaded.

    Raises:
        BackendUnavailableError: there is none, or it was compiled for another environment.
        BundleError: a file is missing or altered, or the package is not of this configuration.
    """
    record, manifest = inductor_record(bundle.folder, bundle.manifest), bundle.manifest
    check_environment(record.environment, record.environment["device"])
    try:
        check_ports(record.graphs, _ports_as_compiled(manifest.config, record.graphs))
    except InputError as error:
        raise BundleError(
            f"{bundle}: engine {record.folder}: {error}; {record.rebuild_command(bundle.folder)}"
        ) from error
    _check_package(bundle, record)
    return record


def _ports_as_compiled(
    config: RolloutConfig, graphs: Mapping[str, GraphInfo]
) -> Mapping[str, GraphPorts]:
    """Ports of the graphs of a configuration, with the fusions that `graphs` tell of."""
    if not graphs.keys() >= {"prompt", "step"}:
        return ports(config)
    names = {port.name for port in graphs["step"].inputs}
    text_rows = None
    if "text_bias" in names and graphs["prompt"].inputs:
        text_rows = min(graphs["prompt"].inputs[0].shape[0], config.model.text_len)
    return ports(
        config,
        time_tables="step_index" in names,
        clean_graph="clean" in graphs,
        text_rows=text_rows,
    )


def _check_package(bundle: Bundle, record: EngineRecord) -> None:
    """Check the package, its table of constants, and every file that the table names."""
    bundle.check(record.hashes)
    files = {piece.file for entry in _table(bundle, record).values() for piece in entry.pieces}
    bundle.check(sorted(files))
    if len({graph.file for graph in record.graphs.values()}) != 1:
        raise BundleError(
            f"{bundle}: engine {record.folder} is no single package; "
            f"{record.rebuild_command(bundle.folder)}"
        )


def _table(bundle: Bundle, record: EngineRecord) -> dict[str, ConstantEntry]:
    file = f"{record.folder}/constants.json"
    return parse_table(bundle.read(file), bundle.folder / file)


def open_inductor_decoder(bundle: Bundle, kind: str, *, use_graphs: bool = True) -> DecodeRunner:
    """Open the engine of a decoder.

    Args:
        bundle: the decoder's own files are checked by the caller.
        kind: vae or tae.
        use_graphs: on CUDA, replay captured graphs.

    Raises:
        BackendUnavailableError: there is none, or it was compiled for another environment.
        BundleError: a file is missing or altered, or the engine is of another decoder.
    """
    decoder, folder = bundle.manifest.decoders[kind], bundle.folder
    record = inductor_record(folder, bundle.manifest).decoder(folder, kind, decoder.sha256)
    check_environment(record.environment, record.environment["device"])
    record.check_graphs(folder, decoder.graphs)
    _check_package(bundle, record)
    package = open_package(bundle, record)
    if package.device.type == "cpu":
        return InductorDecodeRunner(package)
    from forcing_kv.runtime_trt.decode.graph import GraphDecodeRunner

    cuda, engine = _on_cuda(package)
    return GraphDecodeRunner(cuda, engine, package.graphs, use_graphs=use_graphs)


def open_package(bundle: Bundle, record: EngineRecord) -> InductorPackage:
    """Load the package of a record, or of the part of one that is about a decoder.

    Args:
        record: environment and graphs are checked by the caller.

    Raises:
        BundleError: a file is missing or altered, or the package does not load.
    """
    device = record.environment["device"]
    constants = _constants(bundle, record, device)
    (file,) = {graph.file for graph in record.graphs.values()}
    content = bundle.read(file)
    # What is mapped has been copied by now, and nothing is run that could still be refused.
    bundle.require_unchanged()
    return InductorPackage(content, f"{bundle}/{file}", record.graphs, constants, device)


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


def _constants(bundle: Bundle, record: EngineRecord, device: str) -> dict[str, Tensor]:
    """Constants of an engine as tensors on `device`."""
    torch = require("torch", extra="inductor")
    tensors = {}
    for name, entry, content in read_constants(bundle, _table(bundle, record)):
        value = torch.from_numpy(content).view(getattr(torch, entry.dtype)).view(entry.shape)
        tensors[name] = value.to(device)
    return tensors
