"""Predicted memory and arithmetic against known numbers, real tensors and brute force."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from host_cuda import HostCuda
from hypothesis import given, settings
from hypothesis import strategies as st

from forcing_kv.export.cost.devices import DEVICES, find_device
from forcing_kv.export.cost.memory import (
    MemoryCost,
    all_fp8,
    buffer_nbytes,
    engine_nbytes,
    num_parameters,
    weight_counts,
)
from forcing_kv.export.cost.work import (
    PartCost,
    attended_nbytes,
    fps_bound,
    head_frames,
    histories,
    mean_frames,
    num_passes,
    steady_history,
    step_cost,
)
from forcing_kv.export.inductor.compile import tensor_info
from forcing_kv.export.model.capture import graph_sources
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.request.presets import PRESETS, WAN_1_3B, WAN_14B
from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo
from forcing_kv.runtime_trt.cuda.buffers import BufferSpec
from forcing_kv.runtime_trt.cuda.chunk_program import plan_memory
from forcing_kv.runtime_trt.cuda.chunk_resources import ChunkResources
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.ports import ports
from forcing_kv.runtime_trt.rollout.resolution import RESOLUTIONS

PERCENT = 0.01
SMALL = ModelShape(
    3, dim=36, ffn_dim=20, num_heads=3, in_channels=2, text_len=5, text_dim=7, freq_dim=6
)
# Static heads by layer; 134 of 360 with 6 dynamic heads in layer 0, as in the published partition.
STATIC = (6, *(4 if layer < 17 else 5 for layer in range(29)))


def self_forcing(resolution, policy=None):
    preset = PRESETS["self-forcing-1.3b"]
    partition = HeadPartition(12, tuple(tuple(range(count)) for count in STATIC))
    chunk = ChunkShape(3, *RESOLUTIONS[resolution])
    return RolloutConfig(
        preset.model, chunk, policy or preset.policy, partition, preset.schedule, "bfloat16"
    )


def tflop(parts):
    return sum(part.flops for part in parts) / 1e12


def test_parameters():
    assert num_parameters(WAN_1_3B) == 1_418_996_800
    assert num_parameters(WAN_14B) == 14_288_491_584


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [SMALL, WAN_1_3B, WAN_14B], ids=["small", "1.3B", "14B"])
def test_weights_are_those_of_the_model(shape, dtype):
    with torch.device("meta"):
        model = CausalWanModel(shape).cast_(getattr(torch, dtype))
    weights = model.state_dict()
    sizes = {name: value.numel() * value.element_size() for name, value in weights.items()}
    text = ("text_embedding.", "cross_attn.k.", "cross_attn.v.", "cross_attn.norm_k.")
    prompt = sum(size for name, size in sizes.items() if any(part in name for part in text))
    engines = {"prompt": prompt, "step": sum(sizes.values()) - prompt}
    assert engine_nbytes(shape, dtype) == engines
    native = engine_nbytes(shape, dtype, native_attention=True)
    assert native == engines | {"step_steady": engines["step"]}
    assert num_parameters(shape) == sum(value.numel() for value in weights.values())
    feed_forward = sum(value.numel() for name, value in weights.items() if ".ffn." in name)
    assert weight_counts(shape)["feed-forward"].total == feed_forward


@pytest.mark.parametrize(
    ("resolution", "rest", "dense", "steady"),
    [("480p", 12.15, 16.15, 7.55), ("720p", 28.03, 86.0, 40.2), ("1080p", 63.54, 442, 206)],
)
def test_known_flops_of_a_step(resolution, rest, dense, steady):
    config = self_forcing(resolution)
    parts = step_cost(config, [steady_history(config)])
    assert parts[0].name == "self-attention"
    assert tflop(parts[1:]) == pytest.approx(rest, rel=PERCENT)
    assert tflop(parts[:1]) == pytest.approx(steady, rel=PERCENT)
    config = self_forcing(resolution, CachePolicy.dense(21, 3))
    five_seconds = step_cost(config, histories(config, 7))
    assert tflop(five_seconds[:1]) == pytest.approx(dense, rel=PERCENT)
    assert tflop(five_seconds[1:]) == pytest.approx(rest, rel=PERCENT)


@pytest.mark.parametrize(
    ("resolution", "dense", "attended"),
    [("480p", 6.04, 1.61), ("720p", 13.9, 3.72), ("1080p", 31.6, 8.44)],
)
def test_known_sizes_of_the_cache(resolution, dense, attended):
    config = self_forcing(resolution)
    history = steady_history(config)
    assert mean_frames(config, history) == pytest.approx(5.61, rel=PERCENT)
    assert attended_nbytes(config, history) / 1e9 == pytest.approx(attended, rel=PERCENT)
    config = self_forcing(resolution, CachePolicy.dense(21, 3))
    allocated = config.nbytes_kv + buffer_nbytes(config)["K/V of the chunk"]
    assert allocated / 1e9 == pytest.approx(dense, rel=PERCENT)
    assert attended_nbytes(config, steady_history(config)) == allocated


def test_known_price_of_an_exact_warm_up():
    preset = PRESETS["krea-14b"]
    partition = HeadPartition(40, (tuple(range(20)),) * 40)
    config = RolloutConfig(
        preset.model, preset.chunk, preset.policy, partition, preset.schedule, "bfloat16"
    )
    assert config.nbytes_kv / 1e9 == pytest.approx(3.83, rel=PERCENT)
    clipped = replace(config, policy=replace(preset.policy, warmup="steady"))
    assert clipped.nbytes_kv / 1e9 == pytest.approx(2.56, rel=PERCENT)
    assert num_passes(config) == 6


def test_known_bounds_of_the_frame_rate():
    config = self_forcing("480p")
    parts = step_cost(config, [steady_history(config)])
    device = DEVICES["h200"]
    assert device.sustained_tflops("bfloat16") == pytest.approx(790, rel=PERCENT)
    assert 24 <= sum(part.ideal_ms(device, "bfloat16") for part in parts) <= 25
    assert 96 <= fps_bound(config, parts, device) <= 100


def graph_infos(config):
    """Inputs and outputs of the graphs, from the tensors that trace them."""
    model = CausalWanModel(config.model).cast_(getattr(torch, config.dtype))
    infos = {}
    with torch.no_grad():
        for source in graph_sources(model, config):
            inputs = torch.utils._pytree.tree_leaves(source.arguments)
            outputs = torch.utils._pytree.tree_leaves(source.module(*source.arguments))
            infos[source.name] = GraphInfo(
                "", "",
                tuple(map(tensor_info, source.input_names, inputs)),
                tuple(map(tensor_info, source.output_names, outputs)),
            )  # fmt: skip
    return infos


def port_nbytes(config):
    """Bytes of every input and output of the graphs, by name."""
    return {
        info.name: BufferSpec(info.name, info.shape, info.dtype).nbytes
        for graph in graph_infos(config).values()
        for info in (*graph.inputs, *graph.outputs)
    }


@settings(max_examples=25)
@given(data=st.data())
def test_buffers_are_those_of_the_graphs(data, configs):
    config = data.draw(configs(SMALL, (4, 4)), "config")
    config = replace(config, dtype=data.draw(st.sampled_from(["float32", "bfloat16"]), "dtype"))
    found = port_nbytes(config)
    predicted = buffer_nbytes(config)
    kinds = {
        "hist": [f"K/V {kind}" for kind in ("uncompressed", "static", "dynamic")],
        "new": ["K/V of the chunk"],
        "dyn": ["K/V of the eviction"],
        "cross": ["K/V of the text"],
    }
    for prefix, keys in kinds.items():
        names = [name for name in found if name.startswith((f"{prefix}_k.", f"{prefix}_v."))]
        assert sum(found.pop(name) for name in names) == sum(predicted.pop(key) for key in keys)
    assert predicted == {"inputs and outputs": sum(found.values())}


POLICIES = {
    **{name: PRESETS[name].policy for name in ("self-forcing-1.3b", "longlive-1.3b", "krea-14b")},
    "krea-14b, steady warm-up": replace(PRESETS["krea-14b"].policy, warmup="steady"),
    "dense, 21 frames": CachePolicy.dense(21, 3),
    "dense, 12 frames and a sink": CachePolicy.dense(12, 3, 3),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_a_session_allocates_what_is_predicted(policy, dtype):
    """The runtime's own allocation, on the double of the CUDA calls."""
    partition = HeadPartition(3, ((0,), (2,), (0, 1)))
    schedule = PRESETS["self-forcing-1.3b"].schedule
    config = RolloutConfig(SMALL, ChunkShape(3, 8, 12), policy, partition, schedule, dtype)
    allocated, specs = allocation(config, graph_infos(config))
    cost = MemoryCost.of(config)
    padding = sum(spec.padded_nbytes - spec.nbytes for spec in specs)
    assert allocated == sum(cost.buffers.values()) + cost.copies + padding
    assert padding < 256 * len(specs)
    assert kv_of(specs, "hist") == config.nbytes_kv


