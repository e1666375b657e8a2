"""The bundle on disk: manifest schema, hashes, and what opening checks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from forcing_kv.runtime_trt.bundle.engines import EngineRecord
from forcing_kv.runtime_trt.bundle.fp8 import Fp8Scales
from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo
from forcing_kv.runtime_trt.bundle.hashes import check_hashes
from forcing_kv.runtime_trt.bundle.schema import load_as, read_json
from forcing_kv.runtime_trt.errors import BundleError, InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.ports import PortLike, ports

MANIFEST_FILE = "manifest.json"
GRAPH_FOLDER = "graphs"
WEIGHT_FILE = "graphs/weights.bin"
_REMEDY = "export the bundle again"
SCHEMA_VERSION = 1
"""Version that this runtime writes and the only one that it reads."""


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
    onnxruntime: Mapping[str, GraphInfo] = field(default_factory=dict)
    """Graphs that ONNX Runtime takes in place of those of the same name: its own attention."""
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
    engines: tuple[EngineRecord, ...] = ()
    """One record per built engine."""

    def to_json(self) -> dict[str, Any]:
        engines = [engine.to_json() for engine in self.engines]
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "engines": engines}


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
    if not isinstance(data, dict):
        raise BundleError(f"{path}: is {type(data).__name__}, but must be an object; {_REMEDY}")
    version = data.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: schema version {version!r} found, this runtime reads {SCHEMA_VERSION}; "
            "export the bundle again with this version of forcing-kv, or install the one that "
            "wrote it"
        )
    try:
        manifest = load_as(Manifest, data)
        _check_graphs(manifest.config, manifest.graphs)
    except InputError as error:
        raise BundleError(f"{path}: {error}; {_REMEDY}") from error
    return manifest


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
    graphs = (*manifest.graphs.values(), *manifest.onnxruntime.values())
    wanted = {graph.file: graph.sha256 for graph in graphs}
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
