"""The bundle on disk: manifest schema, hashes, and what opening checks."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from forcing_kv.runtime_trt.bundle.engines import EngineRecord
from forcing_kv.runtime_trt.bundle.fields import (
    BundlePath,
    Count,
    Plain,
    Sha256,
    Text,
    Word,
    shortened,
    within,
)
from forcing_kv.runtime_trt.bundle.fp8 import Fp8Scales
from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo
from forcing_kv.runtime_trt.bundle.hashes import HashedFiles, RecordedFile
from forcing_kv.runtime_trt.bundle.onnx_file import OnnxFile, read_onnx
from forcing_kv.runtime_trt.bundle.schema import load_as, parse_json_file, unreadable
from forcing_kv.runtime_trt.errors import BundleError, InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.ports import GraphLike, PortLike, ports

MANIFEST_FILE = "manifest.json"
GRAPH_FOLDER = "graphs"
WEIGHT_FILE = "graphs/weights.bin"
SCHEMA_VERSION = 3
"""Version that this runtime writes and the only one that it reads."""
PLUGIN_ABI = 1
"""Version of the custom operators that this release has."""
MAX_MANIFEST_NBYTES = 8 << 20
"""Longest manifest; one of 14 billion parameters with engines has a few hundred kilobytes."""
_MAX_ENGINES = 64
_ATTEMPTS = 5
"""How often a bundle is opened that is replaced meanwhile."""
_REMEDY = "export the bundle again"


@dataclass(frozen=True)
class DecoderInfo:
    """One exported video decoder: latents to pixels, a latent frame at a time."""

    graphs: Mapping[Word, GraphInfo]
    """`decode` for every frame and, where the first one is special, `decode_first`."""
    weights_file: BundlePath
    weights_sha256: Sha256
    num_trimmed_frames: Annotated[int, within(0, 1000)]
    """Pixel frames at the start of a video that are warm-up and left out."""
    source: Text = ""
    """What it was exported from, for people."""

    @property
    def sha256(self) -> str:
        """Hash of its graphs and weights together: what an engine of it is made of."""
        graphs = [f"{name} {graph.sha256}" for name, graph in sorted(self.graphs.items())]
        return hashlib.sha256("\n".join([*graphs, self.weights_sha256]).encode()).hexdigest()

    @property
    def hashes(self) -> Mapping[str, str]:
        """Every file and its hash."""
        return {
            **{graph.file: graph.sha256 for graph in self.graphs.values()},
            self.weights_file: self.weights_sha256,
        }


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime must know about a bundle.

    Raises:
        InputError: parts that do not fit each other, or operators of another version.
    """

    name: Text
    """What was exported, for people."""
    config: RolloutConfig
    graphs: Mapping[Word, GraphInfo]
    """prompt, step and, with segments, evict."""
    weights_sha256: Sha256
    weights_nbytes: Count
    onnxruntime: Mapping[Word, GraphInfo] = field(default_factory=dict)
    """Graphs that ONNX Runtime takes in place of those of the same name: its own attention."""
    fp8: Fp8Scales | None = None
    """Layers whose products run in FP8; None for none."""
    provenance: Mapping[Word, Plain] = field(default_factory=dict)
    """Hashes of checkpoint and head file, and the versions of the tools that exported."""
    text_encoder: Text | None = None
    """Kind of text encoder that makes this model's prompt embeddings."""
    decoder: Text | None = None
    """Kind of decoder that turns its latents into pixels."""
    decoders: Mapping[Word, DecoderInfo] = field(default_factory=dict)
    """Exported decoders by kind: `vae`, `tae`."""
    plugin_abi: int = PLUGIN_ABI
    """Version of the custom operators that the graphs use."""
    timing_caches: Mapping[BundlePath, Sha256] = field(default_factory=dict)
    """Hash of every file of tactics that TensorRT's builder measured."""
    engines: tuple[EngineRecord, ...] = ()
    """One record per built engine."""
    digest: Text = ""
    """`sha256:` and the hash of all the above (`digest_of`); empty until it is written."""

    def __post_init__(self) -> None:
        if self.plugin_abi != PLUGIN_ABI:
            raise InputError(
                f"plugin_abi is {self.plugin_abi}, but this release has the operators of version "
                f"{PLUGIN_ABI}"
            )
        if len(self.engines) > _MAX_ENGINES:
            raise InputError(f"engines are {len(self.engines)}; at most {_MAX_ENGINES} are read")
        for name in self.fp8.linears if self.fp8 is not None else ():
            if int(name.split(".")[1]) >= self.config.model.num_layers:
                raise InputError(f"fp8: {name} is of no layer of this model")
        known: dict[str, str] = {}
        for hashes in (each for _, each in self._parts(Path())):
            for file, sha256 in hashes.items():
                if known.setdefault(file, sha256) != sha256:
                    raise InputError(f"{file} has two hashes, {sha256} and {known[file]}")

    @property
    def hashes(self) -> Mapping[str, str]:
        """Every file of the denoiser's graphs and its hash."""
        graphs = (*self.graphs.values(), *self.onnxruntime.values())
        return {
            **{graph.file: graph.sha256 for graph in graphs},
            WEIGHT_FILE: self.weights_sha256,
        }

    def _parts(self, bundle: Path) -> Iterator[tuple[tuple[str, str], Mapping[str, str]]]:
        """Every set of files: since when it is known and what mends it, and its hashes."""
        yield ("export", "make it again with `fkv export`"), self.hashes
        for decoder in self.decoders.values():
            yield ("export", "make it again with `fkv add-decoder --force`"), decoder.hashes
        for record in self.engines:
            for part in record.parts:
                yield ("it was built", record.rebuild_command(bundle)), part.hashes
        yield ("it was written", "`fkv build` without it measures anew"), self.timing_caches

    def recorded(self, bundle: Path) -> dict[str, RecordedFile]:
        """Every file that a bundle may load, by its path within."""
        return {
            file: RecordedFile(sha256, *said)
            for said, hashes in self._parts(bundle)
            for file, sha256 in hashes.items()
        }

    def to_json(self) -> dict[str, Any]:
        engines = [engine.to_json() for engine in self.engines]
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "engines": engines}

    def require_digest(self, digest: str | None, path: Path) -> None:
        """Refuse to be another manifest than the one that is asked for; None takes any.

        Raises:
            InputError: `digest` is none.
            BundleError: it is another's.
        """
        if digest is None:
            return
        if not (isinstance(digest, str) and re.fullmatch("sha256:[0-9a-f]{64}", digest)):
            raise InputError(
                f"digest is {digest!r}; give sha256: and 64 hexadecimal digits, as `fkv inspect` "
                "prints them"
            )
        if digest != self.digest:
            raise BundleError(
                f"{path}: is {self.digest}, but {digest} is asked for; this is another bundle, or "
                "one that has been changed since"
            )

    def sealed(self) -> Manifest:
        """The same with its digest, as it is to be written."""
        return replace(self, digest=digest_of(self.to_json()))


