"""Every fusion gives what the plain graphs give, up to rounding."""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from forcing_kv.export.model.capture import GraphSource, graph_sources
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.model.fusion import FUSED, FusionOptions, fuse_gelu_, fuse_qkv_
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.schedule import time_sinusoid
from forcing_kv.runtime_trt.rollout.text_fold import fold_text

STEP = 2
TEXT = 7
"""Rows of the prompt that are not padding."""
ROWS = 12

CONFIG = RolloutConfig(
    ModelShape(3, 48, 96, 4, in_channels=4, text_len=20, text_dim=24, freq_dim=16),
    ChunkShape(3, 4, 6),
    CachePolicy(num_segments=3),
    HeadPartition(4, ((0,), (0, 2), (1, 3))),
)


@pytest.fixture(scope="module")
def model() -> CausalWanModel:
    torch.manual_seed(0)
    made = CausalWanModel(CONFIG.model).requires_grad_(False).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("modulation"):
            parameter.normal_(std=0.3)
    return made


def random_inputs(source: GraphSource, seed: int) -> dict[str, torch.Tensor]:
    """Random values by name; the same name always gets the same values."""
    values = {}
    flat = torch.utils._pytree.tree_leaves(source.arguments)
    for name, example in zip(source.input_names, flat, strict=True):
        generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
        values[name] = torch.randn(example.shape, generator=generator).to(example.dtype)
    tokens = CONFIG.chunk.tokens_per_frame
    sinusoid = torch.from_numpy(time_sinusoid(CONFIG.schedule.timesteps[STEP], 16))
    fixed = {
        "hist_len": torch.full((3, 4), 2 * tokens, dtype=torch.int32),
        "new_len": torch.tensor([3 * tokens], dtype=torch.int32),
        "time_sinusoid": sinusoid,
        "step_index": torch.tensor([STEP], dtype=torch.int32),
        "sigma": torch.tensor([0.7]),
        "next_sigma": torch.tensor([0.4]),
    }
    return values | {name: value for name, value in fixed.items() if name in values}


def run(source: GraphSource, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs by name."""
    leaves = [inputs[name] for name in source.input_names]
    spec = torch.utils._pytree.tree_structure(source.arguments)
    arguments: Sequence[torch.Tensor] = torch.utils._pytree.tree_unflatten(leaves, spec)
    with torch.no_grad():
        outputs = torch.utils._pytree.tree_leaves(source.module(*arguments))
    return dict(zip(source.output_names, outputs, strict=True))


def sources(model: CausalWanModel, fusion: FusionOptions) -> dict[str, GraphSource]:
    made = graph_sources(copy.deepcopy(model), CONFIG, fusion)
    return {source.name: source for source in made}


@pytest.mark.parametrize(
    "fusion",
    [
        FusionOptions(qkv=True),
        FusionOptions(time_tables=True),
        FusionOptions(clean_graph=True),
        FusionOptions(gelu=True),
        FUSED,
    ],
    ids=["qkv", "time_tables", "clean_graph", "gelu", "fused"],
)
def test_step_equals_plain(model, fusion):
    plain = sources(model, FusionOptions())["step"]
    fused = sources(model, fusion)["step"]
    wanted, found = (run(graph, random_inputs(graph, 1)) for graph in (plain, fused))
    assert set(found) == ({"x0", "x_next"} if fusion.clean_graph else set(wanted))
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("qkv", [False, True])
def test_clean_graph_gives_the_rows_of_the_step(model, qkv):
    plain = sources(model, FusionOptions())["step"]
    clean = sources(model, FusionOptions(qkv=qkv, clean_graph=True))["clean"]
    assert not {"hist_k.2", "cross_v.2", "eps", "sigma"} & set(clean.input_names)
    wanted, found = (run(graph, random_inputs(graph, 2)) for graph in (plain, clean))
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("num_text", [0, TEXT, 20])
def test_folded_text_equals_padded_text(model, num_text):
    rows = 20 if num_text == 20 else ROWS
    prompt = np.zeros((20, 24), np.float32)
    prompt[:num_text] = np.random.default_rng(3).standard_normal((num_text, 24))
    plain, folded = (
        sources(model, fusion) for fusion in (FusionOptions(), FusionOptions(text_rows=rows))
    )
    embeds, bias = fold_text(prompt, rows, "float32")
    text = run(plain["prompt"], {"prompt_embeds": torch.from_numpy(prompt)})
    short = run(folded["prompt"], {"prompt_embeds": torch.from_numpy(embeds)})
    assert short["cross_k.0"].shape[1] == rows
    wanted = run(plain["step"], random_inputs(plain["step"], 4) | text)
    inputs = random_inputs(folded["step"], 4) | short | {"text_bias": torch.from_numpy(bias)}
    found = run(folded["step"], inputs)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-5)


def test_text_rows_out_of_range(model):
    with pytest.raises(InputError, match="text_rows is 3; give 4 to 20"):
        next(graph_sources(model, CONFIG, FusionOptions(text_rows=3)))


def test_fusing_qkv_twice_changes_nothing(model):
    once = fuse_qkv_(copy.deepcopy(model))
    names = list(once.state_dict())
    assert list(fuse_qkv_(once).state_dict()) == names
    assert "blocks.0.self_attn.qkv.weight" in names
    assert "blocks.0.self_attn.q.weight" not in names


def test_gelu_keeps_the_weights_under_their_names(model):
    fused = fuse_gelu_(copy.deepcopy(model))
    assert list(fused.state_dict()) == list(model.state_dict())
    assert fuse_gelu_(fused) is fused


def test_gelu_is_part_of_the_product_on_cuda_alone(model, monkeypatch):
    class OnCuda:
        is_cuda = True

        def dim(self):
            return 2

    layer, x = fuse_gelu_(copy.deepcopy(model)).layers[0].ffn[0], OnCuda()
    monkeypatch.setattr(torch.ops.aten, "_addmm_activation", lambda *a, **k: (*a, k), raising=False)
    bias, given, weight, options = layer(x)
    assert given is x
    assert options == {"use_gelu": True}
    assert torch.equal(weight, layer.weight.T)
    assert torch.equal(bias, layer.bias)
    assert isinstance(layer(torch.ones(2, 48)), torch.Tensor)
