"""Which of a bundle's TensorRT engines fits this machine, and why none does.

Everything here is checked before a TensorRT runtime exists: without a driver, creating one and
using it ends the process. One error each, with the command that mends it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from forcing_kv.runtime_trt.bundle.engines import EngineRecord, build_command
from forcing_kv.runtime_trt.bundle.manifest import Manifest
from forcing_kv.runtime_trt.cuda.chunk_program import plan_memory
from forcing_kv.runtime_trt.cuda.runtime import DeviceInfo
from forcing_kv.runtime_trt.errors import BackendUnavailableError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig


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


def find_records(bundle: Path, manifest: Manifest, flavour: Flavour) -> list[EngineRecord]:
    """Engines of the bundle that this flavour could run on some GPU.

    Raises:
        BackendUnavailableError: there is none.
        BundleError: one is not of the bundle's graphs.
    """
    records = [record for record in manifest.engines if record.backend == flavour.built_by]
    if not records:
        raise BackendUnavailableError(
            f"{bundle} holds no {flavour.built_by} engine; make one with "
            f"{build_command(bundle, flavour.built_by)}"
        )
    for record in records:
        record.check_graphs(bundle, manifest.graphs)
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


def choose_record(
    bundle: Path, records: Sequence[EngineRecord], device: DeviceInfo
) -> EngineRecord:
    """The engine for this GPU: its own before one that is merely compatible.

    Raises:
        BackendUnavailableError: none fits.
    """
    fitting = [record for record in records if record.runs_on(device.sm)]
    if not fitting:
        found = ", ".join(sorted({f"sm{record.sm}" for record in records}))
        backend = records[0].backend
        raise BackendUnavailableError(
            f"{bundle}: its {backend} engines are for {found}, but this GPU ({device.name}) is "
            f"sm{device.sm}; {build_command(bundle, backend, device.sm)}"
        )
    return max(fitting, key=lambda record: record.sm == device.sm)


def check_version(bundle: Path, record: EngineRecord, flavour: Flavour, version: str) -> None:
    """Compare the version that built an engine with the one that is installed.

    Raises:
        BackendUnavailableError: the installed one cannot run it.
    """
    built = str(record.environment.get(flavour.built_with))
    if built == version:
        return
    newer = _numbers(version) >= _numbers(built)
    if record.options.get("version_compatible") and newer:
        return
    raise BackendUnavailableError(
        f"{bundle}: the engine was built with {flavour.built_with} {built}, but "
        f"{flavour.module} {version} is installed; {record.rebuild_command(bundle)}, or install "
        f"version {built}"
    )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def nbytes_on_device(record: EngineRecord, config: RolloutConfig) -> int:
    """Device memory that a first session needs: weights, buffers and scratch."""
    return record.weight_nbytes + plan_memory(config, record.graphs, record.scratch_by_graph).nbytes