def allocation(config, graphs):
    """What a session allocates on the device, and its buffers, by the double of the CUDA calls."""
    allocated = []

    class Counting(HostCuda):
        """Hands out address space; nothing is written, so it takes no memory."""

        def malloc(self, nbytes):
            allocated.append(nbytes)
            return super().malloc(nbytes)

        def new_array(self, nbytes):
            return np.empty(nbytes, np.uint8)

        def fill(self, address, value, nbytes, stream):
            pass

    cuda = Counting(free_nbytes=1 << 35)
    resources = ChunkResources(cuda, config, plan_memory(config, graphs, {}), lambda: None)
    specs = list(resources.memory.plan.specs.values())
    resources.close()
    return sum(allocated), specs


def kv_of(specs, *families):
    """Bytes of keys and values."""
    stems = tuple(f"{family}_{part}." for family in families for part in "kv")
    return sum(spec.nbytes for spec in specs if spec.name.startswith(stems))


def test_keys_and_values_take_a_quarter_of_the_dense_ones():
    """Allocated at the shapes of 480p, the chunk's own rows counted on both sides."""
    sizes = {}
    for policy in (CachePolicy(), CachePolicy.dense(21, 3)):
        config = self_forcing("480p", policy)
        allocated, specs = allocation(config, ports(config))
        cost = MemoryCost.of(config)
        padding = sum(spec.padded_nbytes - spec.nbytes for spec in specs)
        assert allocated == sum(cost.buffers.values()) + cost.copies + padding
        sizes[policy] = kv_of(specs, "hist", "new", "dyn")
        assert sizes[policy] == cost.kv_nbytes
    compressed, dense = sizes.values()
    assert dense / 1e9 == pytest.approx(6.04, rel=PERCENT)
    assert compressed <= 0.25 * dense


