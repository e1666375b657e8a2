"""Which of a bundle's TensorRT engines fits this machine, and why none does.

Everything here is checked before a TensorRT runtime exists: without a driver, creating one and
using it ends the process. One error each, with the command that mends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forcing_kv.runtime_trt.chunk_program import plan_memory
from forcing_kv.runtime_trt.cuda import DeviceInfo
from forcing_kv.runtime_trt.errors import BackendUnavailableError, BundleError
from forcing_kv.runtime_trt.hashes import check_hashes
from forcing_kv.runtime_trt.manifest import (
    DecoderInfo,
    GraphInfo,
    Manifest,
    graph_info,
)


@dataclass(frozen=True)
class Flavour:
    """One of the three packages that run TensorRT engines."""

    name: str
    """Backend name."""
    module: str
    """Python module of the runtime."""
    extra: str
    """Extra of `forcing-kv` that brings it."""
    built_by: str
    """Backend name in the records of the engines that it runs."""
    built_with: str
    """Module whose version those records hold."""


FLAVOURS: Mapping[str, Flavour] = {
    "tensorrt": Flavour("tensorrt", "tensorrt", "trt", "tensorrt", "tensorrt"),
    "tensorrt-lean": Flavour("tensorrt-lean", "tensorrt_lean", "trt", "tensorrt", "tensorrt"),
    "tensorrt-rtx": Flavour("tensorrt-rtx", "tensorrt_rtx", "rtx", "tensorrt-rtx", "tensorrt_rtx"),
}


@dataclass(frozen=True)
class EngineRecord:
    """The engines of one folder of a bundle."""

    bundle: Path
    content: Mapping[str, Any]
    """The entry of the manifest."""
    graphs: Mapping[str, GraphInfo]
    """Inputs and outputs; `file` is the plan."""

    @classmethod
    def of(cls, bundle: Path, content: Mapping[str, Any]) -> EngineRecord:
        """Read one entry of the manifest's engines.

        Raises:
            BundleError: it is malformed.
        """
        where = f"{bundle}: engine {content.get('folder')}"
        try:
            graphs = {
                name: graph_info(info, f"{where}: {name}")
                for name, info in content["graphs"].items()
            }
            int(content["environment"]["sm"])
            dict(content["options"])
            dict(content["files"])
            return cls(bundle, content, graphs)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"{where}: its record is malformed ({error}); build it again with `fkv build`"
            ) from error

    @property
    def sm(self) -> int:
        """Compute capability that it was built for, major * 10 + minor."""
        return int(self.content["environment"]["sm"])

    @property
    def options(self) -> Mapping[str, Any]:
        """Build options."""
        return dict(self.content["options"])

    @property
    def build_command(self) -> str:
        """Command that builds it again."""
        return build_command(self.bundle, str(self.content["backend"]), self.sm, self.options)

    def runs_on(self, sm: int) -> bool:
        """Whether a GPU of that compute capability can run it."""
        compatible = self.options.get("hardware_compatible") and min(sm, self.sm) >= 80
        return self.sm == sm or bool(compatible)

    def check_graphs(self, manifest: Manifest) -> None:
        """Compare inputs and outputs with those of the bundle's own graphs.

        Raises:
            BundleError: they differ.
        """
        found = {name: (graph.inputs, graph.outputs) for name, graph in self.graphs.items()}
        wanted = {name: (graph.inputs, graph.outputs) for name, graph in manifest.graphs.items()}
        if wrong := sorted(name for name in found | wanted if found.get(name) != wanted.get(name)):
            raise BundleError(
                f"{self.bundle}: engine {self.content['folder']} is not of this bundle's graphs "
                f"{wrong}; {self.build_command}"
            )

    @property
    def weight_nbytes(self) -> int:
        """Device memory of the weights of all graphs."""
        return sum(self._sizes("weight_nbytes"))

    @property
    def scratch_nbytes(self) -> int:
        """Largest scratch of any graph."""
        return max(self._sizes("scratch_nbytes"), default=0)

    def _sizes(self, key: str) -> list[int]:
        return [detail.get(key) or 0 for detail in self.content.get("details", {}).values()]

    def nbytes_on_device(self, manifest: Manifest) -> int:
        """Device memory that a first session needs: weights, buffers and scratch."""
        buffers = plan_memory(manifest.config, self.graphs, self.scratch_nbytes).nbytes
        return self.weight_nbytes + buffers

    def decoder(self, kind: str, info: DecoderInfo) -> EngineRecord:
        """The engines of one of the bundle's decoders, built together with these.

        Raises:
            BackendUnavailableError: there are none.
            BundleError: they were built from another decoder, or their record is malformed.
        """
        return EngineRecord.of(self.bundle, decoder_content(self.bundle, self.content, kind, info))


def decoder_content(
    bundle: Path, content: Mapping[str, Any], kind: str, info: DecoderInfo
) -> Mapping[str, Any]:
    """The part of an engine record that is about a decoder, in the form of a record.

    Args:
        bundle: directory of the bundle.
        content: an entry of the manifest's engines.
        kind: vae or tae.
        info: the decoder that the bundle holds now.

    Raises:
        BackendUnavailableError: the record has no such part.
        BundleError: it was compiled from another decoder.
    """
    parts = content.get("decoders")
    part = parts.get(kind) if isinstance(parts, Mapping) else None
    where = f"{bundle}: engine {content.get('folder')}"
    if not isinstance(part, Mapping):
        raise BackendUnavailableError(
            f"{where} holds no {kind} decoder; make it with {rebuild_command(bundle, content)}"
        )
    if part.get("decoder_sha256") != info.sha256:
        raise BundleError(
            f"{where}: its {kind} decoder was compiled from another one than the bundle holds now; "
            f"{rebuild_command(bundle, content)}"
        )
    return {**content, **part}


def rebuild_command(bundle: Path, content: Mapping[str, Any]) -> str:
    """The `fkv build` that makes the engines of a record again."""
    if content.get("backend") == "inductor":
        device = content["environment"]["device"]
        return f"`fkv build {bundle} --backend inductor --device {device}`"
    return EngineRecord.of(bundle, content).build_command


_NAMED_APART = ("backend", "target")
"""Options of a record that a command names on its own."""


def build_command(
    bundle: Path, backend: str, sm: int | None = None, options: Mapping[str, Any] | None = None
) -> str:
    """The `fkv build` that makes the engine that is missing.

    Args:
        bundle: directory of the bundle.
        backend: tensorrt or tensorrt-rtx.
        sm: compute capability of the GPU.
        options: those of the build that differ from the defaults.
    """
    given = {key: value for key, value in (options or {}).items() if key not in _NAMED_APART}
    flags = [
        f"--{key.replace('_', '-')}" + ("" if value is True else f" {value}")
        for key, value in given.items()
    ]
    if backend == "tensorrt-rtx" and sm is not None:
        flags.insert(0, f"--target sm{sm}")
    return " ".join(["`fkv build", str(bundle), "--backend", backend, *flags]) + "`"


def find_records(bundle: Path, manifest: Manifest, flavour: Flavour) -> list[EngineRecord]:
    """Engines of the bundle that this flavour could run on some GPU.

    Raises:
        BackendUnavailableError: there is none.
        BundleError: one is not of the bundle's graphs.
    """
    records = [
        EngineRecord.of(bundle, content)
        for content in manifest.engines
        if content.get("backend") == flavour.built_by
    ]
    if not records:
        raise BackendUnavailableError(
            f"{bundle} holds no {flavour.built_by} engine; make one with "
            f"{build_command(bundle, flavour.built_by)}"
        )
    for record in records:
        record.check_graphs(manifest)
    if flavour.name != "tensorrt-lean":
        return records
    compatible = [record for record in records if record.options.get("version_compatible")]
    if not compatible:
        command = build_command(bundle, "tensorrt", options={"version_compatible": True})
        raise BackendUnavailableError(
            "the lean runtime runs version-compatible engines only, and none of this bundle's "
            f"engines is; {command}"
        )
    return compatible


def choose_record(records: list[EngineRecord], device: DeviceInfo) -> EngineRecord:
    """The engine for this GPU: its own before one that is merely compatible.

    Raises:
        BackendUnavailableError: none fits.
    """
    fitting = [record for record in records if record.runs_on(device.sm)]
    if not fitting:
        found = ", ".join(sorted({f"sm{record.sm}" for record in records}))
        backend, bundle = str(records[0].content["backend"]), records[0].bundle
        raise BackendUnavailableError(
            f"{bundle}: its {backend} engines are for {found}, but this GPU ({device.name}) is "
            f"sm{device.sm}; {build_command(bundle, backend, device.sm)}"
        )
    return max(fitting, key=lambda record: record.sm == device.sm)


def check_version(record: EngineRecord, flavour: Flavour, version: str) -> None:
    """Compare the version that built an engine with the one that is installed.

    Raises:
        BackendUnavailableError: the installed one cannot run it.
    """
    built = str(record.content["environment"].get(flavour.built_with))
    if built == version:
        return
    newer = _numbers(version) >= _numbers(built)
    if record.options.get("version_compatible") and newer:
        return
    raise BackendUnavailableError(
        f"{record.bundle}: the engine was built with {flavour.built_with} {built}, but "
        f"{flavour.module} {version} is installed; {record.build_command}, or install version "
        f"{built}"
    )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def check_plans(record: EngineRecord) -> None:
    """Compare every plan, and every table of weights, with its recorded hash.

    Raises:
        BundleError: one is missing or altered.
    """
    plans = {graph.file: graph.sha256 for graph in record.graphs.values()}
    files = {**record.content["files"], **plans}
    check_hashes(record.bundle, files, "it was built", record.build_command)


def check_engines(bundle: Path, manifest: Manifest) -> None:
    """Compare the files of every engine, whichever backend's, with their recorded hashes.

    Raises:
        BundleError: one is missing or altered.
    """
    for content in manifest.engines:
        for part in (content, *content.get("decoders", {}).values()):
            check_hashes(bundle, part["files"], "it was built", rebuild_command(bundle, content))


def weight_table(plan: str) -> str:
    """File beside a stripped plan that says where the bundle holds its weights."""
    return plan.removesuffix(".plan") + ".weights.json"
