"""What a manifest records of built engines, whichever backend's, and how to build them again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from forcing_kv.runtime_trt.bundle.fields import (
    BundlePath,
    Count,
    Plain,
    Seconds,
    Sha256,
    Text,
    Word,
)
from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo
from forcing_kv.runtime_trt.errors import BackendUnavailableError, BundleError, InputError
from forcing_kv.runtime_trt.rollout.ports import steady_name

COMPATIBLE_MIN_SM = 80
"""First generation of GPUs for hardware-compatible engines (Ampere)."""


@dataclass(frozen=True)
class EngineDetail:
    """What TensorRT's builder told of one graph's engine."""

    inputs_sha256: Text = ""
    """Hash of everything that it was made of."""
    nbytes: Count = 0
    """Size of the plan."""
    weight_nbytes: Count = 0
    """Device memory of its weights."""
    scratch_nbytes: Count | None = None
    """None where the builder does not tell (Torch-TensorRT)."""
    num_layers: Count = 0
    num_attention: Count = 0
    """Attentions of the network; those that are not fused keep all scores in memory."""
    num_fused_attention: Count = 0
    num_fp8_products: Count = 0
    build_seconds: Seconds = 0.0
    refitted: bool = False
    """Whether it is another bundle's engine with this one's weights."""


@dataclass(frozen=True)
class EnginePart:
    """The engines of the denoiser or of one decoder, in one folder."""

    folder: BundlePath
    build_seconds: Seconds
    files: Mapping[BundlePath, Sha256]
    """Hash of every file."""
    graphs: Mapping[Word, GraphInfo]
    """Inputs and outputs; `file` is the plan or the package."""
    details: Mapping[Word, EngineDetail] = field(default_factory=dict)
    """By graph; none for Inductor."""

    @property
    def hashes(self) -> Mapping[str, str]:
        """Every file, graphs last, and its hash."""
        return {**self.files, **{graph.file: graph.sha256 for graph in self.graphs.values()}}

    @property
    def weight_nbytes(self) -> int:
        """Device memory of the weights of all graphs."""
        return sum(detail.weight_nbytes for detail in self.details.values())

    @property
    def scratch_nbytes(self) -> int:
        """Largest scratch of any graph."""
        return max((detail.scratch_nbytes or 0 for detail in self.details.values()), default=0)

    @property
    def scratch_by_graph(self) -> Mapping[str, int]:
        return {name: detail.scratch_nbytes or 0 for name, detail in self.details.items()}

    def to_json(self) -> dict[str, Any]:
        return asdict(self, dict_factory=_written)


@dataclass(frozen=True, kw_only=True)
class DecoderEngines(EnginePart):
    """The engines of one video decoder."""

    decoder_sha256: Sha256
    """Hash of the decoder that they were made of."""


@dataclass(frozen=True, kw_only=True)
class EngineRecord(EnginePart):
    """One entry of a manifest's `engines`: the denoiser's, and with them those of the decoders.

    Raises:
        InputError: it does not say what it was built for.
    """

    backend: Literal["tensorrt", "tensorrt-rtx", "inductor"]
    """What built it."""
    environment: Mapping[Word, Text]
    """What it was built for and with: device or sm, and versions."""
    options: Mapping[Word, Plain]
    """Those of the build that differ from the defaults (TensorRT), or all."""
    target: Word | None = None
    """GPU architecture that TensorRT built for, such as sm89."""
    decoders: Mapping[Word, DecoderEngines] = field(default_factory=dict)
    """By kind: vae, tae."""
    attention_ms: Mapping[str, float] = field(default_factory=dict)
    """Time of a steady step with each attention that was tried, plugin and native; the engines are
    those of the faster one."""

    def __post_init__(self) -> None:
        needed, form = "sm", "[0-9]{1,4}"
        if self.backend == "inductor":
            needed, form = "device", "cpu|cuda"
        found = self.environment.get(needed, "")
        if not re.fullmatch(form, found):
            raise InputError(
                f"environment.{needed} is {found!r}; it must say what the engine is for, such as "
                "cuda (device) or 89 (sm)"
            )

    @property
    def parts(self) -> tuple[EnginePart, ...]:
        """The denoiser's, and each decoder's."""
        return (self, *self.decoders.values())

    def part(self, decoder: str | None) -> EnginePart | None:
        """The denoiser's (None) or a decoder's, if there is one."""
        return self if decoder is None else self.decoders.get(decoder)

    @property
    def sm(self) -> int:
        """Compute capability that it was built for, major * 10 + minor."""
        return int(self.environment["sm"])

    def runs_on(self, sm: int) -> bool:
        """Whether a GPU of that compute capability can run it."""
        compatible = self.options.get("hardware_compatible") is True
        return self.sm == sm or (compatible and min(sm, self.sm) >= COMPATIBLE_MIN_SM)

    def rebuild_command(self, bundle: Path) -> str:
        """The `fkv build` that makes these engines again."""
        if self.backend == "inductor":
            named: dict[str, Any] = {"device": self.environment["device"]}
            if (attention := self.options.get("fusion", {}).get("attention")) != "torch":
                named |= {"attention": attention} if attention else {}
            return build_command(bundle, "inductor", options=named)
        return build_command(bundle, self.backend, self.sm, self.options)

    def check_graphs(self, bundle: Path, graphs: Mapping[str, GraphInfo]) -> None:
        """Compare inputs and outputs with those of the bundle's own graphs.

        Raises:
            BundleError: they differ.
        """
        found = {name: (graph.inputs, graph.outputs) for name, graph in self.graphs.items()}
        wanted = {
            name: (graph.inputs, graph.outputs)
            for name, graph in graphs.items()
            if name in found or name != steady_name("step")  # With plugins it needs none.
        }
        if wrong := sorted(name for name in found | wanted if found.get(name) != wanted.get(name)):
            raise BundleError(
                f"{bundle}: engine {self.folder} is not of this bundle's graphs {wrong}; "
                f"{self.rebuild_command(bundle)}"
            )

    def decoder(self, bundle: Path, kind: str, sha256: str) -> EngineRecord:
        """The record of one decoder's engines, as if they had been built alone.

        Args:
            kind: vae or tae.
            sha256: hash of the decoder that the bundle holds now.

        Raises:
            BackendUnavailableError: there are none.
            BundleError: they were made of another decoder.
        """
        part, where = self.decoders.get(kind), f"{bundle}: engine {self.folder}"
        if part is None:
            raise BackendUnavailableError(
                f"{where} holds no {kind} decoder; make it with {self.rebuild_command(bundle)}"
            )
        if part.decoder_sha256 != sha256:
            raise BundleError(
                f"{where}: its {kind} decoder was compiled from another one than the bundle holds "
                f"now; {self.rebuild_command(bundle)}"
            )
        own: dict[str, Any] = {each.name: getattr(part, each.name) for each in fields(EnginePart)}
        return replace(self, **own, decoders={})


_FIRST = ("backend", "target", "folder", "decoder_sha256", "environment", "options")
_LEFT_OUT_IF_EMPTY = ("target", "details", "refitted", "attention_ms")


def _written(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    """What a manifest says of an entry's fields, those of `_FIRST` first."""
    data = {key: value for key, value in entries if value or key not in _LEFT_OUT_IF_EMPTY}
    return {key: data[key] for key in (*_FIRST, *data) if key in data}


_NAMED_APART = ("backend", "target")
"""Options of a record that a command names on its own."""


def build_command(
    bundle: Path, backend: str, sm: int | None = None, options: Mapping[str, Any] | None = None
) -> str:
    """The `fkv build` that makes the engine that is missing.

    Args:
        backend: tensorrt, tensorrt-rtx or inductor.
        sm: compute capability of the GPU.
        options: those of the build that differ from the defaults.
    """
    given = {key: value for key, value in (options or {}).items() if key not in _NAMED_APART}
    flags = [
        f"--{key.replace('_', '-')}" + ("" if value is True else f" {shlex.quote(str(value))}")
        for key, value in given.items()
    ]
    if backend == "tensorrt-rtx" and sm is not None:
        flags.insert(0, f"--target sm{sm}")
    return " ".join(["`fkv build", shlex.quote(str(bundle)), "--backend", backend, *flags]) + "`"


def weight_table(plan: str) -> str:
    """File beside a stripped plan that says where the bundle holds its weights."""
    return plan.removesuffix(".plan") + ".weights.json"
