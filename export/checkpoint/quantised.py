"""Weights that trainers and converters stored in 8 bits: computed back, or refused by name.

A weight in FP8 is its codes times a scale, in float32: one scale for the tensor, for each output
channel, or for each block of it. The names are those of ComfyUI and musubi-tuner (`scale_weight`),
of compressed-tensors, ModelOpt and LightX2V (`weight_scale`), and of DeepSeek (`weight_scale_inv`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from forcing_kv.runtime_trt.bundle.schema import parse_json
from forcing_kv.runtime_trt.dtypes import dtype_name
from forcing_kv.runtime_trt.errors import InputError

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_MARKER = "scaled_fp8"
"""A tensor without a meaning of its own, by which ComfyUI knows that scales follow."""
_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
_SECOND = "scale_weight_tensor"
"""musubi-tuner scales its blocks relative to this one scale."""
_INPUTS = ("scale_input", "input_scale")
_COMFY = "comfy_quant"
"""ComfyUI's description of a layer, JSON as bytes."""
_BLOCK = 128
"""Rows and columns of DeepSeek's blocks, of which the last may be shorter."""
_GIVE = "give the unquantised checkpoint, or one in FP8 or GGUF"
_UNKNOWN = {
    r"\.SCB|\.weight_format": "bitsandbytes' 8-bit integers",
    r"\.(nested_)?(absmax|quant_map)|\.quant_state\..+": "bitsandbytes' 4 bits (nf4 or fp4)",
    r"\.(wscales|wcscales|wtscale|smooth_factor|smooth_factor_orig)": "SVDQuant (nunchaku)",
    r"\.(qweight|qzeros|g_idx)": "GPTQ or AWQ",
    r"\.weight_(packed|global_scale|zero_point|g_idx)": "compressed-tensors' integers or 4 bits",
    r"\.weight_scale_2": "NVFP4",
    r"\.weight\._(data|scale|shift)|\.weight_qtype": "optimum-quanto",
    r"[._:](qdata|tensor_impl|int_data)": "torchao",
    r"\.W_q": "HQQ",
}
"""How names of a format end, and the format."""


@dataclass
class Dequantised:
    """A state dict without scales."""

    tensors: dict[str, Tensor]
    """Under the same names; those in `packed` without data."""
    packed: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    """What computes a weight, in float32."""
    form: str | None = None
    """What the weights were stored in, for people; None if they were not quantised."""


def dequantised(tensors: dict[str, Tensor], where: str) -> Dequantised:
    """Take scales into their weights.

    Args:
        tensors: by name, wrappers stripped.
        where: the file, which begins every message.

    Raises:
        InputError: another quantisation, scales that do not fit, or a weight without one.
    """
    _refuse_unknown(tensors, where)
    layers = _scaled_layers(tensors, where)
    codes = {name for name, value in tensors.items() if value.dtype in FP8_DTYPES} - {_MARKER}
    if not layers and not codes:
        return Dequantised(tensors)
    unscaled = sorted(codes - {f"{layer}.weight" for layer in layers})
    if unscaled and (layers or _MARKER in tensors):
        raise InputError(
            f"{where}: {unscaled[0]} is in FP8 without a scale, though others have one; it is "
            "incomplete: download or convert it again"
        )
    rest, forms, inputs = dict(tensors), Counter[str](), 0
    packed: dict[str, Callable[[], Tensor]] = {}
    for layer, suffix in layers.items():
        scale = _scale(tensors, layer, suffix, where)
        name = f"{layer}.weight"
        packed[name] = partial(scale.times, tensors[name])
        rest[name] = torch.empty(tensors[name].shape, device="meta")
        forms[f"{dtype_name(tensors[name].dtype)}, a scale per {scale.unit} ({suffix})"] += 1
        for other in (suffix, _SECOND, _COMFY):
            rest.pop(f"{layer}.{other}", None)
        inputs += sum(rest.pop(f"{layer}.{other}", None) is not None for other in _INPUTS)
    rest.pop(_MARKER, None)
    forms.update(f"{dtype_name(tensors[name].dtype)} without scales" for name in unscaled)
    text = "; ".join(f"{count} weights in {form}" for form, count in forms.items())
    left = f"; {inputs} scales of activations are not used" if inputs else ""
    return Dequantised(rest, packed, text + left)


