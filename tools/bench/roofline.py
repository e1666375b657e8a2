"""Work of one denoise step and the time that it takes at least: the bound beside every number."""

from __future__ import annotations

from dataclasses import dataclass

from forcing_kv.runtime_trt.config import RolloutConfig
from forcing_kv.tools.bench.workloads import mean_attended_frames

PEAK_TFLOPS = {"NVIDIA H200": 790.0, "NVIDIA H100 80GB HBM3": 798.0}
"""bf16 matrix product of 8192 x 8192 x 8192 on random data, measured through PyTorch (TFLOP/s)."""

PEAK_TBPS = {"NVIDIA H200": 4.3, "NVIDIA H100 80GB HBM3": 3.0}
"""Large device-to-device copy, bytes read plus bytes written, measured through PyTorch (TB/s)."""


@dataclass(frozen=True)
class StepWork:
    """Floating-point operations of one forward over a chunk in steady state."""

    linear_flop: float
    """Every matrix product with weights."""
    cross_flop: float
    """Attention to the text."""
    self_flop: float
    """Attention to history and own chunk."""
    fp8_flop: float = 0.0
    """Those products with weights that are in FP8."""

    @property
    def total_flop(self) -> float:
        """All of it."""
        return self.linear_flop + self.cross_flop + self.self_flop

    def ideal_ms(self, device: str) -> float | None:
        """Time at the device's measured matrix rate; None where that is not known.

        FP8 products count as twice as fast, as NVIDIA specifies them.
        """
        peak = PEAK_TFLOPS.get(device)
        return None if peak is None else (self.total_flop - self.fp8_flop / 2) / peak / 1e9


def step_work(config: RolloutConfig, *, fp8: bool = False) -> StepWork:
    """Count the work of a steady denoise step, linear layers of the blocks in FP8 or not."""
    model, tokens = config.model, config.chunk.num_tokens
    # Self-attention has four square matrices; cross-attention two, for its k and v are per prompt.
    block = 6 * model.dim**2 + 2 * model.dim * model.ffn_dim
    patch = model.patch_size**2 * model.in_channels * model.dim
    keys = mean_attended_frames(config) * config.chunk.tokens_per_frame
    attention = 4.0 * tokens * model.dim * model.num_layers
    return StepWork(
        linear_flop=2.0 * tokens * (model.num_layers * block + 2 * patch),
        cross_flop=attention * model.text_len,
        self_flop=attention * keys,
        fp8_flop=2.0 * tokens * model.num_layers * block if fp8 else 0.0,
    )
