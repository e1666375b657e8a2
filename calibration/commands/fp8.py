"""`fkv calibrate fp8`: the scales by which linear layers run in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forcing_kv.calibration.options import CalibrationOutput, RolloutOptions, SourceOptions
from forcing_kv.export.request.flags import Integers, PositiveInt, flags
from forcing_kv.runtime_trt.console import console


@flags()
@dataclass(frozen=True, kw_only=True)
class Fp8Rollouts(RolloutOptions):
    """Rollouts whose linear layers are watched."""

    num_chunks: PositiveInt = 2
    """Chunks of a rollout."""
    device: str = "cpu"
    """PyTorch device."""


def calibrate_fp8(
    *,
    output: CalibrationOutput,
    model: SourceOptions = SourceOptions(),
    skip_layers: Integers = (),
    rollouts: Fp8Rollouts = Fp8Rollouts(),
) -> None:
    """Measure how large the inputs of a model's linear layers get, for `fkv export --fp8`.

    Generates videos, keeps the largest magnitude of each layer's input, then measures layer by
    layer what rounding inputs and weights to 8 bits (E4M3) changes, and draws it.

    Args:
        skip_layers: Blocks to leave in the compute dtype, such as 0,29.
    """
    from forcing_kv.calibration.fp8.scales import Fp8Calibration
    from forcing_kv.calibration.model_source import load_source

    output.check(Fp8Calibration.FILES)
    calibration = Fp8Calibration(
        load_source(model), rollouts.num_chunks, rollouts.seeds, rollouts.window_frames,
        skip_layers, model.dtype, rollouts.device,
    )  # fmt: skip
    output.carry_out(calibration, "watching linear layers", _show)


def _show(record: Mapping[str, Any]) -> None:
    """Print a row for each kind of layer: range of its inputs, error of its outputs."""
    from rich.table import Table

    from forcing_kv.runtime_trt.bundle.fp8 import LINEARS

    table = Table("linear layer", "largest input", "mean error", "worst error", "in block")
    for kind in LINEARS:
        found = {
            int(name.split(".")[1]): entry
            for name, entry in record["linears"].items()
            if name.endswith(f".{kind}")
        }
        worst = max(found, key=lambda layer: found[layer]["error"])
        errors = [entry["error"] for entry in found.values()]
        table.add_row(
            kind,
            f"{max(entry['amax'] for entry in found.values()):.3g}",
            f"{sum(errors) / len(errors):.2%}",
            f"{found[worst]['error']:.2%}",
            str(worst),
        )
    console().print(table)
