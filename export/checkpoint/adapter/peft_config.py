"""PEFT's configuration of an adapter: `adapter_config.json`, or the same in a file's metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forcing_kv.runtime_trt.bundle.schema import load_as, parse_json
from forcing_kv.runtime_trt.errors import InputError

_DENOISER = "transformer."
_OWN_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Ways to begin a training that change the base weights too, by how their names begin."""
_MAX_QUANTIFIERS = 3


@dataclass(frozen=True)
class PeftConfig:
    """The fields of PEFT's configuration that say what the tensors mean."""

    origin: str = ""
    peft_type: str | None = "LORA"
    r: int | None = None
    lora_alpha: float | None = None
    alpha: float | None = None
    """LoHa's and LoKr's name for it."""
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    use_rslora: bool | None = False
    use_dora: bool | None = False
    fan_in_fan_out: bool | None = False
    bias: str | None = "none"
    modules_to_save: tuple[str, ...] | None = None
    init_lora_weights: bool | str | None = True
    layer_replication: Any = None
    alora_invocation_tokens: Any = None
    use_qalora: bool | None = False

    def alpha_of(self, name: str) -> float | None:
        whole = self.lora_alpha if self.alpha is None else self.alpha
        return _matching(self.alpha_pattern or {}, name, whole, self.origin)

    def rank_of(self, name: str) -> int | None:
        return _matching(self.rank_pattern or {}, name, self.r, self.origin)

    def check(self) -> None:
        """Refuse what merging would get wrong.

        Raises:
            InputError: it says so.
        """
        start = str(self.init_lora_weights).lower()
        if start.startswith(_OWN_BASE):
            raise InputError(
                f"{self.origin}: init_lora_weights is {start!r}, so the base weights were changed "
                "too; save the adapter converted to plain LoRA (PEFT: "
                "path_initial_model_for_weight_conversion)"
            )
        if str(self.peft_type).upper() not in ("LORA", "LOHA", "LOKR"):
            raise InputError(
                f"{self.origin}: peft_type is {self.peft_type!r}; LORA, LOHA and LOKR can be merged"
            )
        if self.fan_in_fan_out:
            raise InputError(
                f"{self.origin}: fan_in_fan_out is for layers with transposed weights, which this "
                "model has none of; set it to false if PEFT warned and took it as false"
            )
        for name in ("layer_replication", "alora_invocation_tokens", "use_qalora"):
            if getattr(self, name):
                raise InputError(f"{self.origin}: {name} is set; such an adapter cannot be merged")


def _matching(patterns: Mapping[str, Any], name: str, default: Any, origin: str) -> Any:
    """The value of the first pattern that matches a module, as PEFT matches them."""
    for pattern, value in patterns.items():
        # Nested quantifiers can take longer than anybody waits.
        if len(re.findall(r"[*+?{]", pattern)) > _MAX_QUANTIFIERS or re.search(
            r"\)[*+?{]", pattern
        ):
            raise InputError(f"{origin}: the pattern {pattern!r} is too intricate; name the layers")
        try:
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
                return value
        except re.error as error:
            raise InputError(f"{origin}: the pattern {pattern!r} is wrong ({error})") from error
    return default


def peft_config(content: Any, origin: str) -> PeftConfig:
    """Check and build one from parsed JSON, or from an entry of a .pt file.

    Args:
        origin: where it stands, for messages.

    Raises:
        InputError: an entry is not as it should be, or says that merging would be wrong.
    """
    if not isinstance(content, Mapping):
        raise InputError(f"{origin}: not PEFT's configuration of an adapter (no object)")
    known = {key: value for key, value in content.items() if key in PeftConfig.__dataclass_fields__}
    config = load_as(PeftConfig, {**known, "origin": origin}, origin)
    config.check()
    return config


def config_of_denoiser(text: Any, origin: str) -> PeftConfig:
    """The same from diffusers' metadata, whose keys begin with the part of a pipeline.

    Raises:
        InputError: it is no JSON object, or as with `peft_config`.
    """
    try:
        content = parse_json(text) if isinstance(text, str) else text
    except ValueError as error:
        raise InputError(f"{origin} is no JSON ({error})") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{origin} is no JSON object")
    own = {
        key.removeprefix(_DENOISER): value
        for key, value in content.items()
        if key.startswith(_DENOISER)
    }
    return peft_config(own or content, origin)
