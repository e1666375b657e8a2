"""The full Wan2.1-1.3B shape and VAE through export and TensorRT-RTX, random weights, no GPU.

Takes about ten minutes, 10 GB of memory and 10 GB of disk: `pytest -m slow -s` prints the figures.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

MEASURE = """
import json, resource, sys, time
from pathlib import Path

start = time.perf_counter()
{body}
print(json.dumps({{
    "seconds": round(time.perf_counter() - start),
    "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1),
    **result,
}}))
"""

EXPORT = """
import torch
from forcing_kv.export.bundle.write import BundleLabels, export_bundle
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.model.fp8_layers import block_linears, scales_for
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy

torch.set_num_threads(1)
shape = ModelShape(30, dim=1536, ffn_dim=8960, num_heads=12)
partition = HeadPartition(12, tuple(tuple(range(4 + layer % 2)) for layer in range(30)))
config = RolloutConfig(shape, ChunkShape(3, 60, 104), CachePolicy(), partition, dtype="bfloat16")
with torch.device("meta"):
    model = CausalWanModel(shape).cast_(torch.bfloat16)
model.to_empty(device="cpu").requires_grad_(False)
for parameter in model.parameters():
    parameter.normal_(0, 0.02)
amax = {{linear.name: 8.0 for linear in block_linears(model)}}
export_bundle(
    model, config, Path({bundle!r}), BundleLabels("random-1.3b"), consume=True,
    fp8=scales_for(model, amax) if {fp8} else None,
)
result = {{}}
"""

DECODER = """
import torch
from diffusers import AutoencoderKLWan
from forcing_kv.export.decoder.add import add_decoder
from forcing_kv.export.decoder.vae import wan_decoder

torch.set_num_threads(1)
folder = Path({bundle!r})
AutoencoderKLWan().save_pretrained(folder.parent / "vae")
add_decoder(folder, wan_decoder(folder.parent / "vae", (60, 104), "float16"))
result = {{}}
"""

BUILD = """
from forcing_kv.export.tensorrt.build import run_build
from forcing_kv.export.tensorrt.options import EngineOptions
from forcing_kv.export.tensorrt.plan import plan_build

plan = plan_build(Path({bundle!r}), EngineOptions("tensorrt-rtx", target="sm89"))
record, _ = run_build(plan)
record = record.to_json()
decoder = record["decoders"].get("vae", {{}})
result = {{"details": record["details"], "decoder": decoder.get("details")}}
"""


def measured(body: str, bundle: Path, *, fp8: bool = False) -> dict:
    """Runs a piece of code in a process of its own."""
    code = MEASURE.format(body=body.format(bundle=str(bundle), fp8=fp8))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_full_size_model_builds_without_a_gpu(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs the Python package tensorrt-rtx")
    bundle, start = tmp_path / "bundle", time.perf_counter()
    figures = {"export": measured(EXPORT, bundle), "build": measured(BUILD, bundle)}
    # A process of its own: the peak of the small build is not hidden by that of the large one.
    figures["add decoder"] = measured(DECODER, bundle)
    figures["build decoder"] = measured(BUILD, bundle)
    print(json.dumps(figures, indent=1), f"{time.perf_counter() - start:.0f} s in all")
    details = figures["build"]["details"]
    assert details["step"]["num_fused_attention"] == details["step"]["num_attention"] == 2 * 30
    steady = details["step_steady"]
    # Layer 0 is one block of heads, every other one has two.
    assert steady["num_fused_attention"] == steady["num_attention"] == 30 + 59
    built = figures["build decoder"]
    assert built["details"] == figures["build"]["details"]
    assert set(built["decoder"]) == {"decode", "decode_first"}


def test_full_size_model_builds_with_fp8_layers(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs the Python package tensorrt-rtx")
    bundle = tmp_path / "bundle"
    figures = {"export": measured(EXPORT, bundle, fp8=True), "build": measured(BUILD, bundle)}
    print(json.dumps(figures, indent=1))
    step = figures["build"]["details"]["step"]
    assert step["num_fp8_products"] == 6 * 30
    assert step["num_fused_attention"] == 2 * 30
    # 1.23 G weights in 8 bits, not 16.
    assert step["weight_nbytes"] < 1.5e9