def digest_of(data: Mapping[str, Any]) -> str:
    """Digest of a manifest: it changes with any entry, and so with any file of the bundle.

    Args:
        data: the parsed file; its own `digest` is left out.

    Returns:
        `sha256:` and the SHA-256 of the other entries as JSON in UTF-8: keys sorted, no spaces.
    """
    content = {key: value for key, value in data.items() if key != "digest"}
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def read_manifest(bundle: Path, digest: str | None = None) -> Manifest:
    """Read and check the manifest of a bundle.

    Args:
        digest: the one that it must have, such as `sha256:0a1b…`; None takes any.

    Raises:
        InputError: `digest` is none.
        BundleError: missing, malformed, altered, of a schema version that this runtime cannot read,
            or of another digest.
    """
    with Bundle(bundle, digest) as opened:
        return opened.manifest


class Bundle(HashedFiles):
    """A bundle that is being opened: its manifest, and the files that the manifest records.

    Args:
        folder: written by `fkv export`.
        digest: the one that it must have; None takes any.

    Raises:
        InputError, BundleError: see `read_manifest`.
    """

    def __init__(self, folder: Path, digest: str | None = None) -> None:
        self._content = b""
        self._graphs: dict[str, OnnxFile] = {}
        path = folder / MANIFEST_FILE
        try:
            super().__init__(folder)
            self._content = self.read_unrecorded(MANIFEST_FILE, MAX_MANIFEST_NBYTES)
        except (FileNotFoundError, NotADirectoryError) as error:
            self.close()
            raise BundleError(
                f"{folder}: not a bundle ({MANIFEST_FILE} is missing); make one with `fkv export`"
            ) from error
        except OSError as error:
            self.close()
            raise BundleError(str(unreadable(path, "manifest", _REMEDY, error))) from error
        try:
            self.manifest = _parsed(self._content, path)
            self.manifest.require_digest(digest, path)
        except BaseException:
            self.close()
            raise
        self.recorded = self.manifest.recorded(folder)

    def was_replaced(self) -> bool:
        """Whether the folder's name leads to something else by now."""
        try:
            content = self.read_unrecorded(MANIFEST_FILE, MAX_MANIFEST_NBYTES)
        except (BundleError, OSError):
            return True
        return content != self._content or not self.is_still_named()

    def check_graphs(self, graphs: Mapping[str, GraphInfo] | None = None) -> dict[str, OnnxFile]:
        """Compare graphs and weights with their hashes, and the graphs with the manifest.

        Args:
            graphs: those that will run; None for the portable ones.

        Returns:
            What the graphs say of themselves, by name.

        Raises:
            BundleError: a file is missing or altered, or is not what the manifest says.
        """
        manifest = self.manifest
        self.check(manifest.hashes)
        if (found := self.nbytes(WEIGHT_FILE)) != manifest.weights_nbytes:
            raise BundleError(
                f"{self}/{WEIGHT_FILE}: {found} bytes, but {manifest.weights_nbytes} are recorded; "
                f"{_REMEDY}"
            )
        return self._read_graphs(manifest.graphs if graphs is None else graphs, WEIGHT_FILE)

    def check_decoder(self, kind: str) -> dict[str, OnnxFile]:
        """The same for a decoder's graphs and weights."""
        decoder = self.manifest.decoders[kind]
        self.check(decoder.hashes)
        return self._read_graphs(decoder.graphs, decoder.weights_file)

    def check_exported(self) -> None:
        """Both, for every decoder: all that engines are built of."""
        self.check_graphs()
        for kind in self.manifest.decoders:
            self.check_decoder(kind)

    def _read_graphs(
        self, graphs: Mapping[str, GraphInfo], weights_file: str
    ) -> dict[str, OnnxFile]:
        nbytes = self.nbytes(weights_file)
        for graph in graphs.values():
            if graph.file not in self._graphs:
                content, where = self.read(graph.file), f"{self}/{graph.file}"
                self._graphs[graph.file] = read_onnx(content, graph, weights_file, nbytes, where)
        return {name: self._graphs[graph.file] for name, graph in graphs.items()}