@settings(max_examples=60)
@given(data=st.data())
def test_attended_rows_are_those_of_every_head(data, configs):
    config = data.draw(configs(SMALL, (4, 4)), "config")
    num_chunks = data.draw(st.integers(1, 8), "num_chunks")
    history = histories(config, num_chunks)[-1]
    total = 0
    for layer, layout in enumerate(config.layouts):
        for head in range(SMALL.num_heads):
            kind = "static" if head in config.partition.static_heads[layer] else "dynamic"
            if layout.group("uncompressed"):
                kind = "uncompressed"
            total += history[kind] + config.chunk.num_frames
    assert head_frames(config, history) == total
    rows = total * config.chunk.tokens_per_frame
    assert attended_nbytes(config, history) == 2 * rows * SMALL.head_dim * 4
    steady = histories(config, 40)
    assert steady_history(config) == steady[-1] == steady[-2]


def test_a_slower_bus_or_unit_never_makes_a_step_faster():
    config = self_forcing("480p")
    parts = step_cost(config, [steady_history(config)])
    best = DEVICES["h200"]
    for slower in (replace(best, tflops_16bit=99), replace(best, bandwidth_gbps=99)):
        assert fps_bound(config, parts, slower) < fps_bound(config, parts, best)


def test_fp8_flops_are_those_of_the_rounded_products():
    config = self_forcing("480p")
    model, tokens, history = config.model, config.chunk.num_tokens, [steady_history(config)]
    square = 2 * model.num_layers * tokens * model.dim**2
    parts = {part.name: part for part in step_cost(config, history, all_fp8(model))}
    assert {name: part.fp8_flops for name, part in parts.items()} == {
        "self-attention": 0,
        "projections": 4 * square,
        "cross-attention": 2 * square,
        "feed-forward": parts["feed-forward"].flops,
        "embeddings and head": 0,
    }
    assert parts["projections"].flops == 4 * square
    some = step_cost(config, history, {"ffn.0": 3, "cross_attn.o": 1})
    assert [part.fp8_flops for part in some] == [
        0, 0, 2 * tokens * model.dim**2, 3 * 2 * tokens * model.dim * model.ffn_dim, 0
    ]  # fmt: skip
    assert [part.flops for part in some] == [part.flops for part in parts.values()]


def test_half_of_the_products_in_fp8_take_three_quarters_of_the_time():
    device = DEVICES["h200"]
    wide, mixed = PartCost("", 8e12, 0), PartCost("", 8e12, 0, fp8_flops=4e12)
    assert mixed.ideal_ms(device, "bfloat16") == pytest.approx(
        0.75 * wide.ideal_ms(device, "bfloat16")
    )


def test_fit():
    cost = MemoryCost.of(self_forcing("480p"))
    assert not MemoryCost(cost.weights, {}, 24 * 2**30).fits(24)
    assert MemoryCost(0, {}, 23 * 2**30 - 10**9).fits(24)
    assert [cost.fits(size) for size in (4, 16, 141)] == [False, True, True]


def test_figures_of_devices_are_dense_and_sum_in_float32():
    for device in DEVICES.values():
        assert 8 <= device.memory_gib <= 300
        assert 200 < device.bandwidth_gbps <= 8000
        if device.title.startswith("GeForce"):  # Twice float32's rate; advertised is four times.
            assert device.tflops_16bit == pytest.approx(2 * device.tflops_float32, rel=0.01)
        ampere = ("rtx30", "a10")
        assert device.has_fp8 is not device.name.startswith(ampere)


def test_a_device_goes_by_the_names_that_people_use():
    for name, wanted in (
        ("H100", "h100"), ("NVIDIA GeForce RTX 5070 Ti", "rtx5070ti"), ("rtx-4090", "rtx4090"),
        ("A100 80GB PCIe", "a100-pcie"), ("h100_pcie", "h100-pcie"),
    ):  # fmt: skip
        assert find_device(name).name == wanted
    for name, near in (("5090", "rtx5090"), ("geforce 4070", "rtx4070"), ("h100sxm", "h100")):
        with pytest.raises(InputError, match=f"did you mean {near}.*choose one of"):
            find_device(name)
    for name in ("", " ", "nvidia"):
        with pytest.raises(InputError, match="choose one of"):
            find_device(name)


def test_an_unknown_device_lists_the_known():
    with pytest.raises(InputError, match=r"tpu.*rtx4090"):
        find_device("tpu")
