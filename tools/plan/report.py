"""One deployment's predicted memory, arithmetic and time, as data, table and picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, BinaryIO

from forcing_kv.export.cost.devices import MEMORY_SIZES_GIB, Device
from forcing_kv.export.cost.memory import (
    OVERHEAD_NBYTES,
    MemoryCost,
    engine_nbytes,
    num_parameters,
)
from forcing_kv.export.cost.work import (
    PartCost,
    attended_nbytes,
    fps_bound,
    histories,
    mean_frames,
    num_passes,
    steady_history,
    step_cost,
)
from forcing_kv.runtime_trt.bundle.fp8 import Fp8Counts
from forcing_kv.runtime_trt.console import screen
from forcing_kv.runtime_trt.errors import require
from forcing_kv.runtime_trt.rollout.config import RolloutConfig

GB = 1e9
FPS_DEFINITION = "pixel frames per second of the denoiser alone: no VAE, no text encoder"


@dataclass(frozen=True)
class Plan:
    """Predictions for one configuration on one device."""

    name: str
    """What it is, in a word or two: a column's title."""
    config: RolloutConfig
    device: Device
    heads_source: str
    """Where the head partition comes from."""
    num_chunks: int
    """Chunks that the mean is taken over."""
    fp8: Fp8Counts = field(default_factory=dict)
    """Linear layers in FP8."""
    native_attention: bool = False
    """Whether steady chunks have an engine of their own."""

    @property
    def engines(self) -> dict[str, int]:
        """Bytes of weights that each engine holds."""
        config, native = self.config, self.native_attention
        return engine_nbytes(config.model, config.dtype, self.fp8, native_attention=native)

    @property
    def memory(self) -> MemoryCost:
        """Device memory of one session."""
        return MemoryCost.of(self.config, self.fp8, native_attention=self.native_attention)

    @property
    def steady(self) -> tuple[PartCost, ...]:
        """A step once nothing changes any more."""
        return step_cost(self.config, [steady_history(self.config)], self.fp8)

    @property
    def mean(self) -> tuple[PartCost, ...]:
        """The mean step of the first chunks."""
        return step_cost(self.config, histories(self.config, self.num_chunks), self.fp8)

    def warmup_nbytes(self) -> dict[str, int]:
        """Bytes of the K/V pools with either kind of warm-up."""
        policy = self.config.policy
        return {
            kind: replace(self.config, policy=replace(policy, warmup=kind)).nbytes_kv
            for kind in ("exact", "steady")
        }

    def fits(self) -> dict[int, bool]:
        """Whether it runs on cards of the usual sizes and on the device, by GiB."""
        sizes = sorted({*MEMORY_SIZES_GIB, self.device.memory_gib})
        return {size: self.memory.fits(size) for size in sizes}

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        config, memory, device = self.config, self.memory, self.device
        history = steady_history(config)
        return {
            "name": self.name,
            "latent_size": [config.chunk.latent_height, config.chunk.latent_width],
            "dtype": config.dtype,
            "fp8_linears": sum(self.fp8.values()),
            "device": {**asdict(device), "sustained_tflops": device.sustained_tflops(config.dtype)},
            "policy": asdict(config.policy),
            "heads": {
                "static": config.partition.num_static_heads,
                "total": config.model.num_layers * config.model.num_heads,
                "source": self.heads_source,
            },
            "num_parameters": num_parameters(config.model),
            "memory_nbytes": {
                "engines": self.engines,
                "buffers": dict(memory.buffers),
                "replay_copies": memory.copies,
                "activations_estimate": memory.activations,
                "overhead_assumed": OVERHEAD_NBYTES,
                "total": memory.total,
            },
            "kv_nbytes": {
                "pools": config.nbytes_kv,
                "allocated": memory.kv_nbytes,
                "attended": attended_nbytes(config, history),
                "warmup": self.warmup_nbytes(),
            },
            "fits_gib": self.fits(),
            "passes_per_chunk": num_passes(config),
            "steady_step": {
                "frames_attended": mean_frames(config, history),
                **self._step_json(self.steady),
            },
            "mean_step": {"num_chunks": self.num_chunks, **self._step_json(self.mean)},
            "fps_bound": {
                "definition": FPS_DEFINITION,
                "steady": fps_bound(config, self.steady, device),
                "mean": fps_bound(config, self.mean, device),
            },
        }

    def _step_json(self, parts: Sequence[PartCost]) -> dict[str, Any]:
        return {
            "tflop": sum(part.flops for part in parts) / 1e12,
            "ideal_ms": sum(self._ms(part) for part in parts),
            "parts": {
                part.name: {"tflop": part.flops / 1e12, "ideal_ms": self._ms(part)}
                for part in parts
            },
        }

    def _ms(self, part: PartCost) -> float:
        return part.ideal_ms(self.device, self.config.dtype)

    def sections(self) -> dict[str, dict[str, str]]:
        """Rows of the printed tables, by table."""
        config, memory = self.config, self.memory
        history = steady_history(config)
        kv = {key: size for key, size in memory.buffers.items() if size}
        rows = {f"weights, {name} engine": _gb(size) for name, size in self.engines.items()}
        rows |= {name: _gb(memory.buffers.get(name, 0)) for name in kv}
        rows |= {
            "copies for the replay": _gb(memory.copies),
            "activations (estimate)": _gb(memory.activations),
            "process overhead (assumed)": _gb(OVERHEAD_NBYTES),
            "total": _gb(memory.total),
            "fits": ", ".join(f"{size}: {_yes(fits)}" for size, fits in self.fits().items()),
            "K/V pools": _gb(config.nbytes_kv),
            "K/V allocated, own rows included": _gb(memory.kv_nbytes),
            "K/V pools, exact / steady warm-up": " / ".join(
                _gb(size) for size in self.warmup_nbytes().values()
            ),
        }
        steps = {}
        for part in self.steady:
            steps[part.name] = f"{part.flops / 1e12:.2f} TFLOP, {self._ms(part):.2f} ms"
        steady, mean = self._step_json(self.steady), self._step_json(self.mean)
        steps |= {
            "all": f"{steady['tflop']:.2f} TFLOP, {steady['ideal_ms']:.2f} ms",
            "frames attended by a head, own included": f"{mean_frames(config, history):.2f}",
            "K/V attended": _gb(attended_nbytes(config, history)),
            "FPS bound": f"{fps_bound(config, self.steady, self.device):.1f}",
            f"mean of the first {self.num_chunks} chunks": (
                f"{mean['tflop']:.2f} TFLOP, {mean['ideal_ms']:.2f} ms, "
                f"{fps_bound(config, self.mean, self.device):.1f} FPS"
            ),
        }
        return {"Memory of one session": rows, "Steady step": steps}


