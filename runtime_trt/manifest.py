"""The bundle on disk: manifest schema, hashes, and what opening checks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from forcing_kv.runtime_trt.config import RolloutConfig
from forcing_kv.runtime_trt.dtypes import DTYPES
from forcing_kv.runtime_trt.errors import BundleError, InputError
from forcing_kv.runtime_trt.fp8 import Fp8Scales
from forcing_kv.runtime_trt.hashes import check_hashes
from forcing_kv.runtime_trt.layout import from_mapping
from forcing_kv.runtime_trt.ports import PortLike, ports

MANIFEST_FILE = "manifest.json"
GRAPH_FOLDER = "graphs"
WEIGHT_FILE = "graphs/weights.bin"
SCHEMA_VERSION = 1
"""Version that this runtime writes and the only one that it reads."""


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a graph.

    Raises:
        InputError: there is no such dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Name in `DTYPES`."""

    def __post_init__(self) -> None:
        if self.dtype == "float":  # Bundles of 2026 have ONNX's word for it.
            object.__setattr__(self, "dtype", "float32")
        if self.dtype not in DTYPES:
            raise InputError(f"{self.name}: dtype is {self.dtype!r}; allowed are {list(DTYPES)}")


@dataclass(frozen=True)
class GraphInfo:
    """One exported graph."""

    file: str
    """Path within the bundle."""
    sha256: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class DecoderInfo:
    """One exported video decoder: latents to pixels, a latent frame at a time."""

    graphs: Mapping[str, GraphInfo]
    """`decode` for every frame and, where the first one is special, `decode_first`."""
    weights_file: str
    """Path within the bundle."""
    weights_sha256: str
    num_trimmed_frames: int
    """Pixel frames at the start of a video that are warm-up and left out."""
    source: str = ""
    """What it was exported from, for people."""

    @property
    def sha256(self) -> str:
        """Hash of its graphs and weights together: what an engine of it is made of."""
        graphs = [f"{name} {graph.sha256}" for name, graph in sorted(self.graphs.items())]
        return hashlib.sha256("\n".join([*graphs, self.weights_sha256]).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime must know about a bundle."""

    name: str
    """What was exported, for people."""
    config: RolloutConfig
    graphs: Mapping[str, GraphInfo]
    """prompt, step and, with segments, evict."""
    weights_sha256: str
    weights_nbytes: int
    fp8: Fp8Scales | None = None
    """Layers whose products run in FP8; None for none."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Hashes of checkpoint and head file, and the versions of the tools that exported."""
    text_encoder: str | None = None
    """Kind of text encoder that makes this model's prompt embeddings."""
    decoder: str | None = None
    """Kind of decoder that turns its latents into pixels."""
    decoders: Mapping[str, DecoderInfo] = field(default_factory=dict)
    """Exported decoders by kind: `vae`, `tae`."""
    plugin_abi: int = 1
    """Version of the custom operators that the graphs use."""
    engines: tuple[Mapping[str, Any], ...] = ()
    """One record per built engine."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, schema version first."""
        data = {**asdict(self), "config": self.config.to_json()}
        return {"schema_version": SCHEMA_VERSION, **data}


def read_manifest(bundle: Path) -> Manifest:
    """Read and check the manifest of a bundle.

    Raises:
        BundleError: missing, malformed, or of a schema version that this runtime cannot read.
    """
    path = bundle / MANIFEST_FILE
    if not path.is_file():
        raise BundleError(
            f"{bundle}: not a bundle ({MANIFEST_FILE} is missing); make one with `fkv export`"
        )
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not readable ({error}); export the bundle again") from error
    version = data.pop("schema_version", None) if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: schema version {version!r} found, this runtime reads {SCHEMA_VERSION}; "
            "export the bundle again with this version of forcing-kv, or install the one that "
            "wrote it"
        )
    try:
        return _manifest(data)
    except InputError as error:
        raise BundleError(f"{path}: {error}; export the bundle again") from error
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise BundleError(
            f"{path}: entry {error} is missing or malformed; export the bundle again"
        ) from error


def _manifest(data: dict[str, Any]) -> Manifest:
    config = RolloutConfig.from_json(data["config"], "config")
    graphs = {name: graph_info(graph, f"graphs.{name}") for name, graph in data["graphs"].items()}
    _check_graphs(config, graphs)
    engines = tuple(data.get("engines", ()))
    for engine in engines:
        _check_engine(engine, f"engines.{engine['folder']}")
    parts = {"config": config, "graphs": graphs, "engines": engines}
    fp8 = data.get("fp8")
    parts["fp8"] = None if fp8 is None else Fp8Scales.from_json(fp8, "fp8")
    parts["decoders"] = {
        kind: _decoder_info(decoder, f"decoders.{kind}")
        for kind, decoder in data.get("decoders", {}).items()
    }
    return from_mapping(Manifest, {**data, **parts}, "manifest")


