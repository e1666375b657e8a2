"""Graphs without plugins mean what the portable ones do, in ONNX's own evaluator."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from small_bundles import SHAPE, export

from forcing_kv.export.tensorrt.rtx_graph import fuse_attention, inline_bodies
from forcing_kv.runtime_trt.backends.base import ChunkPositions
from forcing_kv.runtime_trt.bundle.manifest import read_manifest
from forcing_kv.runtime_trt.dtypes import DTYPES
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.ports import kv_names
from forcing_kv.runtime_trt.rollout.timeline import Timeline

POLICIES = {
    "published": CachePolicy(),
    "no sink, unequal": CachePolicy(num_sink_frames=0, num_temporal_frames=2, last_warmup_chunk=0),
    "no history": CachePolicy.dense(3, 3, 0),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_the_plugin_free_graph_means_the_same(tmp_path, policy):
    """The fused form against the portable one, both in ONNX's own evaluator and in float32."""
    import onnx_ir as ir
    from onnx.reference import ReferenceEvaluator

    bundle = export(tmp_path / "bundle", "float32", policy)
    config = read_manifest(bundle).config
    portable = ir.load(bundle / "graphs/step.onnx")
    fused = ir.load(bundle / "graphs/step.onnx")
    assert fuse_attention(fused, replace(config, dtype="float16")) == SHAPE.num_layers
    rng = np.random.default_rng(0)
    inputs = {}
    for value in portable.graph.inputs:
        shape, dtype = value.shape.numpy(), value.dtype.numpy()
        inputs[value.name] = rng.standard_normal(shape).astype(dtype)
    tokens = config.chunk.tokens_per_frame
    for new_len in (config.chunk.num_tokens, tokens):
        lengths = np.zeros((SHAPE.num_layers, SHAPE.num_heads), np.int32)
        for layer, layout in enumerate(config.layouts):
            for group in layout.groups:
                lengths[layer, group.heads] = min(group.rows_per_head, tokens)
        inputs |= {"hist_len": lengths, "new_len": np.asarray([new_len], np.int32)}
        results = []
        for model in (portable, fused):
            path = bundle / "graphs" / "check.onnx"
            onnx.save(ir.to_proto(inline_bodies(model.clone())), path)
            results.append(ReferenceEvaluator(str(path)).run(["x0", "x_next"], inputs))
        for left, right in zip(*results, strict=True):
            np.testing.assert_allclose(right, left, atol=1e-5, rtol=0)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_every_steady_graph_means_what_the_general_one_does(tmp_path, policy):
    import onnx_ir as ir
    import onnxruntime as ort
    from onnx.reference import ReferenceEvaluator

    bundle = export(tmp_path / "bundle", "float32", policy)
    manifest = read_manifest(bundle)
    config = manifest.config
    native = ir.load(bundle / "graphs/step_steady.onnx")
    assert fuse_attention(native, replace(config, dtype="float16")) == SHAPE.num_layers
    native_path = bundle / "graphs" / "native.onnx"
    onnx.save(ir.to_proto(inline_bodies(native)), native_path)

    timeline = Timeline(policy, config.chunk.num_frames)
    plan = next(plan for plan in iter(timeline.advance, None) if plan.steady)
    positions = ChunkPositions.of(plan, config).arrays
    rng = np.random.default_rng(0)
    inputs = {
        info.name: positions.get(
            info.name, rng.standard_normal(info.shape).astype(DTYPES[info.dtype].numpy)
        )
        for info in manifest.graphs["step"].inputs
    }
    for layer, layout in enumerate(config.layouts):
        for group in layout.groups:
            for name in kv_names("hist", [layer]):
                rows = inputs[name][group.rows].reshape(
                    group.num_heads, group.rows_per_head, SHAPE.head_dim
                )
                rows[:, group.steady_rows :] = np.nan
    known = {info.name for info in manifest.graphs["step_steady"].inputs}
    steady_inputs = {name: value for name, value in inputs.items() if name in known}
    assert set(inputs) - known == {"hist_len", "new_len"}

    def by_ort(info, inputs):
        session = ort.InferenceSession(str(bundle / info.file), providers=["CPUExecutionProvider"])
        return session.run(None, inputs)

    expected = by_ort(manifest.graphs["step"], inputs)
    for found in (
        by_ort(manifest.graphs["step_steady"], steady_inputs),
        by_ort(manifest.onnxruntime["step"], inputs),
        ReferenceEvaluator(str(native_path)).run(None, steady_inputs),
    ):
        for left, right in zip(found, expected, strict=True):
            np.testing.assert_allclose(left, right, atol=1e-5, rtol=0)
