"""The bundle on disk: manifest schema, hashes, and what opening checks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from forcing_kv.runtime_trt.config import RolloutConfig
from forcing_kv.runtime_trt.dtypes import DTYPES
from forcing_kv.runtime_trt.errors import BundleError, InputError
from forcing_kv.runtime_trt.fp8 import Fp8Scales
from forcing_kv.runtime_trt.hashes import check_hashes
from forcing_kv.runtime_trt.schema import load_as, read_json

MANIFEST_FILE = "manifest.json"
GRAPH_FOLDER = "graphs"
WEIGHT_FILE = "graphs/weights.bin"
_REMEDY = "export the bundle again"
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
        data = read_json(path, "manifest", _REMEDY)
    except InputError as error:
        raise BundleError(str(error)) from error
    version = data.pop("schema_version", None) if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: schema version {version!r} found, this runtime reads {SCHEMA_VERSION}; "
            "export the bundle again with this version of forcing-kv, or install the one that "
            "wrote it"
        )
    try:
        manifest = load_as(Manifest, data)
        _check_graphs(manifest.config, manifest.graphs)
        for engine in manifest.engines:
            _check_engine(engine, f"engines.{engine.get('folder')}")
    except InputError as error:
        raise BundleError(f"{path}: {error}; {_REMEDY}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise BundleError(f"{path}: entry {error} is missing or malformed; {_REMEDY}") from error
    return manifest


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


def graph_info(data: Mapping[str, Any], where: str) -> GraphInfo:
    """Read a graph's entry in an engine record.

    Raises:
        InputError: unknown or missing keys; names `where`.
    """
    return load_as(GraphInfo, data, where)


def _check_graphs(config: RolloutConfig, graphs: Mapping[str, GraphInfo]) -> None:
    """Refuse graphs that were exported for another policy, partition or size."""
    needed = {"prompt", "step"} | ({"evict"} if config.evicted_layers else set())
    if set(graphs) != needed:
        raise InputError(f"graphs are {sorted(graphs)}; the policy needs {sorted(needed)}")
    shapes = {info.name: info.shape for info in graphs["step"].inputs}
    wanted: dict[str, tuple[int, ...]] = {"x": config.latent_shape}
    for layer, layout in enumerate(config.layouts):
        for name in ("hist_k", "hist_v"):
            wanted[f"{name}.{layer}"] = (layout.num_rows, config.model.head_dim)
    for name, shape in wanted.items():
        if shapes.get(name) != shape:
            raise InputError(
                f"graphs.step: input {name} has shape {shapes.get(name)}, but the configuration "
                f"needs {shape}"
            )


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
