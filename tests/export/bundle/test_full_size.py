"""The full Wan2.1-1.3B shape with random weights exports on a machine without a GPU."""

import resource
import time

import onnx
import pytest
import torch

from forcing_kv.export.bundle.write import BundleLabels, export_bundle
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.request.presets import PRESETS
from forcing_kv.runtime_trt.bundle.manifest import read_manifest
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition

PARAMETERS = 1_418_996_800


def random_model(shape, dtype: torch.dtype) -> CausalWanModel:
    """Weights drawn straight in the compute dtype: half the memory of a float32 model."""
    with torch.device("meta"):
        model = CausalWanModel(shape)
    drawn = {
        name: torch.empty(
            value.shape, dtype=torch.float32 if model.is_island(name) else dtype
        ).normal_(std=0.02)
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(drawn, assign=True)
    return model.requires_grad_(False)


@pytest.mark.slow
def test_wan_1_3b_exports_in_bfloat16_at_480p(tmp_path):
    preset = PRESETS["self-forcing-1.3b"]
    shape = preset.model
    # 134 static heads of 360, as in the published partition, spread over the layers.
    static = tuple(tuple(range(4 + (layer % 2))) for layer in range(shape.num_layers))
    config = RolloutConfig(
        shape,
        ChunkShape(preset.chunk_frames, *preset.latent_size),
        preset.policy,
        HeadPartition(shape.num_heads, static),
        preset.schedule,
        "bfloat16",
    )
    model = random_model(shape, torch.bfloat16)
    assert sum(value.numel() for value in model.state_dict().values()) == PARAMETERS
    start = time.perf_counter()
    export_bundle(model, config, tmp_path / "b", BundleLabels("full size"), consume=True)
    seconds = time.perf_counter() - start
    manifest = read_manifest(tmp_path / "b")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"export {seconds:.0f} s, peak {peak:.1f} GB, {manifest.weights_nbytes / 1e9:.2f} GB")

    ports = {info.name: info for info in manifest.graphs["step"].inputs}
    tokens, head_dim = 1560, 128
    assert ports["x"].shape == (3, 16, 60, 104)
    assert ports["hist_k.0"].shape == (12 * 2 * tokens, head_dim)
    # Static heads hold sink and one local frame, dynamic heads one frame of segments more.
    assert ports["hist_v.1"].shape == ((5 * 2 + 7 * 3) * tokens, head_dim)
    assert ports["cross_k.29"].shape == (12, 512, head_dim)
    assert {ports[name].dtype for name in ("hist_k.0", "cross_v.3")} == {"bfloat16"}
    outputs = {info.name: info for info in manifest.graphs["step"].outputs}
    assert outputs["new_k.29"].shape == (config.layouts[29].num_own_rows, head_dim)
    evicted = {info.name: info for info in manifest.graphs["evict"].outputs}
    assert evicted["dyn_k.1"].shape == (7, tokens, head_dim)
    assert evicted["dyn_k.2"].shape == (8, tokens, head_dim)
    assert evicted["scores"].shape == (3, 6)
    assert "dyn_k.0" not in evicted

    nodes = 0
    for info in manifest.graphs.values():
        graph = onnx.load(tmp_path / "b" / info.file, load_external_data=False)
        nodes += sum(node.domain == "forcing_kv" for node in graph.graph.node)
    # Attention and qk-norm in 30 layers of both forms, one scoring, and an eviction in 29.
    assert nodes == 2 * (30 * 2) + 1 + 29
    assert manifest.weights_nbytes < 2 * PARAMETERS * 1.01 + 200e6
    assert peak < 16
