"""Parameter names: what wrappers leave in them, and the diffusers layout."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

Weights = Literal["auto", "ema", "plain"]
"""Which of the state dicts that a trainer saved side by side."""

WRAPPER_PARTS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""Name parts that FSDP, activation checkpointing and torch.compile leave anywhere in a name."""
EMA_PARTS = ("generator_ema.", "model_ema.", "ema_model.", "ema.")
"""Names of enclosing modules that hold averaged weights."""
LEADING_PARTS = (
    *("base_model.", "generator.", "module.", "diffusion_model.", "model.", "online_model."),
    *("pipe.dit.", "dit.", *EMA_PARTS),
)
"""Names of enclosing modules: PEFT, trainers, data parallelism, and the official wrapper."""
EMA_ENTRIES = ("generator_ema", "ema", "model_ema", "ema_model", "ema_state_dict")
"""Entries of a file under which trainers save averaged weights."""
PLAIN_ENTRIES = ("generator", "model", "state_dict", "module", "model_state_dict")
"""Entries under which they save the weights as trained."""

_LINEAR = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "patch_embedding": "patch_embedding",
}
_BLOCK = {
    f"{ours}.{part}": f"{theirs}.{renamed}"
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for part, renamed in (
        ("q", "to_q"),
        ("k", "to_k"),
        ("v", "to_v"),
        ("o", "to_out.0"),
        ("norm_q", "norm_q"),
        ("norm_k", "norm_k"),
    )
} | {"norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
OFFICIAL_OF_MODULE = {theirs: ours for ours, theirs in (_LINEAR | _BLOCK).items()}
"""Module names of diffusers\' `WanTransformer3DModel` (0.42) -> official ones."""
_BLOCK_NAME = re.compile(r"(blocks\.\d+)\.(.+)")


def strip_wrappers(name: str) -> str:
    """The name of a parameter without what trainers and wrappers put around the model."""
    return _split_wrappers(name)[1]


def is_averaged(name: str) -> bool:
    """Whether the name of a parameter says that it is an averaged one."""
    return not set(EMA_PARTS).isdisjoint(_split_wrappers(name)[0])


def _split_wrappers(name: str) -> tuple[list[str], str]:
    """The enclosing modules, outermost first, and the rest of a name."""
    for part in WRAPPER_PARTS:
        name = name.replace(part, "")
    around: list[str] = []
    while part := next(filter(name.startswith, LEADING_PARTS), ""):
        around.append(part)
        name = name.removeprefix(part)
    return around, name


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether names are those of diffusers' `WanTransformer3DModel`."""
    return any(name.startswith("condition_embedder.") for name in names)


def official_from_diffusers(name: str) -> str:
    """Official name of a diffusers parameter; a name that is not one comes back unchanged."""
    match = _BLOCK_NAME.fullmatch(name)
    block, rest = (f"{match[1]}.", match[2]) if match else ("", name)
    if rest == "scale_shift_table":
        return f"{block}modulation" if match else "head.modulation"
    module, _, kind = rest.rpartition(".")
    return f"{block}{OFFICIAL_OF_MODULE[module]}.{kind}" if module in OFFICIAL_OF_MODULE else name