def _refuse_unknown(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse formats that are not computed back, by name."""
    for pattern, known in _UNKNOWN.items():
        ending = re.compile(rf".*(?:{pattern})")
        if (name := next(filter(ending.fullmatch, tensors), None)) is not None:
            raise InputError(f"{where}: is quantised in {known} ({name}); {_GIVE}")
    for name, value in tensors.items():
        if name.endswith(f".{_COMFY}"):
            try:
                described = parse_json(value.numpy().tobytes())
                known = described["format"]
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(
                    f"{where}: {name} is no description of a layer; {_GIVE}"
                ) from error
            if known not in map(dtype_name, FP8_DTYPES) or described.get("convrot"):
                raise InputError(f"{where}: is quantised in ComfyUI's {known!r} ({name}); {_GIVE}")


def _scaled_layers(tensors: Mapping[str, Tensor], where: str) -> dict[str, str]:
    """Layers with a scale, and the name that it has there."""
    layers: dict[str, str] = {}
    for name in tensors:
        layer, _, suffix = name.rpartition(".")
        if suffix not in _SCALES:
            continue
        weight = tensors.get(f"{layer}.weight")
        if layer in layers or weight is None:
            found = f"beside {layers[layer]}" if layer in layers else "without its weight"
            raise InputError(f"{where}: {name} stands {found}; convert the checkpoint again")
        if weight.dtype not in FP8_DTYPES:
            raise InputError(
                f"{where}: {layer}.weight is quantised in {dtype_name(weight.dtype)} with scales "
                f"({suffix}); {_GIVE}"
            )
        layers[layer] = suffix
    return layers


@dataclass(frozen=True)
class _Scale:
    """The scale of a weight."""

    values: Tensor
    """Float32; multiplies the codes as it is, or after every value is repeated over its block."""
    unit: str
    """What a value is for."""
    block: tuple[int, int] | None = None
    """Rows and columns."""

    def times(self, codes: Tensor) -> Tensor:
        values = self.values
        if self.block is not None:
            for axis, length in enumerate(self.block):
                values = values.repeat_interleave(length, axis).narrow(axis, 0, codes.shape[axis])
        return codes.float().mul_(values)


def _scale(tensors: Mapping[str, Tensor], layer: str, suffix: str, where: str) -> _Scale:
    values, shape = tensors[f"{layer}.{suffix}"], tensors[f"{layer}.weight"].shape
    second = tensors.get(f"{layer}.{_SECOND}", torch.ones(()))
    for value in (values, second):
        fine = value.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        if not fine or not bool((value.isfinite() & (value > 0)).all()):
            kind = "zero, negative or not finite" if fine else f"of dtype {dtype_name(value.dtype)}"
            raise InputError(
                f"{where}: {layer}.{suffix} is {kind}, no scale of FP8 weights; download or "
                "convert the checkpoint again"
            )
    scale = None
    if second.numel() == 1:
        scale = _fitted(values.float() * second.float().reshape(()), shape)
    if scale is None:
        raise InputError(
            f"{where}: {layer}.{suffix} has shape {list(values.shape)}, its weight {list(shape)}; "
            "a scale belongs to the tensor, to each output channel, or to blocks of equal size"
        )
    return scale


def _fitted(values: Tensor, shape: torch.Size) -> _Scale | None:
    """The scale of a weight of `shape`; None where the values do not fit it."""
    if values.numel() == 1:
        return _Scale(values.reshape(()), "tensor")
    if shape and values.numel() == shape[0] == values.shape[0]:
        return _Scale(values.reshape(-1, *[1] * (len(shape) - 1)), "output channel")
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim != 2 or len(shape) != 2:
        return None
    rows, columns = map(_block, shape, values.shape)
    if rows is None or columns is None:
        return None
    return _Scale(values, f"block of {rows}x{columns}", (rows, columns))


def _block(size: int, count: int) -> int | None:
    """Length of the blocks of which `count` make up `size`."""
    if -(-size // _BLOCK) == count:
        return min(_BLOCK, size)
    return None if count == 0 or size % count else size // count
