"""Rows of the benchmark: JSON lines that hold what is needed to reproduce them; never edited."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from forcing_kv.export.cost.work import mean_frames, steady_history
from forcing_kv.runtime_trt.bundle.atomic.files import append_line, check_file
from forcing_kv.runtime_trt.bundle.hashes import open_regular
from forcing_kv.runtime_trt.bundle.schema import load_as, parse_json
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.tools.bench.workloads import Workload

SCHEMA = 1
Status = Literal["ok", "gate_failed", "failed"]
"""ok: measured behind a passed gate; gate_failed: wrong results, so no number; failed: an error."""


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


def check_rows(path: Path) -> None:
    """Refuse a file that rows cannot be appended to, before anything is measured.

    Raises:
        InputError: it, or its folder, cannot be written.
    """
    check_file(path, option="--out", force=True, make_folder=True)
    if path.exists() and not os.access(path, os.W_OK):
        raise InputError(f"--out {path}: cannot be written; choose another path")


def append_row(path: Path, row: Row) -> None:
    """Append a row; it is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(path, json.dumps({"schema": SCHEMA, **row.to_json()}, allow_nan=False))


def read_rows(path: Path) -> Iterator[Row]:
    """Read rows in the order in which they were appended.

    Raises:
        InputError: a line is not a row of this schema.
    """
    try:
        with open_regular(path) as file:
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{path}: cannot be read as rows ({error.strerror or error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            content = parse_json(line)
        except ValueError as error:
            raise InputError(f"{where}: not a benchmark row ({error})") from error
        if not isinstance(content, dict) or "schema" not in content:
            raise InputError(f"{where}: not a benchmark row; one is an object with a schema")
        if (schema := content.pop("schema")) != SCHEMA:
            raise InputError(f"{where}: schema {schema!r}, this version reads {SCHEMA}")
        yield load_as(Row, content, f"{where}: not a benchmark row")


def describe_workload(workload: Workload) -> dict[str, Any]:
    """What a row says about its workload."""
    config = workload.config
    static = config.partition.num_static_heads
    total = config.model.num_layers * config.model.num_heads
    return {
        "model": workload.model,
        "size": workload.size,
        "policy": workload.policy,
        "dtype": config.dtype,
        "fp8": workload.fp8,
        "latent_shape": list(config.latent_shape),
        "num_layers": config.model.num_layers,
        "tokens_per_frame": config.chunk.tokens_per_frame,
        "num_steps": config.schedule.num_steps,
        "pixel_frames_per_chunk": workload.pixel_frames,
        "static_heads": static,
        "dynamic_heads": total - static,
        "attended_frames": round(mean_frames(config, steady_history(config)), 4),
        "cache_policy": asdict(config.policy),
    }
