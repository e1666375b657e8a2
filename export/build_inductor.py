"""`fkv build BUNDLE --backend inductor`: AOTInductor engines compiled into a bundle."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from forcing_kv.export.build import ENGINE_FOLDER, replaced_folder, write_record
from forcing_kv.export.bundle_weights import MODEL_PREFIX, BundleWeights, read_bundle_weights
from forcing_kv.export.inductor_package import InductorOptions, compile_package
from forcing_kv.runtime_trt.constant_table import ConstantEntry, Piece, write_table
from forcing_kv.runtime_trt.errors import BackendUnavailableError
from forcing_kv.runtime_trt.inductor_package import environment
from forcing_kv.runtime_trt.manifest import read_manifest, sha256_of

CONSTANTS_FILE = "constants.json"
SMALL_FILE = "constants.bin"
"""Constants that the bundle's weight file does not hold: tables and small weights."""


def build_inductor(
    bundle: Path, options: InductorOptions, report: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Compile a bundle's model and put the engine into the bundle, all or nothing.

    Args:
        bundle: directory written by `fkv export`.
        options: target and fusions.
        report: told the name of each part when it begins.

    Returns:
        The engine record, which is in the manifest now.

    Raises:
        BackendUnavailableError: the target is CUDA and there is no such device.
        BundleError: the bundle is not readable.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            "an Inductor engine for CUDA is compiled on the machine that will run it, and PyTorch "
            "finds no CUDA device here; build there, or give --device cpu"
        )
    manifest = read_manifest(bundle)
    start = perf_counter()
    report("weights")
    weights = read_bundle_weights(bundle, manifest)
    weights.model.to(options.device)
    relative = Path(ENGINE_FOLDER) / f"inductor-{options.device}"
    with replaced_folder(bundle / relative) as folder:
        with warnings.catch_warnings():
            # PyTorch's notes to itself, one for each kernel.
            warnings.filterwarnings("ignore", category=FutureWarning)
            compiled = compile_package(weights.model, manifest.config, folder, options, report)
        report("constants")
        table = _write_constants(folder, relative, compiled.constants, weights)
        write_table(folder / CONSTANTS_FILE, table)
    graphs = {name: asdict(info) for name, info in compiled.graphs.items()}
    for info in graphs.values():
        info["file"] = str(relative / info["file"])
    files = sorted(file for file in (bundle / relative).iterdir() if file.is_file())
    record = {
        "backend": "inductor",
        "folder": str(relative),
        "files": {str(relative / file.name): sha256_of(file) for file in files},
        "graphs": graphs,
        "environment": environment(options.device),
        "options": options.to_json(),
        "build_seconds": round(perf_counter() - start, 1),
    }
    write_record(bundle, record)
    return record


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
    folder: Path, relative: Path, constants: Mapping[str, Tensor], weights: BundleWeights
) -> dict[str, ConstantEntry]:
    """Describe every constant by the bundle's bytes, or store it."""
    small = _SmallFile(folder / SMALL_FILE, str(relative / SMALL_FILE))
    table = {}
    for name, value in constants.items():
        pieces = _shared_pieces(name.removeprefix(MODEL_PREFIX), weights.entries)
        if sum(piece.nbytes for piece in pieces) != value.nbytes:
            pieces = (small.add(_content(value)),)
        dtype = str(value.dtype).removeprefix("torch.")
        table[name] = ConstantEntry(tuple(value.shape), dtype, pieces)
    return table


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
