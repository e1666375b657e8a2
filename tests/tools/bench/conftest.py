"""A tiny workload and finished rows."""

import pytest
import torch

from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.request.presets import DENSE_WINDOW_FRAMES
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.schedule import Schedule
from forcing_kv.tools.bench.report.rows import Row
from forcing_kv.tools.bench.workloads import Workload, random_prompt

SHAPE = ModelShape(2, 32, 48, 4, in_channels=4, text_len=12, text_dim=16, freq_dim=16)
CHUNK = ChunkShape(3, 4, 6)


def tiny_model(device: str = "cpu") -> CausalWanModel:
    torch.manual_seed(0)
    return CausalWanModel(SHAPE).requires_grad_(False).eval().to(device)


@pytest.fixture
def tiny():
    """Makes a tiny workload of a policy."""

    def make(policy: str = "forcing-kv") -> Workload:
        own, heads = CachePolicy(num_segments=3), HeadPartition(4, ((), (0, 2)))
        if policy == "dense":
            own, heads = (
                CachePolicy.dense(DENSE_WINDOW_FRAMES, 3),
                HeadPartition.uniform(2, 4, static=True),
            )
        config = RolloutConfig(SHAPE, CHUNK, own, heads, Schedule((1000, 500)))
        return Workload(
            "tiny", "native", policy, config, tiny_model, lambda: random_prompt(SHAPE, 5)
        )

    return make


@pytest.fixture
def row():
    """Makes a finished row."""

    def make(kind: str, subject: str, **changes) -> Row:
        metrics = {
            "chunk": {
                "denoiser_ms": {"median": 100.0, "p20": 99.0, "p80": 101.0},
                "denoiser_fps": 120.0,
                "steps_only_ms": {"median": 80.0, "p20": 79.0, "p80": 81.0},
                "kv_nbytes": 2_000_000,
            },
            "rollout": {"p99_ms": 104.0, "chunk_ms": [100.0, 101.0]},
            "load": {"open_ms": 1.0},
        }
        workload = {"model": "tiny", "size": "native", "policy": "dense", "dtype": "float32"}
        environment = {"device": "cpu", "versions": {"torch": "1"}, "commit": "abc", "cpu": "C"}
        given = {
            "workload": workload,
            "environment": environment,
            "metrics": metrics.get(kind, {}),
            "gate": {"error": 1e-6, "bound": 1e-4},
            "run": {"asked_chunks": 5},
        }
        return Row(kind, subject, **(given | changes))

    return make