def _gb(nbytes: float) -> str:
    return f"{nbytes / GB:.2f} GB" if nbytes >= GB / 100 else f"{nbytes / 1e6:.3f} MB"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def print_tables(plans: Sequence[Plan]) -> None:
    """Print the plans side by side on stdout."""
    from rich.table import Table

    out = screen()
    sections = [plan.sections() for plan in plans]
    for title in sections[0]:
        columns = [section[title] for section in sections]
        names = [name for column in columns for name in column]
        table = Table("part", *(plan.name for plan in plans), title=title, title_justify="left")
        for name in dict.fromkeys(names):
            table.add_row(name, *(column.get(name, "-") for column in columns))
        out.print(table)
    device = plans[0].device
    fp8 = f" ({device.sustained_fp8_tflops:.0f} in FP8)" if plans[0].fp8 else ""
    out.print(
        f"ideal times: {device.title}, {device.sustained_tflops(plans[0].config.dtype):.0f}{fp8} "
        f"TFLOP/s sustained, {device.bandwidth_gbps:.0f} GB/s\nFPS: {FPS_DEFINITION}"
    )


def draw(file: BinaryIO, plans: Sequence[Plan]) -> None:
    """Draw memory and ideal step time of the plans as stacked bars, a PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 + 2.2 * len(plans), 5), dpi=120, layout="constrained")
    memory_axes, time_axes = figure.subplots(1, 2)
    memory, times = [], []
    for plan in plans:
        cost = plan.memory
        bars = {
            "weights": cost.weights,
            **cost.buffers,
            "copies for the replay": cost.copies,
            "activations (estimate)": cost.activations,
            "process overhead (assumed)": OVERHEAD_NBYTES,
        }
        memory.append({name: size / GB for name, size in bars.items()})
        times.append({part.name: plan._ms(part) for part in plan.steady})
    names = [plan.name for plan in plans]
    _stack(memory_axes, memory, names, "Memory of one session, GB")
    _stack(time_axes, times, names, f"Ideal steady step on {plans[0].device.title}, ms")
    figure.savefig(file, format="png")


def _stack(
    axes: Any, columns: Sequence[dict[str, float]], names: Sequence[str], title: str
) -> None:
    bottoms = [0.0] * len(columns)
    for part in dict.fromkeys(part for column in columns for part in column):
        heights = [column.get(part, 0.0) for column in columns]
        if not any(heights):
            continue
        axes.bar(names, heights, bottom=bottoms, width=0.55, label=part)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for place, total in enumerate(bottoms):
        axes.annotate(f"{total:.3g}", (place, total), ha="center", va="bottom")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.08)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], fontsize=7, frameon=False, loc="upper center",
        bbox_to_anchor=(0.5, -0.08), ncols=2,
    )  # fmt: skip
