"""What is benchmarked: a model, a resolution and a cache policy, each under a fixed name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from forcing_kv.export.cost.devices import MEASURED_TFLOPS
from forcing_kv.export.cost.work import (
    History,
    clean_flops,
    histories,
    steady_history,
    step_flops,
)
from forcing_kv.export.request.presets import (
    DENSE_WINDOW_FRAMES,
    PIXEL_FRAMES_PER_LATENT,
    PUBLISHED_STATIC_HEADS,
    WAN_1_3B,
)
from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.runtime_trt.errors import InputError, unknown_name
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.resolution import check_latent_size, parse_latent_size
from forcing_kv.runtime_trt.rollout.schedule import Schedule

if TYPE_CHECKING:
    from forcing_kv.export.model.denoiser import CausalWanModel
    from forcing_kv.tools.bench.pixel_decoders import PixelDecoder

PolicyName = Literal["forcing-kv", "dense"]

SPREAD_SEED = 20260509
"""Seed of the spread of static heads over layers."""

MODELS = ("wan-1.3b", "digits")
MIN_LAYERS = 2


@dataclass(frozen=True)
class Workload:
    """One model at one size under one policy."""

    model: str
    """wan-1.3b (random weights: speed does not depend on them) or digits."""
    size: str
    """480p, 720p or 1080p; the small model has its own size alone, `native`."""
    policy: PolicyName
    config: RolloutConfig
    load: Callable[[str], CausalWanModel]
    """Makes the float32 model on a device, heads in checkpoint order."""
    prompt: Callable[[], NDArray[np.float32]]
    """A prompt embedding [text_len, text_dim]."""
    pixel_frames_per_latent: int = PIXEL_FRAMES_PER_LATENT
    decode: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None
    """Latents [F, C, h, w] to pixels; None where the workload has no decoder of its own."""
    fp8: bool = False
    """Whether its linear layers are in FP8: `load` then gives such a model."""
    decoders: Callable[[str], Iterable[PixelDecoder]] | None = None
    """Decoders with random weights on a device, to be timed beside the denoiser."""

    @property
    def pixel_frames(self) -> int:
        """Pixel frames of one chunk."""
        return self.pixel_frames_per_latent * self.config.chunk.num_frames

    def as_dtype(self, dtype: DType) -> Workload:
        """The same workload in another compute dtype."""
        return replace(self, config=replace(self.config, dtype=dtype))


@dataclass(frozen=True)
class StepWork:
    """Floating-point operations of one forward over a chunk in steady state.

    The time embedding is not counted: it is one row.
    """

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
        peak = MEASURED_TFLOPS.get(device)
        return None if peak is None else (self.total_flop - self.fp8_flop / 2) / peak / 1e9


def step_work(config: RolloutConfig, *, fp8: bool = False) -> StepWork:
    """Count the work of a steady denoise step, linear layers of the blocks in FP8 or not."""
    flops = step_flops(config, [steady_history(config)])
    blocks = flops.projections + flops.text_projections + flops.feed_forward
    return StepWork(
        linear_flop=blocks + flops.patches,
        cross_flop=flops.text_attention,
        self_flop=flops.self_attention,
        fp8_flop=blocks if fp8 else 0.0,
    )


Case = Literal["steady-chunk", "steady-step", "clip"]
CLIP_CHUNKS = 7
"""Chunks of the clip that the paper's figures are means of: 21 latent frames, 5 s."""


def case_flop(config: RolloutConfig, case: Case, *, cut: bool = False) -> float:
    """Floating-point operations of a case; the embedding of the time is not counted.

    Args:
        cut: whether clean passes end at the last layer's keys and values.
    """
    if case == "steady-step":
        return _step_flop(config, steady_history(config))
    seen = histories(config, CLIP_CHUNKS) if case == "clip" else [steady_history(config)]
    clean = clean_flops if cut else _step_flop
    steps = config.schedule.num_steps
    return sum(steps * _step_flop(config, each) + clean(config, each) for each in seen)


