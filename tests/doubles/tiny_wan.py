"""A small model with random weights, and adapters of it, for tests of checkpoints."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from forcing_kv.export.checkpoint.adapter.alpha import AlphaRule
from forcing_kv.export.checkpoint.adapter.file import adapter_files
from forcing_kv.export.checkpoint.load import CheckpointSource, load_model
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.runtime_trt.rollout.layout import ModelShape

SHAPE = ModelShape(2, 24, 40, 2, in_channels=4, text_len=6, text_dim=8, freq_dim=16)
RANK = 4
LAYERS = (
    *("blocks.0.self_attn.q", "blocks.0.self_attn.o", "blocks.1.cross_attn.k", "blocks.1.ffn.0"),
    *("blocks.1.ffn.2", "text_embedding.0", "time_embedding.2", "time_projection.1", "head.head"),
)
"""Layers that the adapters change: every kind of name that trainers treat differently."""
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def random_weights() -> dict[str, torch.Tensor]:
    """Weights under the official names."""
    torch.manual_seed(0)
    with torch.device("meta"):
        state = CausalWanModel(SHAPE).state_dict()
    return {name: torch.randn(value.shape) for name, value in state.items()}


def random_factors(
    weights: Mapping[str, torch.Tensor], layers: Iterable[str] = LAYERS, rank: int = RANK
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> (A, B)."""
    torch.manual_seed(1)
    sizes = {layer: weights[f"{layer}.weight"].shape for layer in layers}
    return {k: (torch.randn(rank, n), torch.randn(m, rank)) for k, (m, n) in sizes.items()}


def save(folder: Path, tensors: Mapping[str, torch.Tensor], name: str, **metadata: str) -> Path:
    """A .safetensors file."""
    content = {key: value.contiguous() for key, value in tensors.items()}
    save_file(content, folder / name, metadata=metadata or None)
    return folder / name


def merged(base: Path, *adapters: object, rule: AlphaRule = AlphaRule()) -> dict[str, np.ndarray]:
    """What `load_model` makes of a checkpoint and adapters, by official name."""
    source = CheckpointSource(base, adapters=adapter_files(map(str, adapters)), alpha=rule)
    state = load_model(source, SHAPE).state_dict()
    return {name: value.numpy() for name, value in state.items()}


def expected(
    weights: Mapping[str, torch.Tensor], changes: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The base with changes added in float64."""
    added = {name: value.numpy().astype(np.float64) for name, value in weights.items()}
    for name, change in changes.items():
        added[name] = added[name] + change
    return added


def products(factors: Factors, scale: float = 1.0) -> dict[str, np.ndarray]:
    """scale * B A of every layer, in float64."""
    pairs = {k: (a.numpy().astype(float), b.numpy().astype(float)) for k, (a, b) in factors.items()}
    return {f"{layer}.weight": scale * (b @ a) for layer, (a, b) in pairs.items()}


def assert_close(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    """Every parameter to float32's rounding; those that no adapter changes to the bit."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-6, atol=2e-6, err_msg=name)
