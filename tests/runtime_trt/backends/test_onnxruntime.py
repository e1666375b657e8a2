"""How ONNX Runtime is asked to run graphs."""

from dataclasses import replace

from forcing_kv.runtime_trt.backends.onnxruntime import run_options
from forcing_kv.runtime_trt.rollout.layout import ChunkShape

SHRINK = "memory.enable_memory_arena_shrinkage"


def entries(options):
    try:
        return options.get_run_config_entry(SHRINK)
    except RuntimeError:  # There is none.
        return None


def test_large_graphs_give_scratch_memory_back(tiny_config):
    assert entries(run_options(tiny_config)) is None
    large = replace(tiny_config, chunk=ChunkShape(3, 60, 104), dtype="float32")
    large = replace(large, model=replace(large.model, ffn_dim=8960))
    assert entries(run_options(large)) == "cpu:0"
