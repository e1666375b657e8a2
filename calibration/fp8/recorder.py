"""Observes linear layers of rollouts in the eager engine: largest inputs, errors in FP8.

Needs PyTorch and numpy alone, so that the benchmark can use it where nothing else is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from forcing_kv.calibration.rollouts import Rollout
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.model.fp8 import Fp8Linear
from forcing_kv.export.model.fp8_layers import block_linears, scales_for
from forcing_kv.export.verify.eager import EagerBackend
from forcing_kv.runtime_trt.bundle.fp8 import Fp8Scales
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.session import Session

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


def scales_of_one_chunk(
    model: CausalWanModel, config: RolloutConfig, prompt: NDArray[np.float32], device: str = "cpu"
) -> Fp8Scales:
    """Scales of every linear layer by the first chunk that a model makes itself."""
    with closing(EagerBackend(model, config, device)) as backend:
        return scales_for(model, measure_amax(backend, [Rollout("", prompt, 0)], 1))


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
            for _ in rollout.generate(Session(backend), num_chunks):
                on_chunk()
    return recorder.amax()
