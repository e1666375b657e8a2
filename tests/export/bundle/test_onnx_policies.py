"""Unusual policies in ONNX Runtime against eager: empty pools, one-sided layers, small chunks."""

import numpy as np
import pytest
import torch
from shared_exports import export_once

from forcing_kv.export.bundle.write import BundleLabels
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.verify.eager import eager_session
from forcing_kv.runtime_trt import Session
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.schedule import Schedule

SHAPE = ModelShape(
    3, dim=36, ffn_dim=24, num_heads=3, in_channels=2, text_len=4, text_dim=5, freq_dim=8
)
CHUNKS = 6
POLICIES = {
    "nothing is kept": (CachePolicy(0, 0, 0, 0), 3, ((0,), (1, 2), ())),
    "static heads keep nothing": (CachePolicy(0, 0, 1, 1, 2), 3, ((0,), (1,), (0, 1, 2))),
    "one-sided layers, per layer": (
        CachePolicy(1, 2, 3, 2, 3, 2, compress_first_layer=True, selection="per_layer"),
        3,
        ((0, 1, 2), (), (1,)),
    ),
    "layer 0 all dynamic": (
        CachePolicy(0, 1, 1, 1, 6, 0, compress_first_layer=True), 3, ((), (2,), (0,)),
    ),
    "one frame a chunk": (CachePolicy(1, 1, 1, 1, 1, 1, global_sink=False), 1, ((0,), (2,), ())),
    "all segments kept": (CachePolicy(1, 1, 2, 2, 6, 1, global_sink=False), 2, ((0,), (2,), ())),
    "a ring with a sink": (CachePolicy.dense(12, 3, 2), 3, ((), (), ())),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_policy(name, tmp_path):
    torch.set_num_threads(1)
    policy, frames, static = POLICIES[name]
    config = RolloutConfig(
        SHAPE,
        ChunkShape(frames, 4, 6),
        policy,
        HeadPartition(SHAPE.num_heads, static),
        Schedule((1000, 500)),
    )
    torch.manual_seed(1)
    model = CausalWanModel(SHAPE).requires_grad_(False)
    export_once(model, config, tmp_path / "b", BundleLabels(name))
    random = np.random.default_rng(0)
    prompts = random.standard_normal((2, SHAPE.text_len, SHAPE.text_dim)).astype(np.float32)
    videos = []
    for session in (
        eager_session(model, config),
        Session.open(tmp_path / "b", "onnxruntime", num_threads=1),
    ):
        with session:
            session.set_prompt(prompts[0])
            chunks = list(session.stream(CHUNKS, seed=2))
            if config.switchable:
                session.switch_prompt(prompts[1])
                chunks += session.stream(CHUNKS, seed=2)
            videos.append(chunks)
    for ours, theirs in zip(*videos, strict=True):
        assert np.isfinite(ours.latents).all()
        np.testing.assert_allclose(theirs.latents, ours.latents, atol=1e-5)
        assert (ours.kept is None) == (theirs.kept is None)
        if ours.kept is not None:
            assert np.array_equal(ours.kept, theirs.kept)
    if config.evicted_layers:
        assert videos[0][-1].kept is not None
