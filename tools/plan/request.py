"""What `fkv plan` is asked about, resolved to configurations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from math import lcm
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from forcing_kv.export.cost.memory import NO_FP8, all_fp8
from forcing_kv.export.request.flags import Int, LatentSize, flags, given, panel
from forcing_kv.export.request.presets import (
    DENSE_WINDOW_FRAMES,
    PUBLISHED_STATIC_HEADS,
    Preset,
    load_preset,
)
from forcing_kv.runtime_trt.bundle.fp8 import Fp8Counts
from forcing_kv.runtime_trt.bundle.heads import read_heads
from forcing_kv.runtime_trt.bundle.manifest import read_manifest
from forcing_kv.runtime_trt.bundle.schema import load_as, read_json
from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.runtime_trt.errors import InputError, unknown_name
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.resolution import check_latent_size

DEFAULT_MODEL = "self-forcing-1.3b"
MAX_EXTENT = 1000
"""Most frames that a policy keeps or a chunk has, and chunks of warm-up, in a plan."""


@flags(panel("Model"))
@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What is planned for; None takes the default."""

    model: str | None = None
    """Preset (default self-forcing-1.3b), or a preset in a .json file."""
    bundle: Path | None = None
    """Plan for this bundle's own configuration instead."""
    resolution: Annotated[LatentSize | None, Parameter(alias="--latent-size")] = None
    """480p, 720p, 1080p, each also as 480p-portrait, pixels: 832x480px, or latent rows x columns:
    60x104. Default: the model's own, 480p."""
    heads: Path | None = None
    """Head partition file."""
    static_heads: Int | None = None
    """Without a file: static heads of all layers, spread evenly."""
    dtype: DType | None = None
    """What the model computes in. Default: bfloat16."""
    fp8: bool = False
    """Linear layers in FP8, as `fkv export --fp8`."""
    native_attention: bool = False
    """Count the second engine of steady chunks, which holds the weights of a step once more:
    TensorRT with --attention native, and TensorRT-RTX."""


@dataclass(frozen=True)
class Subject:
    """A model at a size, for which policies are planned."""

    name: str
    base: RolloutConfig
    """With the dense policy."""
    own_policy: CachePolicy
    heads_source: str
    """Where the head partition comes from, for people."""
    fp8: Fp8Counts = field(default_factory=dict)
    has_wan_pixels: bool = True
    """Whether a latent is 8 x 8 pixels, as Wan's VAE has it; of a bundle that is not known."""

    def config(self, policy: str) -> RolloutConfig:
        """The configuration under a policy.

        Args:
            policy: `forcing-kv` (the model's own), `dense`, a `.json` file, or changes of the
                model's own: `field=value,field=value`.

        Raises:
            InputError: it is none of them, or does not fit the model.
        """
        chosen = _read_policy(policy, self.own_policy, self.base.policy)
        chunk = self.base.chunk
        size = (chunk.latent_height, chunk.latent_width)
        try:
            check_latent_size(size, chunk.patch_size, _segments(chosen))
            _check_extent(chosen, chunk.num_frames)
            return replace(self.base, policy=chosen)
        except InputError as error:
            raise InputError(f"{policy}: {error}") from error


def _read_policy(text: str, own: CachePolicy, dense: CachePolicy) -> CachePolicy:
    """See `Subject.config`."""
    known = {"forcing-kv": own, "dense": dense}
    if text in known:
        return known[text]
    if text.endswith(".json"):
        return load_as(
            CachePolicy,
            read_json(Path(text), "policy file", "give FIELD=VALUE of a policy instead"),
            text,
        )
    if "=" not in text:
        raise InputError(
            f"{unknown_name('policy', text, known)}, or give a .json file, or changes such as "
            "num_sink_frames=0"
        )
    pairs = [change.partition("=") for change in text.split(",")]
    names = [key.strip() for key, _, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"policy: {twice} are given twice; give each once")
    changes = {key.strip(): _value(value.strip()) for key, _, value in pairs}
    allowed = [field.name for field in fields(own)]
    unknown = sorted(set(changes) - set(allowed))
    if unknown:
        raise InputError(f"policy: unknown fields {unknown}; allowed are {allowed}")
    return replace(own, **changes)


