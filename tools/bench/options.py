"""What the benchmark's commands are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from forcing_kv.export.request.flags import Computed, File, Int, Json, PositiveInt, between, flags
from forcing_kv.runtime_trt.dtypes import DType

DeviceName = Literal["cuda", "cpu"]


@flags()
@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """What is measured, and how long."""

    subject: tuple[str, ...] = ()
    """What to measure; repeat it. `--list` names them all."""
    model: str = "wan-1.3b"
    """wan-1.3b (random weights), digits or golden."""
    size: str | None = None
    """480p, 720p, 1080p, pixels: 832x480px, or latent rows x columns. Default: 480p, or the model's
    own."""
    device: DeviceName = "cuda"
    """Where it runs."""
    dtype: DType | None = None
    """What it computes in. Default: bfloat16 on CUDA, float32 on a CPU."""
    chunks: Annotated[Int, between(5)] = 20
    """Measured chunks."""
    warmup_chunks: PositiveInt = 12
    """Chunks before them, to the steady state."""
    gate_chunks: Annotated[Int, between(4)] = 7
    """Chunks of the correctness gate's rollout."""
    bundle: Path | None = None
    """Measure this bundle instead of a model."""
    backend: str = "auto"
    """The bundle's backend."""
    digest: str | None = None
    """Refuse a bundle with another, which `fkv export` and `fkv inspect` print."""
    folder: Path = Path(".bench")
    """Where reference rollouts are kept between calls."""
    commit: str | None = None
    """Commit to record, where there is no git checkout."""
    threads: PositiveInt = 1
    """PyTorch threads on a CPU."""


@flags()
@dataclass(frozen=True, kw_only=True)
class RolloutRequest(BenchRequest):
    """A measurement over many chunks."""

    chunks: Annotated[Int, between(5)] = 50
    """Measured chunks."""


@flags()
@dataclass(frozen=True, kw_only=True)
class LoadRequest(BenchRequest):
    """A measurement of what comes before the first frame."""

    chunks: Annotated[int, Computed] = 5
    warmup_chunks: Annotated[int, Computed] = 1


@flags()
@dataclass(frozen=True, kw_only=True)
class BenchOutput:
    """Where rows go, and what is shown."""

    out: File | None = None
    """Append every row to this file (JSON lines)."""
    list_subjects: Annotated[bool, Parameter(name="--list")] = False
    """Name every subject and stop."""
    as_json: Json = False
    """Print the rows."""


@flags()
@dataclass(frozen=True)
class SuiteOptions:
    """How a suite is run."""

    out: File
    """File that rows are appended to (JSON lines)."""
    folder: Path = Path(".bench")
    """Where reference rollouts, measured tactics and compiled kernels are kept."""
    only: tuple[str, ...] = ()
    """Run items whose name contains this; repeat it. Default: all."""
    budget_s: float | None = None
    """Stop within this time, and start no item that could not be finished; call again to go on."""
    force: bool = False
    """Measure again what is there."""
    commit: str | None = None
    """Commit to record, where there is no git checkout."""
    layers: PositiveInt | None = None
    """Layers of wan-1.3b on a CPU, at its true width, heads and lengths. Default: 2."""
    rounds: PositiveInt = 2
    """How often each is measured there."""
    size: tuple[str, ...] = ()
    """480p, 720p, 1080p, pixels: 832x480px, or latent rows x columns, there; repeat it. Default:
    the three."""
    dtype: tuple[DType, ...] = ()
    """What is computed in there; repeat it. Default: float32, and bfloat16 where the CPU has it."""
    gpu: Annotated[str | None, Computed] = None
    """Name of this machine's GPU: what another one has measured is not done here."""
