"""Low-rank adapters merged into the weights: W + (alpha / rank) B A, exact in float32."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from forcing_kv.export.checkpoint.files import read_tensor_file
from forcing_kv.export.checkpoint.names import official_from_diffusers, strip_wrappers
from forcing_kv.runtime_trt.errors import InputError

# LongLive nests its adapter (peft's get_peft_model_state_dict) under this entry.
ADAPTER_KEYS = ("generator_lora", "lora")
_FACTOR = re.compile(r"(.+)\.lora_(?:A|B|down|up)(?:\.default)?\.weight")
_IS_DOWN = re.compile(r"\.lora_(?:A|down)(?:\.default)?\.weight$")


@dataclass
class Adapter:
    """The factors of every adapted linear layer, by the layer's official name."""

    where: str
    down: dict[str, Tensor] = field(default_factory=dict)
    """A, [rank, in]."""
    up: dict[str, Tensor] = field(default_factory=dict)
    """B, [out, rank]."""
    alpha: dict[str, float] = field(default_factory=dict)
    """Alpha of layers whose file states it."""

    def delta(self, layer: str, alpha: float | None) -> Tensor:
        """What is added to the weight of `layer`, [out, in] float32."""
        down, up = self.down[layer].float(), self.up[layer].float()
        rank = down.shape[0]
        scale = self.alpha.get(layer, rank if alpha is None else alpha) / rank
        return scale * (up @ down)


def read_adapter(path: Path) -> Adapter:
    """Read a LoRA file: PEFT names, bare or nested as LongLive's `generator_lora`.

    Raises:
        InputError: unreadable, or not an adapter.
    """
    raw = read_tensor_file(path)
    for key in ADAPTER_KEYS:
        if isinstance(raw.get(key), Mapping):
            raw = raw[key]
    tensors = {key: value for key, value in raw.items() if isinstance(value, Tensor)}
    adapter, others = adapter_from_tensors(tensors, str(path))
    if others:
        raise InputError(
            f"{path}: {len(others)} entries are no LoRA factors, such as {_some(others)}; only "
            "lora_A and lora_B of linear layers can be merged"
        )
    return adapter


def adapter_from_tensors(
    tensors: Mapping[str, Tensor], where: str
) -> tuple[Adapter, dict[str, Tensor]]:
    """Separate an adapter from the other tensors of a PEFT state dict.

    Returns:
        The adapter, and what is not part of it, with PEFT's `base_layer` taken out of the names.

    Raises:
        InputError: no factor at all, or one without its partner, or of another rank.
    """
    adapter, others = Adapter(where), {}
    for key, value in tensors.items():
        name = strip_wrappers(key)
        if match := _FACTOR.fullmatch(name):
            factors = adapter.down if _IS_DOWN.search(name) else adapter.up
            factors[_official_layer(match[1])] = value
        elif name.endswith(".alpha"):
            adapter.alpha[_official_layer(name.removesuffix(".alpha"))] = float(value)
        else:
            others[name.replace(".base_layer.", ".")] = value
    if not adapter.down:
        raise InputError(
            f"{where}: holds no LoRA factors (lora_A and lora_B); found {_some(others)}"
        )
    unpaired = set(adapter.down) ^ set(adapter.up)
    if unpaired:
        raise InputError(f"{where}: LoRA factors without their partner: {sorted(unpaired)[:5]}")
    wrong = [k for k, down in adapter.down.items() if adapter.up[k].shape[-1] != down.shape[0]]
    if wrong:
        raise InputError(f"{where}: the two LoRA factors of {wrong[:3]} differ in rank")
    return adapter, others


def check_adapter(adapter: Adapter, weights: Mapping[str, Tensor]) -> None:
    """Refuse an adapter that is not one of this model.

    Raises:
        InputError: it adapts layers that the model lacks, or of another size.
    """
    for layer, down in adapter.down.items():
        weight = weights.get(f"{layer}.weight")
        size = [adapter.up[layer].shape[0], down.shape[1]]
        if weight is None or list(weight.shape) != size:
            found = "no such layer" if weight is None else f"a weight of {list(weight.shape)}"
            raise InputError(
                f"{adapter.where}: adapts {layer} as a {size} weight, but the base model has "
                f"{found}; use the adapter made for this base model"
            )


def _official_layer(name: str) -> str:
    return official_from_diffusers(f"{name}.weight").removesuffix(".weight")


def _some(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted(tensors)[:3]) or "nothing"
