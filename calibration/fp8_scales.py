"""FP8 calibration: the largest input of every linear layer, and what rounding costs each.

Legend: L layers, C linear layers of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from forcing_kv.calibration.artifacts import write_json
from forcing_kv.calibration.heat_map import draw_linears
from forcing_kv.calibration.model_source import ModelSource
from forcing_kv.calibration.rollouts import Rollout, dense_config
from forcing_kv.export.engine import EagerBackend
from forcing_kv.export.fp8 import Fp8Linear
from forcing_kv.export.fp8_file import FP8_FORMAT, FP8_SCHEMA_VERSION, check_amax
from forcing_kv.export.fp8_model import block_linears, scale_of, scales_for
from forcing_kv.runtime_trt.config import DType, RolloutConfig
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.fp8 import FP8_MAX, LINEARS
from forcing_kv.runtime_trt.session import Session
from forcing_kv.runtime_trt.version import project_version

FP8_FILE = "fp8.json"
PICTURE_FILE = "fp8.png"

_Watch = Callable[[str, nn.Module, Tensor], None]
"""(official name, layer, its input): called before the layer runs."""


@contextmanager
def watched(backend: EagerBackend, skip_layers: Sequence[int], watch: _Watch) -> Iterator[None]:
    """Call `watch` in every linear layer of the step that FP8 can serve."""
    skipped = tuple(f"blocks.{layer}." for layer in skip_layers)
    handles = []
    for linear in block_linears(backend.model):
        if linear.name.startswith(skipped):
            continue

        def hook(module: nn.Module, inputs: tuple[Tensor], name: str = linear.name) -> None:
            watch(name, module, inputs[0])

        handles.append(linear.module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class AmaxRecorder:
    """Keeps the largest magnitude of every layer's input."""

    def __init__(self) -> None:
        self._amax: dict[str, Tensor] = {}

    def __call__(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Look at one input."""
        found = x.detach().abs().amax().float()
        before = self._amax.get(name)
        self._amax[name] = found if before is None else torch.maximum(before, found)

    def amax(self) -> dict[str, float]:
        """Of every layer that was seen, by official name.

        Raises:
            InputError: an input was not finite.
        """
        values = {name: float(value) for name, value in self._amax.items()}
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        if bad:
            raise InputError(
                f"the input of {bad[0]} was not finite ({len(bad)} layers); check the weights and "
                "the dtype of the calibration"
            )
        return values


class ErrorRecorder:
    """Runs every layer in FP8 beside its own form, on the same input."""

    def __init__(self, backend: EagerBackend, amax: Mapping[str, float]) -> None:
        self._scales = scales_for(backend.model, amax).linears
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Add one input's squared error and squared output."""
        assert isinstance(module, nn.Linear)
        wanted = nn.functional.linear(x, module.weight, module.bias)
        found = Fp8Linear.of(module, self._scales[name])(x)
        sums = (
            (found.float() - wanted.float()).square().sum(),
            (wanted.float() - module.bias.float()).square().sum(),
        )
        before = self._sums.get(name)
        self._sums[name] = sums if before is None else (before[0] + sums[0], before[1] + sums[1])

    def errors(self) -> dict[str, float]:
        """Root mean square error by that of the product, by official name."""
        return {
            name: float((error / total).sqrt()) if total else 0.0
            for name, (error, total) in self._sums.items()
        }


def measure_amax(
    backend: EagerBackend,
    rollouts: Sequence[Rollout],
    num_chunks: int,
    skip_layers: Sequence[int] = (),
    on_chunk: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Generate videos and return the largest input of every layer, by official name.

    Raises:
        InputError: an input was not finite.
    """
    recorder = AmaxRecorder()
    with watched(backend, skip_layers, recorder):
        for rollout in rollouts:
            _generate(Session(backend), rollout, num_chunks, on_chunk)
    return recorder.amax()


def _generate(
    session: Session, rollout: Rollout, num_chunks: int, on_chunk: Callable[[], object]
) -> None:
    session.reset()
    session.set_prompt(rollout.prompt_embeds)
    for _ in session.stream(num_chunks, seed=rollout.seed):
        on_chunk()


@dataclass(frozen=True)
class Fp8Calibration:
    """Every prompt of a model with every seed, generated under dense attention."""

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
        source = self.source
        window = self.window_frames or self.num_chunks * source.chunk.num_frames
        return dense_config(source.model, source.chunk, window, 0, source.schedule, self.dtype)

    @property
    def rollouts(self) -> list[Rollout]:
        """The videos to generate."""
        prompts = self.source.prompts.items()
        return [Rollout(name, embeds, seed) for name, embeds in prompts for seed in self.seeds]

    @property
    def num_chunks_in_all(self) -> int:
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

    def run(self, on_chunk: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Measure.

        Args:
            on_chunk: called after each of `num_chunks_in_all` chunks.

        Returns:
            The content of `fp8.json`.
        """
        backend = EagerBackend(self.source.model, self.config, self.device)
        with closing(backend):
            amax = measure_amax(backend, self.rollouts, self.num_chunks, self.skip_layers, on_chunk)
            errors = ErrorRecorder(backend, amax)
            with watched(backend, self.skip_layers, errors):
                _generate(Session(backend), self.rollouts[0], 1, on_chunk)
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

    def write(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Write `fp8.json` and `fp8.png` to a folder."""
        errors = np.full((self.source.model.shape.num_layers, len(LINEARS)), np.nan)
        for name, entry in record["linears"].items():
            _, layer, linear = name.split(".", 2)
            errors[int(layer), LINEARS.index(linear)] = entry["error"]
        draw_linears(
            folder / PICTURE_FILE, errors, LINEARS,
            f"{self.source.name}: FP8 against {self.dtype}, layer by layer",
        )  # fmt: skip
        write_json(folder / FP8_FILE, record)
