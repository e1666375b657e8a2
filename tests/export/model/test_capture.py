"""Captured graphs take and return what `runtime_trt.rollout.ports` says, fused or not."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forcing_kv.export.model.capture import graph_sources
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.model.fusion import FUSED, PLAIN, FusionOptions
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy

SHAPE = ModelShape(3, 24, 16, 3, in_channels=2, text_len=6, text_dim=5, freq_dim=8)
CONFIG = RolloutConfig(
    SHAPE,
    ChunkShape(3, 4, 6),
    CachePolicy(num_segments=3),
    HeadPartition(3, ((0,), (0, 2), (1,))),
)
FUSIONS = {
    "plain": PLAIN,
    "time tables": FusionOptions(time_tables=True),
    "clean graph": FusionOptions(clean_graph=True),
    "folded text": FusionOptions(text_rows=4),
    "everything": replace(FUSED, text_rows=5),
}


def described(name, tensor):
    return name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def model_of(config: RolloutConfig) -> CausalWanModel:
    torch.manual_seed(0)
    model = CausalWanModel(config.model).requires_grad_(False).eval()
    return model.cast_(getattr(torch, config.dtype))


@pytest.mark.parametrize(("name", "dtype"), [("plain", "float32"), ("everything", "bfloat16")])
def test_captured_programs_have_the_ports(name, dtype):
    """Shapes and dtypes of the traced programs' own inputs and outputs."""
    config, fusion = replace(CONFIG, dtype=dtype), FUSIONS[name]
    wanted, found = fusion.ports(config), {}
    for source in graph_sources(model_of(config), config, fusion):
        program = source.capture()
        signature, nodes = program.graph_signature, {n.name: n for n in program.graph.nodes}
        tensors = [
            [nodes[name].meta["val"] for name in names]
            for names in (signature.user_inputs, signature.user_outputs)
        ]
        names = (source.input_names, source.output_names)
        found[source.name] = [
            list(map(described, *pair)) for pair in zip(names, tensors, strict=True)
        ]
    assert found == {
        name: [
            [(port.name, port.shape, port.dtype) for port in tensors]
            for tensors in (graph.inputs, graph.outputs)
        ]
        for name, graph in wanted.items()
    }


@settings(max_examples=25)
@given(data=st.data())
def test_graphs_of_any_policy_return_the_ports(data, configs):
    config = data.draw(configs(SHAPE, (4, 4)), "config")
    fusion = data.draw(st.sampled_from(list(FUSIONS.values())), "fusion")
    model = model_of(config)
    sources = {s.name: s for s in graph_sources(copy.deepcopy(model), config, fusion)}
    wanted = fusion.ports(config)
    assert list(sources) == list(wanted)
    for name, source in sources.items():
        with torch.no_grad():
            outputs = torch.utils._pytree.tree_leaves(source.module(*source.arguments))
        assert list(map(described, source.output_names, outputs)) == [
            (port.name, port.shape, port.dtype) for port in wanted[name].outputs
        ]
