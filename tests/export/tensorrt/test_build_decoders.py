"""Decoders among the engines of a bundle: what is built when, and that it computes the same."""

import json
import shutil

import numpy as np
import pytest
from command_line import fkv
from shared_exports import export_once, shared_graphs
from stand_ins import tiny_decoder_files

from forcing_kv.export.bundle.write import BundleLabels
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.runtime_trt.bundle.manifest import read_manifest
from forcing_kv.runtime_trt.decoder import VideoDecoder
from forcing_kv.runtime_trt.errors import BundleError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.schedule import Schedule

SHAPE = ModelShape(
    2, dim=24, ffn_dim=16, num_heads=2, in_channels=2, text_len=4, text_dim=8, freq_dim=8
)


@pytest.fixture(scope="module", autouse=True)
def _shared_graphs():
    """What commands export here, they export once."""
    with shared_graphs():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny_decoder_files(tmp_path_factory.mktemp("decoders"), SHAPE.in_channels)


@pytest.fixture(scope="module")
def plain_bundle(tmp_path_factory):
    """A bundle without decoders."""
    import torch

    torch.manual_seed(0)
    config = RolloutConfig(
        SHAPE, ChunkShape(3, 4, 6), CachePolicy(), HeadPartition(2, ((), (0,))), Schedule((1000,))
    )
    model = CausalWanModel(SHAPE).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    bundle = tmp_path_factory.mktemp("bundles") / "plain"
    export_once(model, config, bundle, BundleLabels("small"))
    return bundle


def rtx(bundle, *options):
    return fkv("build", bundle, "--backend", "tensorrt-rtx", "--target", "sm89", *options)


