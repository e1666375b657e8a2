"""The smallest bundles that TensorRT fuses attention of."""

from shared_exports import export_once

from forcing_kv.export.bundle.write import BundleLabels
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.schedule import Schedule

SHAPE = ModelShape(
    2, dim=64, ffn_dim=64, num_heads=2, in_channels=2, text_len=8, text_dim=8, freq_dim=8
)
"""The smallest that TensorRT fuses attention of: head dim 32."""


def export(folder, dtype, policy=None):
    import torch

    torch.manual_seed(0)
    partition = HeadPartition(2, ((), (0,)))
    config = RolloutConfig(
        SHAPE,
        ChunkShape(3, 8, 12),
        policy or CachePolicy(),
        partition,
        Schedule((1000, 500)),
        dtype,
    )
    model = CausalWanModel(SHAPE).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    export_once(model, config, folder, BundleLabels("small"))
    return folder
