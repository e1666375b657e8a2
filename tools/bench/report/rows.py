"""Rows of the benchmark: JSON lines that hold what is needed to reproduce them; never edited."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from forcing_kv.export.cost_model import mean_frames, steady_history
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.tools.bench.workloads import Workload

SCHEMA = 1
Status = Literal["ok", "gate_failed", "failed"]
"""ok: measured behind a passed gate; gate_failed: wrong results, so no number; failed: an error."""

_PACKAGES = ("torch", "triton", "onnxruntime", "tensorrt", "tensorrt-rtx", "cuda-bindings", "numpy")


@dataclass(frozen=True)
class Row:
    """One measurement, or the reason why there is none."""

    kind: str
    """load, chunk, step, rollout, decode, growth; ops, checks, tactics; or `rest`: why what follows
    a chunk's number is missing."""
    subject: str
    workload: Mapping[str, Any]
    environment: Mapping[str, Any]
    status: Status = "ok"
    error: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Numbers, by names that `docs/performance.md` defines."""
    gate: Mapping[str, Any] | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    """Warm-up, repetitions, seed."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; null for a number that is not finite, which JSON does not know."""
        plain: dict[str, Any] = _finite(asdict(self))
        return plain

    @property
    def machine(self) -> str:
        """What it ran on, in a word: the GPU's name, or `cpu`."""
        return str(self.environment.get("gpu") or self.environment.get("device"))

    @property
    def group(self) -> tuple[str, ...]:
        """Model, size, dtype and machine: rows of the same can be compared."""
        names = ("model", "size", "dtype")
        return (*(str(self.workload.get(name)) for name in names), self.machine)

    @property
    def label(self) -> str:
        """The group in words."""
        return " ".join(part for part in self.group if part not in ("native", "None"))

    @property
    def key(self) -> tuple[str, ...]:
        """What the row measures: a later row of the same key replaces it in reports."""
        work = self.workload
        return (
            self.kind, self.subject, self.machine,
            *(str(work.get(name)) for name in ("model", "size", "policy", "dtype")),
            str(self.run.get("asked_chunks")),
        )  # fmt: skip


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def failed_kind(made: Iterable[Row]) -> str:
    """Kind of the row that says why a subject has no further rows: a number that is there stays."""
    return "rest" if any(row.kind == "chunk" and row.status == "ok" for row in made) else "chunk"


def append_row(path: Path, row: Row) -> None:
    """Append a row; it is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        line = json.dumps({"schema": SCHEMA, **row.to_json()}, allow_nan=False)
        file.write(f"{line}\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> Iterator[Row]:
    """Read rows in the order in which they were appended.

    Raises:
        InputError: a line is not a row of this schema.
    """
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            schema = content.pop("schema")
            row = Row(**content)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number}: not a benchmark row ({error})") from error
        if schema != SCHEMA:
            raise InputError(f"{path}:{number}: schema {schema}, this version reads {SCHEMA}")
        yield row


def describe_workload(workload: Workload) -> dict[str, Any]:
    """What a row says about its workload."""
    config = workload.config
    static = sum(len(heads) for heads in config.partition.static_heads)
    total = config.model.num_layers * config.model.num_heads
    return {
        "model": workload.model,
        "size": workload.size,
        "policy": workload.policy,
        "dtype": config.dtype,
        "fp8": workload.fp8,
        "latent_shape": list(config.latent_shape),
        "tokens_per_frame": config.chunk.tokens_per_frame,
        "num_steps": config.schedule.num_steps,
        "pixel_frames_per_chunk": workload.pixel_frames,
        "static_heads": static,
        "dynamic_heads": total - static,
        "attended_frames": round(mean_frames(config, steady_history(config)), 4),
        "cache_policy": asdict(config.policy),
    }


def describe_environment(device: str, commit: str | None = None) -> dict[str, Any]:
    """Machine, versions and commit."""
    found: dict[str, Any] = {
        "device": device,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "python": platform.python_version(),
        "versions": _versions(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_nbytes": properties.total_memory,
            "sm": f"{properties.major}{properties.minor}",
            "cuda": torch.version.cuda,
            **_driver(),
        }
    else:
        import torch

        found |= {
            "cpu": _cpu_name(),
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
    return found


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    """Commit of the working tree, with a plus where it differs; None outside of one."""
    folder = Path(__file__).parent
    try:
        run = [
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return run[0].stdout.strip() + ("+" if run[1].stdout.strip() else "")


_SMI_FIELDS = {
    "driver": "driver_version",
    "power_limit_w": "power.limit",
    "max_sm_mhz": "clocks.max.sm",
}
"""Our name of what `nvidia-smi` tells of the first GPU -> its own."""


def _driver() -> dict[str, str | None]:
    """Driver, power limit and highest clock, as `nvidia-smi` prints them."""
    query = f"--query-gpu={','.join(_SMI_FIELDS.values())}"
    words = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return dict.fromkeys(_SMI_FIELDS)
    values = next(iter(done.stdout.splitlines()), "").split(",")
    found = zip(_SMI_FIELDS, values, strict=False)
    return dict.fromkeys(_SMI_FIELDS) | {name: value.strip() or None for name, value in found}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