def to_build(bundle):
    return json.loads(rtx(bundle, "--dry-run", "--json").stdout)["to_build"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rtx_engines_of_decoders_build_when_they_changed(plain_bundle, files, tmp_path, dtype):
    pytest.importorskip("tensorrt_rtx", reason="needs the Python package tensorrt-rtx")
    pytest.importorskip("polygraphy", reason="needs the Python package polygraphy")
    bundle = shutil.copytree(plain_bundle, tmp_path / "bundle")
    vae, tae = files
    rtx(bundle)
    (before,) = read_manifest(bundle).engines
    assert before.decoders == {}

    fkv("add-decoder", bundle, "--vae", vae, "--tae", tae, "--dtype", dtype)
    assert to_build(bundle) == ["vae.decode", "vae.decode_first", "tae.decode"]
    layers = tmp_path / "layers.json"
    said = rtx(bundle, "--layer-info", layers).stderr
    assert "vae.decode_first: " in said
    assert set(json.loads(layers.read_text())) == {"vae.decode", "vae.decode_first", "tae.decode"}
    (record,) = read_manifest(bundle).engines
    assert {name: graph.sha256 for name, graph in record.graphs.items()} == {
        name: graph.sha256 for name, graph in before.graphs.items()
    }
    assert record.details == before.details
    for kind, info in read_manifest(bundle).decoders.items():
        part = record.decoders[kind]
        assert part.decoder_sha256 == info.sha256
        assert set(part.graphs) == set(part.details) == set(info.graphs)
        assert all(detail.num_layers > 0 for detail in part.details.values())
        assert all((bundle / file).stat().st_size > 1000 for file in part.files)
    assert "nothing to do" in rtx(bundle).stderr
    assert read_manifest(bundle).engines == (record,)
    assert "engines/tensorrt-rtx-sm89-2/vae" in fkv("inspect", bundle, "--json").stdout
    assert fkv("inspect", bundle).exit_code == 0

    (bundle / record.decoders["tae"].graphs["decode"].file).write_bytes(b"damaged")
    assert to_build(bundle) == ["tae.decode"]
    other = "float16" if dtype == "float32" else "float32"
    fkv("add-decoder", bundle, "--vae", vae, "--dtype", other, "--force")
    assert to_build(bundle) == ["vae.decode", "vae.decode_first", "tae.decode"]


def part_states(manifest, kind):
    return manifest.decoders[kind].graphs["decode"].inputs[1:]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_verify_names_a_state_that_is_wrong(plain_bundle, files, tmp_path, dtype, monkeypatch):
    from forcing_kv.runtime_trt.decode.onnxruntime import OnnxRuntimeDecodeRunner

    bundle = shutil.copytree(plain_bundle, tmp_path / "bundle")
    vae, tae = files
    fkv("add-decoder", bundle, "--vae", vae, "--tae", tae, "--dtype", dtype)
    manifest = read_manifest(bundle)
    for kind in ("vae", "tae"):
        said = fkv("verify", bundle, "--decoder", kind, "--json")
        assert said.exit_code == 0, said.stderr
        report = json.loads(said.stdout)
        assert (report["backend"], report["dtype"]) == ("onnxruntime", dtype)
        assert len(report["tensors"]) == 1 + len(part_states(manifest, kind))
    plain = OnnxRuntimeDecodeRunner.read_state

    def wrong(self, name):
        return plain(self, name) + (0.5 if name == "state.3" else 0)

    monkeypatch.setattr(OnnxRuntimeDecodeRunner, "read_state", wrong)
    said = fkv("verify", bundle, "--decoder", "tae")
    assert said.exit_code == 1
    assert "state.3" in said.output


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_inductor_decodes_what_onnx_runtime_does(plain_bundle, files, tmp_path, dtype):
    bundle = shutil.copytree(plain_bundle, tmp_path / "bundle")
    vae, tae = files
    fkv("add-decoder", bundle, "--vae", vae, "--tae", tae, "--dtype", dtype)
    fkv("build", bundle, "--backend", "inductor", "--device", "cpu")
    manifest = read_manifest(bundle)
    (record,) = manifest.engines
    shape = (7, *manifest.config.latent_shape[1:])
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    for kind in manifest.decoders:
        wanted = VideoDecoder.open(bundle, manifest, kind, num_threads=1).decode(latents)
        with VideoDecoder.open(bundle, manifest, kind, "inductor") as decoder:
            for _ in range(2):
                parts = [decoder.decode(part) for part in (latents[:3], latents[3:4], latents[4:])]
                tolerance = 1e-5 if dtype == "float32" else 5e-3
                np.testing.assert_allclose(np.concatenate(parts), wanted, atol=tolerance, rtol=0)
                decoder.reset()
        table = json.loads((bundle / f"engines/inductor-cpu/{kind}/constants.json").read_text())
        pieces = [piece["file"] for entry in table.values() for piece in entry["pieces"]]
        assert f"graphs/{kind}.bin" in pieces

        said = fkv("verify", bundle, "--decoder", kind, "--backend", "inductor", "--json")
        assert said.exit_code == 0, said.stderr
        assert len(json.loads(said.stdout)["tensors"]) == 1 + len(part_states(manifest, kind))

    prompt, video = tmp_path / "prompt.npy", tmp_path / "video.npz"
    np.save(prompt, np.ones((SHAPE.text_len, SHAPE.text_dim), np.float32))
    said = fkv("run", bundle, "--prompt-embeds", prompt, "--num-chunks", 2, "--backend", "inductor",
               "--decode", "vae", "--out", video, "--json")  # fmt: skip
    assert json.loads(said.stdout)["decoder_backend"] == "inductor"
    with np.load(video) as data:
        assert len(data["frames"]) == 11

    # Its own files and those of the bundle are checked, each on its own.
    (package,) = (bundle / record.decoders["vae"].folder).glob("*.pt2")
    content = bytearray(package.read_bytes())
    content[len(content) // 2] ^= 1
    package.write_bytes(content)
    with pytest.raises(BundleError, match=r"vae/package\.pt2: altered since .*`fkv build"):
        VideoDecoder.open(bundle, manifest, "vae", "inductor")
    VideoDecoder.open(bundle, manifest, "tae", "inductor").close()
    other = "float16" if dtype == "float32" else "float32"
    fkv("add-decoder", bundle, "--tae", tae, "--dtype", other, "--force")
    with pytest.raises(BundleError, match=r"compiled from another one.*--backend inductor"):
        VideoDecoder.open(bundle, read_manifest(bundle), "tae", "inductor")