def _check_engine(data: Mapping[str, Any], where: str) -> None:
    """Refuse a record that nobody could read; what a backend adds is checked where it is read."""
    for key, kind in {"backend": str, "environment": dict, "options": dict}.items():
        _require(isinstance(data[key], kind), f"{where}.{key}", data[key])
    built_for = data["environment"].get("device", data["environment"].get("sm"))
    _require(isinstance(built_for, str), f"{where}.environment", data["environment"])
    for part in (data, *data.get("decoders", {}).values()):
        _check_engine_part(part, where)


def _check_engine_part(data: Mapping[str, Any], where: str) -> None:
    """What a record says of the denoiser, and of every decoder."""
    kinds: dict[str, Any] = {
        "folder": str, "files": dict, "graphs": dict, "build_seconds": (int, float)
    }  # fmt: skip
    for key, kind in kinds.items():
        _require(isinstance(data[key], kind), f"{where}.{key}", data[key])
    for file, sha256 in data["files"].items():
        _require(isinstance(sha256, str), f"{where}.files.{file}", sha256)
    for name, graph in data["graphs"].items():
        graph_info(graph, f"{where}.graphs.{name}")
    for name, detail in data.get("details", {}).items():
        for key in ("weight_nbytes", "scratch_nbytes"):
            value = detail.get(key)
            known = value is None or isinstance(value, int)
            _require(known, f"{where}.details.{name}.{key}", value)


def _require(holds: bool, where: str, value: Any) -> None:
    if not holds:
        raise InputError(f"{where} is {value!r}, which is malformed")


def _decoder_info(data: Mapping[str, Any], where: str) -> DecoderInfo:
    graphs = {name: graph_info(graph, f"{where}.{name}") for name, graph in data["graphs"].items()}
    return from_mapping(DecoderInfo, {**data, "graphs": graphs}, where)


def graph_info(data: Mapping[str, Any], where: str) -> GraphInfo:
    """Read a graph's entry, in the manifest or in an engine record.

    Raises:
        InputError: unknown or missing keys; names `where`.
    """
    parts = dict(data)
    for key in ("inputs", "outputs"):
        parts[key] = tuple(
            from_mapping(TensorInfo, {**info, "shape": tuple(info["shape"])}, f"{where}.{key}")
            for info in parts[key]
        )
    for key in ("file", "sha256"):
        _require(isinstance(parts[key], str), f"{where}.{key}", parts[key])
    return from_mapping(GraphInfo, parts, where)


def _check_graphs(config: RolloutConfig, graphs: Mapping[str, GraphInfo]) -> None:
    """Refuse graphs that were exported for another policy, partition, size or dtype."""
    needed = ports(config)
    if set(graphs) != set(needed):
        raise InputError(f"graphs are {sorted(graphs)}; the policy needs {sorted(needed)}")
    for name, graph in needed.items():
        for kind in ("inputs", "outputs"):
            found = [_described(port) for port in getattr(graphs[name], kind)]
            wanted = [_described(port) for port in getattr(graph, kind)]
            for place, (has, needs) in enumerate(zip_longest(found, wanted, fillvalue="nothing")):
                if has != needs:
                    raise InputError(
                        f"graphs.{name}.{kind}[{place}] is {has}, but the configuration needs "
                        f"{needs}"
                    )


def _described(port: PortLike) -> str:
    return f"{port.name} {list(port.shape)} {port.dtype}"


def check_files(bundle: Path, manifest: Manifest) -> None:
    """Compare every graph and the weights with the hashes of the manifest.

    Raises:
        BundleError: a file is missing or altered.
    """
    wanted = {graph.file: graph.sha256 for graph in manifest.graphs.values()}
    wanted[WEIGHT_FILE] = manifest.weights_sha256
    check_hashes(bundle, wanted, "export", "make it again with `fkv export`")


def check_decoder_files(bundle: Path, decoder: DecoderInfo) -> None:
    """Compare a decoder's graphs and weights with the hashes of the manifest.

    Raises:
        BundleError: a file is missing or altered.
    """
    wanted = {graph.file: graph.sha256 for graph in decoder.graphs.values()}
    wanted[decoder.weights_file] = decoder.weights_sha256
    check_hashes(bundle, wanted, "export", "make it again with `fkv add-decoder --force`")