class Closable(Protocol):
    """What a bundle is loaded into."""

    def close(self) -> None: ...


_Loaded = TypeVar("_Loaded", bound=Closable)


def load_whole(folder: Path, digest: str | None, load: Callable[[Bundle], _Loaded]) -> _Loaded:
    """Load a bundle as one that is or was there: never a part of one and a part of another.

    A bundle that takes another's place meanwhile is loaded instead.

    Args:
        digest: the one that it must have; None takes any.
        load: makes something of the open bundle, which stays open while it is called.

    Raises:
        BundleError: see `Bundle` and `load`; or it was replaced, or written to, again and again.
    """
    for attempts_left in reversed(range(_ATTEMPTS)):
        with Bundle(folder, digest) as bundle:
            try:
                loaded = load(bundle)
                try:
                    bundle.require_unchanged()
                except BundleError:
                    loaded.close()
                    raise
                return loaded
            except BundleError:
                if not attempts_left or not bundle.was_replaced():
                    raise
    raise AssertionError("the last attempt returns or raises")


def _parsed(content: bytes, path: Path) -> Manifest:
    try:
        data = parse_json_file(content, path, "manifest", _REMEDY, MAX_MANIFEST_NBYTES)
    except InputError as error:
        raise BundleError(str(error)) from error
    if not isinstance(data, dict):
        raise BundleError(f"{path}: is {type(data).__name__}, but must be an object; {_REMEDY}")
    version = data.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: schema version {shortened(version)} found, this runtime reads "
            f"{SCHEMA_VERSION}; export the bundle again with this version of forcing-kv, or "
            "install the one that wrote it"
        )
    if (found := digest_of(data)) != data.get("digest"):
        raise BundleError(
            f"{path}: altered since it was written (digest {found[:19]}... found, "
            f"{shortened(data.get('digest'))} recorded); {_REMEDY}"
        )
    del data["schema_version"]
    try:
        manifest = load_as(Manifest, data)
        for graphs in (manifest.graphs, {**manifest.graphs, **manifest.onnxruntime}):
            check_ports(graphs, ports(manifest.config))
    except InputError as error:
        raise BundleError(f"{path}: {error}; {_REMEDY}") from error
    return manifest


def check_ports(graphs: Mapping[str, GraphInfo], needed: Mapping[str, GraphLike]) -> None:
    """Refuse graphs that were made for another policy, partition, size or dtype.

    Args:
        graphs: as recorded.
        needed: what the configuration makes of them (`rollout.ports.ports`).

    Raises:
        InputError: the first difference.
    """
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