def _value(text: str) -> Any:
    words = {"true": True, "false": False}
    short = text.isdecimal() and len(text) < 20
    return int(text) if short else words.get(text.lower(), text)


def _segments(policy: CachePolicy) -> int:
    """Segments that a frame is cut into; 1 where none is selected."""
    return policy.num_segments if policy.num_dynamic_frames else 1


def _check_extent(policy: CachePolicy, chunk_frames: int) -> None:
    """Refuse what takes minutes to lay out and fits no GPU."""
    window = policy.num_sink_frames + policy.warmup_frames
    for name, count in (
        ("frames kept", window), ("frames a chunk", chunk_frames),
        ("chunks of warm-up", policy.last_warmup_chunk),
    ):  # fmt: skip
        if count > MAX_EXTENT:
            raise InputError(f"policy: {count} {name}; plans are for at most {MAX_EXTENT}")


def resolve(request: PlanRequest, policies: Sequence[str] = ()) -> Subject:
    """Look up what is asked for; no weights are needed.

    Args:
        policies: those that `Subject.config` will be asked for, so that a size which is proposed
            in place of a wrong one serves them all.

    Raises:
        InputError: unknown names, wrong files, or options that contradict each other.
    """
    if request.bundle is not None:
        if others := given(replace(request, bundle=None, native_attention=False)):
            raise InputError(
                f"a bundle has its own {', '.join(others)}; leave them out, or leave out --bundle"
            )
        return _of_bundle(request.bundle)
    preset = load_preset(request.model or DEFAULT_MODEL)
    if request.resolution is not None:
        preset = replace(preset, latent_size=request.resolution)
    dense = CachePolicy.dense(preset.dense_window, preset.chunk_frames, preset.dense_sink)
    chosen = [_read_policy(text, preset.policy, dense) for text in policies]
    check_latent_size(preset.latent_size, preset.model.patch_size, lcm(*map(_segments, chosen)))
    partition, source = _partition(preset, request)
    dtype = request.dtype or "bfloat16"
    base = RolloutConfig(preset.model, preset.chunk, dense, partition, preset.schedule, dtype)
    fp8 = all_fp8(preset.model) if request.fp8 else NO_FP8
    return Subject(preset.name, base, preset.policy, source, fp8)


def _of_bundle(bundle: Path) -> Subject:
    manifest = read_manifest(bundle)
    config = manifest.config
    frames = config.chunk.num_frames
    dense = CachePolicy.dense(max(DENSE_WINDOW_FRAMES, frames), frames)
    base = replace(config, policy=dense)
    fp8 = NO_FP8 if manifest.fp8 is None else manifest.fp8.counts
    return Subject(manifest.name, base, config.policy, "the bundle's", fp8, has_wan_pixels=False)


def _partition(preset: Preset, request: PlanRequest) -> tuple[HeadPartition, str]:
    """The partition to plan with, and where it comes from."""
    model, heads, num_static = preset.model, request.heads, request.static_heads
    if heads is not None:
        if num_static is not None:
            raise InputError("--heads and --static-heads exclude each other; give one")
        return read_heads(heads, model).partition, heads.name
    total = model.num_layers * model.num_heads
    if num_static is not None:
        if not 0 <= num_static <= total:
            raise InputError(f"--static-heads is {num_static}; the model has {total} heads")
        return spread(model, num_static), "as asked, spread evenly"
    if preset.name in PUBLISHED_STATIC_HEADS:
        count = PUBLISHED_STATIC_HEADS[preset.name]
        return spread(model, count), "the published count, spread evenly"
    return spread(model, total // 2), "assumed: half of them, spread evenly; give --heads"


def spread(model: ModelShape, num_static: int) -> HeadPartition:
    """A partition with this many static heads, as even over the layers as can be."""
    ends = [num_static * (layer + 1) // model.num_layers for layer in range(model.num_layers)]
    counts = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    return HeadPartition(model.num_heads, tuple(tuple(range(count)) for count in counts))