def _step_flop(config: RolloutConfig, history: History) -> float:
    flops = step_flops(config, [history])
    return sum(vars(flops).values()) - flops.time_embedding


def workload(
    model: str,
    size: str,
    policy: PolicyName,
    dtype: DType,
    *,
    fp8: bool = False,
    layers: int | None = None,
) -> Workload:
    """Look up a workload.

    Args:
        layers: of wan-1.3b, at its true width (`few_layers`); None for all.

    Raises:
        InputError: no such model, size or policy, FP8 in float32, or layers of another model.
    """
    if fp8:
        check_fp8_dtype(dtype)
        return with_fp8(workload(model, size, policy, dtype, layers=layers))
    if policy not in ("forcing-kv", "dense"):
        raise unknown_name("policy", policy, ("forcing-kv", "dense"))
    if model == "wan-1.3b":
        return _wan(size, policy, dtype, layers)
    if model != "digits":
        raise unknown_name("model", model, MODELS)
    if layers is not None:
        raise InputError("--layers is for wan-1.3b; the digits model has its own")
    if size != "native":
        raise InputError(f"the digits model has one size, native; found {size!r}")
    return _digits(policy, dtype)


def check_fp8_dtype(dtype: DType) -> None:
    """Refuse FP8 beside float32, which is the gate's reference.

    Raises:
        InputError: the dtype is float32.
    """
    if dtype == "float32":
        raise InputError("FP8 is measured beside a 16-bit dtype; take bfloat16 or float16")


def with_fp8(plain: Workload) -> Workload:
    """The same workload with linear layers in FP8, by scales measured on one chunk of its own."""

    def load(device: str) -> CausalWanModel:
        from forcing_kv.calibration.fp8.recorder import scales_of_one_chunk
        from forcing_kv.export.model.fp8_layers import quantize_

        model = plain.load(device)
        return quantize_(model, scales_of_one_chunk(model, plain.config, plain.prompt(), device))

    return replace(plain, load=load, fp8=True)


def spread_partition(shape: ModelShape, num_static: int, seed: int) -> HeadPartition:
    """A random partition with `num_static` static heads; layer 1 keeps a dynamic one."""
    total = shape.num_layers * shape.num_heads
    order = np.random.default_rng(seed).permutation(total)
    spared = shape.num_heads  # head 0 of layer 1
    static = sorted(int(head) for head in order[order != spared][:num_static])
    layers = [divmod(head, shape.num_heads) for head in static]
    return HeadPartition(
        shape.num_heads,
        tuple(
            tuple(head for owner, head in layers if owner == layer)
            for layer in range(shape.num_layers)
        ),
    )


def _policy(
    policy: PolicyName, own: CachePolicy, partition: HeadPartition, chunk: ChunkShape
) -> tuple[CachePolicy, HeadPartition]:
    if policy == "forcing-kv":
        return own, partition
    layers = partition.num_layers
    dense = CachePolicy.dense(DENSE_WINDOW_FRAMES, chunk.num_frames)
    return dense, HeadPartition.uniform(layers, partition.num_heads, static=True)


def model_name(model: str, layers: int | None) -> str:
    """What rows call a model of so many layers."""
    return model if layers is None else f"{model}-{layers}-layers"


def few_layers(layers: int) -> tuple[ModelShape, CachePolicy, HeadPartition]:
    """Wan2.1-1.3B's width with few layers, whose heads attend to as much as those of all 30.

    Static heads have the published share. Layer 0 is compressed as the others are: of 30 layers the
    uncompressed one is a thirtieth of the work, of two it would be half.

    Raises:
        InputError: fewer layers than a selection needs, or more than the model has.
    """
    if not MIN_LAYERS <= layers <= WAN_1_3B.num_layers:
        raise InputError(
            f"--layers is {layers}; give {MIN_LAYERS} (layer 1 selects the segments) to "
            f"{WAN_1_3B.num_layers}"
        )
    if layers == WAN_1_3B.num_layers:
        policy, share = CachePolicy(), 1.0
    else:
        policy, share = CachePolicy(compress_first_layer=True), layers / WAN_1_3B.num_layers
    shape = replace(WAN_1_3B, num_layers=layers)
    num_static = round(share * PUBLISHED_STATIC_HEADS["self-forcing-1.3b"])
    return shape, policy, spread_partition(shape, num_static, SPREAD_SEED)


