"""A scripted prompt switch on every backend: the latents that eager PyTorch makes, and its time."""

import json
from dataclasses import replace

import numpy as np
import pytest
from host_cuda import HostCuda
from host_engine import HostEngine
from manifests import edit
from shared_exports import export_once

from forcing_kv.export.bundle.write import BundleLabels
from forcing_kv.export.checkpoint.load import load_model
from forcing_kv.export.inductor.build import build_inductor
from forcing_kv.export.inductor.compile import InductorOptions
from forcing_kv.export.verify.eager import eager_session
from forcing_kv.runtime_trt.bundle.heads import read_heads
from forcing_kv.runtime_trt.bundle.manifest import read_manifest
from forcing_kv.runtime_trt.cuda.chunk_graph import ChunkGraphBackend
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.session import Session
from forcing_kv.tools.digits import shipped

pytestmark = pytest.mark.long

NUM_CHUNKS, SEED = 6, 3
SCRIPT = (
    (0, "a digit 3 moving left ."),
    (5, "a digit 8 moving up ."),
    (12, "a digit 1 moving right ."),
)
"""Frame 5 lies inside chunk 1: that switch waits for chunk 2, at frame 6."""
SWITCHED_AT = [6, 12]


def generate(session: Session) -> np.ndarray:
    """The script by hand: latents [frames, C, h, w]."""
    first, *others = [shipped.encode_prompt(text) for _, text in SCRIPT]
    pending = dict(zip(SWITCHED_AT, others, strict=True))
    session.set_prompt(first)
    chunks = []
    for _ in range(NUM_CHUNKS):
        if session.num_frames in pending:
            session.switch_prompt(pending[session.num_frames])
        chunks.append(session.generate_chunk(seed=SEED).latents)
    return np.concatenate(chunks)


@pytest.fixture(scope="module", params=[True, False], ids=["sink-kept", "sink-dropped"])
def made(request, tmp_path_factory):
    """The shipped model as a bundle, and what eager PyTorch generates."""
    partition = read_heads(shipped.HEADS, shipped.MODEL).partition
    policy = replace(shipped.POLICY, global_sink=request.param)
    config = RolloutConfig(shipped.MODEL, shipped.CHUNK, policy, partition, shipped.SCHEDULE)
    model = load_model(shipped.CHECKPOINT, shipped.MODEL)
    with eager_session(model, config) as session:
        wanted = generate(session)
    bundle = tmp_path_factory.mktemp("switch") / "bundle"
    # The host alone knows of the sink: both run the same graphs.
    plain = replace(config, policy=shipped.POLICY)
    export_once(model, plain, bundle, BundleLabels("digits", "digits", "digits"))
    edit(bundle, lambda data: data["config"]["policy"].update(global_sink=request.param))
    assert read_manifest(bundle).config == config
    return bundle, wanted


def run_script(run_fkv, bundle, folder, backend):
    """Latents that `fkv run --script` writes, and its report of the switches."""
    script, out = folder / "script.jsonl", folder / "v.npz"
    script.write_text("".join(json.dumps({"frame": f, "prompt": p}) + "\n" for f, p in SCRIPT))
    done = run_fkv(
        "run", bundle, "--script", script, "--out", out, "--num-chunks", NUM_CHUNKS, "--seed", SEED,
        "--backend", backend, "--decode", "none", "--num-threads", 1, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["backend"] == backend
    for frame in SWITCHED_AT:
        assert f"prompt switch at frame {frame} took" in done.err
    return np.load(out)["latents"], report["switches"]


def check(latents, switches, wanted):
    np.testing.assert_allclose(latents, wanted, rtol=0, atol=1e-4)
    assert [switch["frame"] for switch in switches] == SWITCHED_AT
    assert [switch["prompt"] for switch in switches] == [text for _, text in SCRIPT[1:]]
    assert all(switch["latency_ms"] > 0 for switch in switches)


def test_onnxruntime(run_fkv, made, tmp_path):
    bundle, wanted = made
    check(*run_script(run_fkv, bundle, tmp_path, "onnxruntime"), wanted)


@pytest.mark.slow
def test_inductor(run_fkv, made, tmp_path):
    bundle, wanted = made
    build_inductor(bundle, InductorOptions("cpu"))
    check(*run_script(run_fkv, bundle, tmp_path, "inductor"), wanted)


def test_chunk_graphs(made):
    bundle, wanted = made
    manifest, cuda = read_manifest(bundle), HostCuda()
    engine = HostEngine(cuda, bundle, manifest)
    with Session(ChunkGraphBackend(cuda, engine, manifest.config, manifest.graphs)) as session:
        latents = generate(session)
        assert session.backend.captured_graphs
    np.testing.assert_allclose(latents, wanted, rtol=0, atol=1e-4)


def test_the_sink_makes_a_difference():
    """Else the two cases above would prove one thing twice."""
    partition = read_heads(shipped.HEADS, shipped.MODEL).partition
    model, videos = load_model(shipped.CHECKPOINT, shipped.MODEL), []
    for kept in (True, False):
        policy = replace(shipped.POLICY, global_sink=kept)
        config = RolloutConfig(shipped.MODEL, shipped.CHUNK, policy, partition, shipped.SCHEDULE)
        with eager_session(model, config) as session:
            videos.append(generate(session))
    kept, dropped = videos
    assert np.array_equal(kept[:6], dropped[:6])
    assert np.abs(kept[6:] - dropped[6:]).max() > 1e-2
