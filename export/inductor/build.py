"""`fkv build BUNDLE --backend inductor`: AOTInductor engines compiled into a bundle."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from forcing_kv.export.bundle.edit import changed_bundle, discard_engines, free_name
from forcing_kv.export.bundle.read import MODEL_PREFIX, read_bundle_weights
from forcing_kv.export.decoder.onnx_module import OnnxModule
from forcing_kv.export.inductor.compile import NO_CUDA, InductorOptions, compile_sources
from forcing_kv.export.model.capture import GraphSource, graph_sources
from forcing_kv.export.tensorrt.build import write_record
from forcing_kv.export.tensorrt.plan import ENGINE_FOLDER
from forcing_kv.runtime_trt.bundle.atomic.files import replaced_folder
from forcing_kv.runtime_trt.bundle.constants import ConstantEntry, Piece, write_table
from forcing_kv.runtime_trt.bundle.engines import DecoderEngines, EngineRecord
from forcing_kv.runtime_trt.bundle.fp8 import check_sm
from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo
from forcing_kv.runtime_trt.bundle.hashes import sha256_of
from forcing_kv.runtime_trt.bundle.manifest import Bundle, DecoderInfo, Manifest
from forcing_kv.runtime_trt.dtypes import dtype_name
from forcing_kv.runtime_trt.errors import BackendUnavailableError
from forcing_kv.runtime_trt.inductor.package import environment

CONSTANTS_FILE = "constants.json"
SMALL_FILE = "constants.bin"
"""Constants that the bundle's weight file does not hold: tables and small weights."""


def build_inductor(
    bundle: Path, options: InductorOptions, report: Callable[[str], None] = lambda _: None
) -> EngineRecord:
    """Compile a bundle's model and put the engine into the bundle, all or nothing.

    Args:
        bundle: directory written by `fkv export`.
        report: told the name of each part when it begins.

    Returns:
        The engine record, which is in the manifest now.

    Raises:
        BackendUnavailableError: the target is CUDA and there is no such device.
        BundleError: the bundle is not readable.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(NO_CUDA)
    with changed_bundle(bundle):
        with Bundle(bundle) as opened:
            opened.check_exported()
        return _build(bundle, opened.manifest, options, report)


def _build(
    bundle: Path, manifest: Manifest, options: InductorOptions, report: Callable[[str], None]
) -> EngineRecord:
    """Compile into the folder that the engines of the bundle do not have, and record it."""
    if manifest.fp8 is not None and options.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        check_sm(manifest.fp8, 10 * major + minor)
    start = perf_counter()
    report("weights")
    weights = read_bundle_weights(bundle, manifest)
    weights.model.to(options.device)
    name = f"{ENGINE_FOLDER}/inductor-{options.device}"
    discard_engines(bundle, manifest, name)
    relative = Path(free_name(name, [record.folder for record in manifest.engines]))
    with replaced_folder(bundle / relative) as folder:
        with warnings.catch_warnings():
            # PyTorch's notes to itself, one for each kernel.
            warnings.filterwarnings("ignore", category=FutureWarning)
            sources = graph_sources(weights.model, manifest.config, options.fusion)
            compiled = compile_sources(sources, folder, options, report)
        report("constants")
        _write_constants(folder, relative, compiled.constants, weights.entries)
        decoders = {
            kind: _build_decoder(bundle, kind, decoder, folder, relative, options, report)
            for kind, decoder in manifest.decoders.items()
        }
        files = _hashes(folder, relative)
    record = EngineRecord(
        str(relative),
        round(perf_counter() - start, 1),
        files,
        _placed(compiled.graphs, relative),
        backend="inductor",
        environment=environment(options.device),
        options=asdict(options),
        decoders=decoders,
    )
    write_record(bundle, record, manifest)
    return record


def _hashes(folder: Path, relative: Path) -> Mapping[str, str]:
    """Hashes of the files in `folder`, which will be at `relative`."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return {str(relative / file.name): sha256_of(file) for file in files}


def _placed(graphs: Mapping[str, GraphInfo], relative: Path) -> Mapping[str, GraphInfo]:
    """The same graphs, their file within the bundle."""
    return {name: replace(info, file=str(relative / info.file)) for name, info in graphs.items()}


def _build_decoder(
    bundle: Path,
    kind: str,
    decoder: DecoderInfo,
    folder: Path,
    relative: Path,
    options: InductorOptions,
    report: Callable[[str], None],
) -> DecoderEngines:
    """Compile a decoder as its graphs in the bundle have it, into a package of its own.

    Returns:
        What the record says of it, in the folder `kind` of `folder`, which will be at `relative`.
    """
    begin = perf_counter()
    folder, relative = folder / kind, relative / kind
    folder.mkdir()
    modules = {
        name: OnnxModule(bundle / graph.file, decoder.weights_file)
        for name, graph in decoder.graphs.items()
    }
    sources = [
        _decoder_source(name, decoder.graphs[name], module.to(options.device))
        for name, module in modules.items()
    ]
    compiled = compile_sources(sources, folder, options, lambda name: report(f"{kind}: {name}"))
    entries = {key: entry for module in modules.values() for key, entry in module.entries.items()}
    _write_constants(folder, relative, compiled.constants, entries)
    return DecoderEngines(
        str(relative),
        round(perf_counter() - begin, 1),
        _hashes(folder, relative),
        _placed(compiled.graphs, relative),
        decoder_sha256=decoder.sha256,
    )


def _decoder_source(name: str, graph: GraphInfo, module: OnnxModule) -> GraphSource:
    device = next(module.buffers()).device
    latents, *state = (
        torch.zeros(info.shape, dtype=getattr(torch, info.dtype), device=device)
        for info in graph.inputs
    )
    inputs, outputs = (
        tuple(info.name for info in tensors) for tensors in (graph.inputs, graph.outputs)
    )
    arguments = (latents, state) if state else (latents,)
    return GraphSource(name, module, arguments, inputs, outputs)


@dataclass
class _SmallFile:
    """Appends constants to the engine's own file."""

    path: Path
    relative: str
    nbytes: int = 0

    def add(self, content: bytes) -> Piece:
        """Write `content`, aligned for any dtype."""
        offset = -(-self.nbytes // 64) * 64
        with self.path.open("ab") as file:
            file.write(b"\0" * (offset - self.nbytes) + content)
        self.nbytes = offset + len(content)
        return Piece(self.relative, offset, len(content))


def _write_constants(
    folder: Path,
    relative: Path,
    constants: Mapping[str, Tensor],
    entries: Mapping[str, ConstantEntry],
) -> None:
    """Describe every constant by the bundle's bytes in `entries`, or store it."""
    small = _SmallFile(folder / SMALL_FILE, str(relative / SMALL_FILE))
    table = {}
    for name, value in constants.items():
        pieces = _shared_pieces(name.removeprefix(MODEL_PREFIX), entries)
        if sum(piece.nbytes for piece in pieces) != value.nbytes:
            pieces = (small.add(_content(value)),)
        table[name] = ConstantEntry(tuple(value.shape), dtype_name(value.dtype), pieces)
    write_table(folder / CONSTANTS_FILE, table)


def _shared_pieces(name: str, entries: Mapping[str, ConstantEntry]) -> tuple[Piece, ...]:
    """Where a parameter lies in the shared weight file; q, k and v follow one another if fused."""
    names = [name]
    if ".qkv." in name:
        names = [name.replace(".qkv.", f".{part}.") for part in "qkv"]
    if not all(each in entries for each in names):
        return ()
    return tuple(piece for each in names for piece in entries[each].pieces)


def _content(value: Tensor) -> bytes:
    flat = value.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()
