"""FP8 calibration: the largest input of every linear layer, and what rounding costs each.

Legend: L layers, C linear layers of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from forcing_kv.calibration.fp8.recorder import ErrorRecorder, measure_amax, watched
from forcing_kv.calibration.heads.picture import draw_linears
from forcing_kv.calibration.model_source import ModelSource
from forcing_kv.calibration.rollouts import Rollout
from forcing_kv.export.checkpoint.fp8_file import FP8_FORMAT, FP8_SCHEMA_VERSION, check_amax
from forcing_kv.export.model.fp8_layers import scale_of
from forcing_kv.export.verify.eager import EagerBackend
from forcing_kv.runtime_trt.bundle.atomic.files import write_json
from forcing_kv.runtime_trt.bundle.fp8 import FP8_MAX, LINEARS
from forcing_kv.runtime_trt.console import project_version
from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.session import Session


@dataclass(frozen=True)
class Fp8Calibration:
    """Every prompt of a model with every seed, generated under dense attention."""

    FILES: ClassVar = ("fp8.json", "fp8.png")

    source: ModelSource
    num_chunks: int = 2
    seeds: tuple[int, ...] = (0, 1)
    window_frames: int | None = None
    """Frames that a query sees, sink and own chunk included; None lets it see all."""
    skip_layers: tuple[int, ...] = ()
    """Blocks that are left in the compute dtype."""
    dtype: DType = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        num_layers = self.source.model.shape.num_layers
        wrong = [layer for layer in self.skip_layers if not 0 <= layer < num_layers]
        if wrong or len(set(self.skip_layers)) == num_layers:
            raise InputError(
                f"layers to skip are {list(self.skip_layers)}; give some, not all, of 0 to "
                f"{num_layers - 1}"
            )
        check_amax({}, self.source.model.shape, self.source.name)

    @property
    def config(self) -> RolloutConfig:
        """The dense rollout."""
        return self.source.dense_config(self.num_chunks, self.window_frames, self.dtype)

    @property
    def rollouts(self) -> list[Rollout]:
        """The videos to generate."""
        return self.source.rollouts(self.seeds)

    @property
    def num_ticks(self) -> int:
        """Chunks to generate: every rollout, and one more to measure errors on."""
        return len(self.rollouts) * self.num_chunks + 1

    @property
    def description(self) -> str:
        """What will run, one line."""
        num_linears = (self.source.model.shape.num_layers - len(self.skip_layers)) * len(LINEARS)
        return (
            f"{self.source.name}: {len(self.source.prompts)} prompts x {len(self.seeds)} seeds, "
            f"{self.num_chunks} chunks each; {num_linears} linear layers to FP8"
        )

    def run(self, on_tick: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Measure.

        Args:
            on_tick: called after each of `num_ticks` chunks.

        Returns:
            The content of `fp8.json`.
        """
        backend = EagerBackend(self.source.model, self.config, self.device)
        with closing(backend):
            amax = measure_amax(backend, self.rollouts, self.num_chunks, self.skip_layers, on_tick)
            errors = ErrorRecorder(backend, amax)
            with watched(backend, self.skip_layers, errors):
                for _ in self.rollouts[0].generate(Session(backend), 1):
                    on_tick()
        return self._record(amax, errors.errors())

    def _record(self, amax: Mapping[str, float], errors: Mapping[str, float]) -> dict[str, Any]:
        config = self.config
        return {
            "format": FP8_FORMAT,
            "schema_version": FP8_SCHEMA_VERSION,
            "tool": {"name": "forcing-kv", "version": project_version()},
            "model": {"sha256": self.source.sha256, "shape": asdict(config.model)},
            "rollouts": {
                "prompts": list(self.source.prompts),
                "seeds": list(self.seeds),
                "num_chunks": self.num_chunks,
                "chunk": asdict(config.chunk),
                "policy": asdict(config.policy),
                "schedule": asdict(config.schedule),
                "dtype": config.dtype,
            },
            "linears": {
                name: {
                    "amax": value,
                    "headroom": FP8_MAX * scale_of(value) / value if value else None,
                    "error": errors[name],
                }
                for name, value in amax.items()
            },
        }

    def write(self, folder: Path, measured: dict[str, Any]) -> dict[str, Any]:
        """Write what was measured, `fp8.json`, and `fp8.png` to a folder; returns it."""
        file, picture = self.FILES
        errors = np.full((self.source.model.shape.num_layers, len(LINEARS)), np.nan)
        for name, entry in measured["linears"].items():
            _, layer, linear = name.split(".", 2)
            errors[int(layer), LINEARS.index(linear)] = entry["error"]
        draw_linears(
            folder / picture, errors, LINEARS,
            f"{self.source.name}: FP8 against {self.dtype}, layer by layer",
        )  # fmt: skip
        write_json(folder / file, measured)
        return measured
