"""Inputs and outputs of the graphs: as counted by hand, as exported, as the host fills them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from forcing_kv.runtime_trt.backends.base import ChunkPositions
from forcing_kv.runtime_trt.backends.stepwise import StepwiseBackend
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.ports import (
    kv_name,
    kv_names,
    pool_ports,
    port_name,
    ports,
    ports_by_name,
    split_name,
)
from forcing_kv.runtime_trt.rollout.timeline import Timeline


def without_lengths(inputs):
    return inputs.replace("hist_len 2x3 int32, new_len 1 int32,", "")


# Layer 0: of 3 heads 2 frames of 6 tokens. Layer 1: of a static head 2 frames, of two others 3.
NEW = """new_k.0 36x8 float32, new_k.1 48x8 float32,
         new_v.0 36x8 float32, new_v.1 48x8 float32"""
LATENTS = "x0 3x2x4x6 float32, x_next 3x2x4x6 float32"
CROSS = """cross_k.0 3x3x8 float32, cross_k.1 3x3x8 float32,
           cross_v.0 3x3x8 float32, cross_v.1 3x3x8 float32"""
# Layer 0: 3 heads of 2 frames of 6 tokens. Layer 1: a static head of 2 frames, two dynamic of 3.
STEP = f"""x 3x2x4x6 float32, eps 3x2x4x6 float32, time_sinusoid 1x8 float32,
           sigma 1 float32, next_sigma 1 float32, rope_cos 3x2 float32, rope_sin 3x2 float32,
           hist_len 2x3 int32, new_len 1 int32,
           hist_k.0 36x8 float32, hist_k.1 48x8 float32,
           hist_v.0 36x8 float32, hist_v.1 48x8 float32, {CROSS}"""
CLEAN = """x 3x2x4x6 float32, step_index 1 int32, rope_cos 3x2 float32, rope_sin 3x2 float32,
           hist_len 2x3 int32, new_len 1 int32, hist_k.0 36x8 float32, hist_v.0 36x8 float32,
           cross_k.0 3x2x8 float32, cross_v.0 3x2x8 float32, text_bias 2 float32"""
EVICT = """hist_k.1 48x8 float32, hist_v.1 48x8 float32,
           new_k.1 48x8 float32, new_v.1 48x8 float32"""
EVICTED = "dyn_k.1 2x6x8 float32, dyn_v.1 2x6x8 float32, scores 3x6 float32, kept 6 int32"
PLAIN = {
    "prompt": ("prompt_embeds 3x5 float32", CROSS),
    "step": (STEP, f"{LATENTS}, {NEW}"),
    "step_steady": (without_lengths(STEP), f"{LATENTS}, {NEW}"),
    "evict": (EVICT, EVICTED),
}
"""Ports of the tiny bundle: inputs and outputs of each graph in order."""


def described(name, shape, dtype):
    return f"{name} {'x'.join(map(str, shape))} {dtype.replace('float32', 'float')}"


def table(text):
    return [port.strip().replace("float32", "float") for port in text.split(",")]


def as_table(graphs):
    """Ports in the form of `PLAIN`."""
    return {
        name: tuple(
            [described(port.name, port.shape, port.dtype) for port in tensors]
            for tensors in (graph.inputs, graph.outputs)
        )
        for name, graph in graphs.items()
    }


def counted(graphs):
    return {name: tuple(map(table, pair)) for name, pair in graphs.items()}


def test_ports_are_those_counted_by_hand(tiny_config):
    assert as_table(ports(tiny_config)) == counted(PLAIN)
    assert list(ports(tiny_config)) == ["prompt", "step", "step_steady", "evict"]
    assert list(ports(tiny_config, steady=False)) == ["prompt", "step", "evict"]


def test_ports_are_those_of_the_exported_graphs(tiny_config, tiny_bundle):
    """The exporter writes the manifest from the ONNX graphs themselves."""
    written = json.loads((tiny_bundle / "manifest.json").read_text())["graphs"]
    found = {
        name: tuple(
            [described(port["name"], port["shape"], port["dtype"]) for port in graph[kind]]
            for kind in ("inputs", "outputs")
        )
        for name, graph in written.items()
    }
    assert as_table(ports(tiny_config)) == found


def test_fused_graphs(tiny_config):
    found = ports(tiny_config, time_tables=True, clean_graph=True, text_rows=2)
    inputs = STEP.replace("time_sinusoid 1x8 float32", "step_index 1 int32")
    cross = CROSS.replace("3x3x8", "3x2x8")
    inputs = inputs.replace(CROSS, f"{cross}, text_bias 2 float32")
    wanted = {
        "prompt": ("prompt_embeds 2x5 float32", cross),
        "step": (inputs, LATENTS),
        "step_steady": (without_lengths(inputs), LATENTS),
        "clean": (CLEAN, NEW),
        "clean_steady": (without_lengths(CLEAN), NEW),
        "evict": (EVICT, EVICTED),
    }
    assert as_table(found) == counted(wanted)
    assert list(found) == list(wanted)


def test_options_do_not_touch_each_other(tiny_config):
    plain = as_table(ports(tiny_config))
    timed = as_table(ports(tiny_config, time_tables=True))
    assert {name for name in plain if timed[name] != plain[name]} == {"step", "step_steady"}
    assert timed["step"][1] == plain["step"][1]
    split = as_table(ports(tiny_config, clean_graph=True))
    assert {name for name in plain if split[name] != plain[name]} == {"step", "step_steady"}
    assert split["step"] == (plain["step"][0], table(LATENTS))
    assert split["clean"][1] == table(NEW)
    folded = as_table(ports(tiny_config, text_rows=3))
    # As many rows as the prompt has: the bias alone is new.
    assert folded["step"][0] == [*plain["step"][0], "text_bias 3 float"]
    assert folded["prompt"] == plain["prompt"]


def test_keys_and_values_alone_have_the_compute_dtype(tiny_config):
    graphs = ports(replace(tiny_config, dtype="bfloat16"))
    dtypes = {name: port.dtype for name, port in ports_by_name(graphs).items()}
    narrow = {name for name, dtype in dtypes.items() if dtype == "bfloat16"}
    assert narrow == {name for name in dtypes if "." in name}
    assert set(dtypes.values()) == {"bfloat16", "float32", "int32"}


def test_without_segments_nothing_is_evicted(tiny_config):
    config = replace(tiny_config, policy=CachePolicy(0, 0, 0, 0, last_warmup_chunk=0))
    graphs = ports(config)
    assert list(graphs) == ["prompt", "step", "step_steady"]
    # A layer that keeps nothing still has a row.
    assert {port.shape for port in pool_ports(config)} == {(1, 8)}


def test_pools_are_inputs_of_the_step(tiny_config):
    pools = pool_ports(tiny_config)
    assert [pool.name for pool in pools] == ["hist_k.0", "hist_k.1", "hist_v.0", "hist_v.1"]
    assert set(pools) < set(ports(tiny_config)["step"].inputs)
    assert sum(4 * np.prod(pool.shape) for pool in pools) == tiny_config.nbytes_kv


@pytest.mark.parametrize("clean_graph", [False, True])
def test_the_host_fills_every_small_input(tiny_config, clean_graph):
    """What a backend computes for a pass has the names, shapes and dtypes that graphs take."""

    class Filled(StepwiseBackend):
        name = "filled"
        set_prompt = run_step = run_evict = commit = close = None

    backend = Filled(tiny_config)
    plan = Timeline(tiny_config.policy, tiny_config.chunk.num_frames).advance()
    positions = ChunkPositions.of(plan, tiny_config)
    x = np.zeros(tiny_config.latent_shape, np.float32)
    for time_tables in (False, True):
        graphs = ports(tiny_config, time_tables=time_tables, clean_graph=clean_graph)
        for scalars in (*backend.step_scalars, backend.clean_scalars):
            filled = backend.pass_inputs(x, None, scalars, positions)
            for port in graphs["clean" if clean_graph else "step"].inputs:
                if port.family is None:
                    array = filled[port.name]
                    assert (array.shape, array.dtype.name) == (port.shape, port.dtype), port.name


def test_binding_gives_lists_where_a_graph_takes_one_tensor_a_layer(tiny_config):
    graph = ports(tiny_config)["evict"]
    bound = graph.bind({port.name: port.name.upper() for port in graph.inputs})
    assert bound == (["HIST_K.1"], ["HIST_V.1"], ["NEW_K.1"], ["NEW_V.1"])
    step = ports(tiny_config)["step"]
    bound = step.bind({port.name: port for port in step.inputs})
    assert [each if isinstance(each, list) else each.name for each in bound[:3]] == [
        "x", "eps", "time_sinusoid"
    ]  # fmt: skip
    assert [port.name for port in bound[-1]] == ["cross_v.0", "cross_v.1"]
    with pytest.raises(KeyError, match=r"hist_k\.1"):
        graph.bind({})


def test_a_clean_graph_of_one_layer_takes_empty_lists(tiny_config):
    policy = CachePolicy(num_dynamic_frames=0)
    config = replace(
        tiny_config,
        model=replace(tiny_config.model, num_layers=1),
        partition=replace(tiny_config.partition, static_heads=((0,),)),
        policy=policy,
    )
    clean = ports(config, clean_graph=True)["clean"]
    assert clean.bind({port.name: port.name for port in clean.inputs})[-4:] == ([],) * 4


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hist_k.3", ("hist_k", 3)),
        ("new_state.12", ("new_state", 12)),
        ("x_next", ("x_next", None)),
        ("state.first", ("state.first", None)),
        (".3", (".3", None)),
    ],
)
def test_names_come_apart_as_they_are_put_together(name, parts):
    assert split_name(name) == parts
    assert port_name(*parts) == name


def test_keys_come_before_values():
    assert kv_name("dyn", "v", 4) == "dyn_v.4"
    assert kv_names("new", [0, 2]) == ("new_k.0", "new_k.2", "new_v.0", "new_v.2")