def _wan(size: str, policy: PolicyName, dtype: DType, layers: int | None) -> Workload:
    latent_size = parse_latent_size("--size", size)
    check_latent_size(latent_size, WAN_1_3B.patch_size, CachePolicy.num_segments)
    chunk = ChunkShape(3, *latent_size)
    shape, own, partition = few_layers(WAN_1_3B.num_layers if layers is None else layers)
    config = RolloutConfig(shape, chunk, *_policy(policy, own, partition, chunk), Schedule(), dtype)

    def decoders(device: str) -> Iterable[PixelDecoder]:
        from forcing_kv.tools.bench.pixel_decoders import random_decoders

        return random_decoders(WAN_1_3B.in_channels, latent_size, device)

    return Workload(
        model_name("wan-1.3b", layers),
        size,
        policy,
        config,
        lambda device: random_wan(device, shape),
        lambda: random_prompt(shape),
        decoders=decoders,
    )


def random_prompt(shape: ModelShape, num_text: int = 40, seed: int = 7) -> NDArray[np.float32]:
    """A prompt embedding of `num_text` random rows, then padding."""
    prompt = np.zeros((shape.text_len, shape.text_dim), np.float32)
    rows = np.random.default_rng(seed).standard_normal((num_text, shape.text_dim))
    prompt[:num_text] = 0.2 * rows
    return prompt


SHARPNESS = 1.4
"""Gain of random self-attention's normalised queries and keys: scores spread by its square. Many
more, and rounding would grow from layer to layer."""


def random_wan(device: str, shape: ModelShape = WAN_1_3B, seed: int = 11) -> CausalWanModel:
    """A model with random weights, made on the device, whose output depends on its attention.

    By PyTorch's default initialisation attention is a plain mean over thousands of keys and its
    gate is near zero: without any history the latents differ by less than bfloat16's rounding, so
    that the correctness gate would let a wrong attention through. Here scores are spread, and the
    gates are near one, as a trained model's are.
    """
    import torch

    from forcing_kv.export.model.denoiser import CausalWanModel

    torch.manual_seed(seed)
    with torch.device(device):
        model = CausalWanModel(shape)
    model.requires_grad_(False)
    for block in model.layers:
        for norm in (block.self_attn.norm_q, block.self_attn.norm_k):
            norm.weight.mul_(SHARPNESS)
        # Shift, scale and gate of attention, then of the feed-forward.
        block.modulation[:, 2::3] += 1
    return model.eval()


def _digits(policy: PolicyName, dtype: DType) -> Workload:
    from forcing_kv.export.request.shipped import shipped_model
    from forcing_kv.runtime_trt.bundle.heads import read_heads

    shipped = shipped_model("digits")
    partition = read_heads(shipped.HEADS, shipped.MODEL).partition
    policy_and_heads = _policy(policy, shipped.POLICY, partition, shipped.CHUNK)
    config = RolloutConfig(shipped.MODEL, shipped.CHUNK, *policy_and_heads, shipped.SCHEDULE, dtype)

    def load(device: str) -> CausalWanModel:
        from forcing_kv.export.checkpoint.load import load_model

        model: CausalWanModel = load_model(shipped.CHECKPOINT, shipped.MODEL).to(device)
        return model

    from forcing_kv.tools.digits.codec import decode

    text = shipped.CALIBRATION_PROMPTS[0]
    return Workload(
        model="digits",
        size="native",
        policy=policy,
        config=config,
        load=load,
        prompt=lambda: shipped.encode_prompt(text),
        pixel_frames_per_latent=1,
        decode=decode,
    )
