"""Device memory of a deployment, from its configuration alone: weights, buffers, activations.

Byte counts of weights and buffers are exact; activations are an estimate. Nothing is loaded, and
torch is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from forcing_kv.runtime_trt.bundle.fp8 import LINEARS, Fp8Counts
from forcing_kv.runtime_trt.cuda.buffers import BufferSpec
from forcing_kv.runtime_trt.cuda.chunk_program import plan_memory
from forcing_kv.runtime_trt.dtypes import DTYPES, DType
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ModelShape
from forcing_kv.runtime_trt.rollout.ports import Family, ports, steady_name
from forcing_kv.runtime_trt.rollout.timeline import KINDS

FLOAT32_NBYTES = 4
OVERHEAD_NBYTES = 1_000_000_000
"""Driver context, libraries and allocator slack that a process needs beside what is counted."""


@dataclass(frozen=True)
class WeightCount:
    """Parameters of one part of the model."""

    compute: int
    """In the compute dtype."""
    float32: int = 0
    """In float32 whatever the compute dtype: norms, modulation, time embedding."""
    fp8: int = 0
    """Those of `compute` that are in FP8 instead."""

    @property
    def total(self) -> int:
        return self.compute + self.float32

    def nbytes(self, dtype: DType) -> int:
        wide = self.compute - self.fp8
        return wide * DTYPES[dtype].nbytes + self.fp8 + self.float32 * FLOAT32_NBYTES


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


NO_FP8: Fp8Counts = MappingProxyType({})


def all_fp8(model: ModelShape) -> Fp8Counts:
    """Every layer that FP8 serves, in every block."""
    return dict.fromkeys(LINEARS, model.num_layers)


def weight_counts(model: ModelShape, fp8: Fp8Counts = NO_FP8) -> dict[str, WeightCount]:
    """Parameters by part; `text ...` is what the prompt graph holds, the step graph the rest."""
    dim, ffn, layers = model.dim, model.ffn_dim, model.num_layers
    patch = model.patch_size**2 * model.in_channels
    square = _linear(dim, dim)
    time = _linear(model.freq_dim, dim) + square + _linear(dim, 6 * dim)

    def rounded(part: str) -> int:
        width = ffn if part == "ffn" else dim
        return sum(dim * width * n for name, n in fp8.items() if name.startswith(f"{part}."))

    return {
        "projections": WeightCount(layers * 4 * square, layers * 2 * dim, rounded("self_attn")),
        "cross-attention": WeightCount(layers * 2 * square, layers * dim, rounded("cross_attn")),
        "feed-forward": WeightCount(
            layers * (_linear(dim, ffn) + _linear(ffn, dim)), 0, rounded("ffn")
        ),
        "norms and modulation": WeightCount(0, layers * (2 * dim + 6 * dim) + 2 * dim),
        "embeddings and head": WeightCount(_linear(patch, dim) + _linear(dim, patch), time),
        "text embedding": WeightCount(_linear(model.text_dim, dim) + square),
        "text keys and values": WeightCount(layers * 2 * square, layers * dim),
    }


def num_parameters(model: ModelShape) -> int:
    """Parameters of the whole denoiser."""
    return sum(count.total for count in weight_counts(model).values())


def engine_nbytes(
    model: ModelShape, dtype: DType, fp8: Fp8Counts = NO_FP8, *, native_attention: bool = False
) -> dict[str, int]:
    """Weights that each engine holds.

    Args:
        native_attention: whether steady chunks have an engine of their own, which holds the weights
            of a step once more: TensorRT's `--attention native`, and TensorRT-RTX.
    """
    sizes = {"prompt": 0, "step": 0}
    for part, count in weight_counts(model, fp8).items():
        sizes["prompt" if part.startswith("text") else "step"] += count.nbytes(dtype)
    return sizes | ({steady_name("step"): sizes["step"]} if native_attention else {})


_PURPOSES: Mapping[Family | None, str] = {
    "new": "K/V of the chunk",
    "dyn": "K/V of the eviction",
    "cross": "K/V of the text",
    None: "inputs and outputs",
}


def buffer_nbytes(config: RolloutConfig) -> dict[str, int]:
    """Bytes of every buffer that a session binds to its graphs, by purpose.

    The CUDA-graph runtime keeps those of the eviction in scratch memory, or where the engine left
    them: see `MemoryCost`.
    """
    row = config.model.head_dim * DTYPES[config.dtype].nbytes
    sizes = {f"K/V {kind}": 0 for kind in KINDS}
    for layout in config.layouts:
        for group in layout.groups:
            sizes[f"K/V {group.kind}"] += 2 * group.num_rows * row
        # A layer that keeps nothing still has one row, so that no binding is empty.
        unowned = layout.num_rows - sum(group.num_rows for group in layout.groups)
        sizes[f"K/V {layout.groups[0].kind}"] += 2 * unowned * row
    sizes |= dict.fromkeys(_PURPOSES.values(), 0)
    graphs = ports(config).values()
    for port in {port for graph in graphs for port in (*graph.inputs, *graph.outputs)}:
        if port.family != "hist":
            nbytes = BufferSpec(port.name, port.shape, port.dtype).nbytes
            sizes[_PURPOSES[port.family]] += nbytes
    return sizes


def replay_nbytes(config: RolloutConfig) -> int:
    """Bytes that the CUDA-graph runtime holds beside the bound buffers.

    Every step has latents and scalars of its own, for addresses are fixed, and two sets of results
    wait for their copy to the host. Buffers start on multiples of 256 bytes, which is not counted.
    """
    specs = plan_memory(config, ports(config), {}).specs.values()
    return sum(spec.nbytes for spec in specs) - sum(buffer_nbytes(config).values())


def activation_nbytes(config: RolloutConfig) -> int:
    """Estimate of the scratch of one step: the widest point of a block, attention not unfolded."""
    model, size = config.model, DTYPES[config.dtype].nbytes
    attention = 6 * model.dim  # residual, normed input, q, k, v and the output
    feed_forward = 2 * model.dim + model.ffn_dim
    islands = 2 * model.dim * FLOAT32_NBYTES  # a norm's input and output
    return config.chunk.num_tokens * (max(attention, feed_forward) * size + islands)


@dataclass(frozen=True)
class MemoryCost:
    """Device memory of one session."""

    weights: int
    buffers: Mapping[str, int]
    activations: int
    """An estimate of the scratch beyond the keys and values of the eviction, which lie in it."""
    copies: int = 0
    """What the CUDA-graph runtime holds beside the buffers."""

    @classmethod
    def of(
        cls, config: RolloutConfig, fp8: Fp8Counts = NO_FP8, *, native_attention: bool = False
    ) -> MemoryCost:
        """See `engine_nbytes` for `native_attention`."""
        engines = engine_nbytes(config.model, config.dtype, fp8, native_attention=native_attention)
        weights = sum(engines.values())
        buffers = buffer_nbytes(config)
        activations = max(0, activation_nbytes(config) - buffers["K/V of the eviction"])
        return cls(weights, buffers, activations, replay_nbytes(config))

    @property
    def kv_nbytes(self) -> int:
        """Self-attention's keys and values on a GPU: the past and the chunk's own rows."""
        names = (*(f"K/V {kind}" for kind in KINDS), _PURPOSES["new"])
        return sum(self.buffers[name] for name in names)

    @property
    def total(self) -> int:
        """Everything, the overhead of the process included."""
        counted = self.weights + sum(self.buffers.values()) + self.copies
        return counted + self.activations + OVERHEAD_NBYTES

    def fits(self, memory_gib: int) -> bool:
        """Whether one session runs on a card of this size."""
        return self.total <= memory_gib * 2**30
