"""Decoders in a bundle: ONNX Runtime against torch, one frame after another, and mistakes."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from shared_exports import shared_graphs
from stand_ins import decode_clip, tiny_decoder_files

from forcing_kv.export.decoder.add import add_decoder
from forcing_kv.export.decoder.tae import tiny_decoder
from forcing_kv.export.decoder.vae import wan_decoder
from forcing_kv.runtime_trt.bundle.manifest import read_manifest
from forcing_kv.runtime_trt.decoder import VideoDecoder, to_rgb8
from forcing_kv.runtime_trt.errors import BackendUnavailableError, BundleError, InputError

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", autouse=True)
def _shared_graphs():
    """What commands export here, they export once."""
    with shared_graphs():
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Both decoders for the digits' latents, with random weights."""
    folder = tmp_path_factory.mktemp("decoders")
    tiny_decoder_files(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(digits_bundle, sources, tmp_path_factory):
    """A bundle with both decoders."""
    folder = tmp_path_factory.mktemp("decoders") / "bundle"
    shutil.copytree(digits_bundle, folder)
    add_decoder(folder, wan_decoder(sources / "vae", (8, 8)))
    add_decoder(folder, tiny_decoder(sources / "taew2_1.pth", (8, 8)))
    return folder


@pytest.mark.parametrize("kind", ["vae", "tae"])
def test_onnx_decoder_streams_what_torch_decodes(bundle, sources, kind):
    source = (wan_decoder(sources / "vae", (8, 8)) if kind == "vae"
              else tiny_decoder(sources / "taew2_1.pth", (8, 8)))  # fmt: skip
    latents = np.random.default_rng(0).standard_normal((7, 16, 8, 8), np.float32)
    with torch.no_grad():
        wanted = decode_clip(source, torch.from_numpy(latents)).numpy()
    decoder = VideoDecoder.open(bundle, read_manifest(bundle), kind, num_threads=1)
    for _ in range(2):
        parts = [decoder.decode(part) for part in (latents[:3], latents[3:4], latents[4:])]
        np.testing.assert_allclose(np.concatenate(parts), wanted, atol=1e-5)
        decoder.reset()
    assert to_rgb8(wanted).shape == (len(wanted), *wanted.shape[2:], 3)


def test_decoder_needs_neither_torch_nor_diffusers(bundle, run_blocked):
    heavy = ["torch", "diffusers", "safetensors", "onnx"]
    done = run_blocked(
        "from pathlib import Path\nimport numpy as np\n"
        "from forcing_kv.runtime_trt.decoder import VideoDecoder\n"
        "from forcing_kv.runtime_trt.bundle.manifest import read_manifest\n"
        f"bundle = Path({str(bundle)!r})\n"
        "decoder = VideoDecoder.open(bundle, read_manifest(bundle), 'tae', num_threads=1)\n"
        "print(decoder.decode(np.zeros((3, 16, 8, 8), np.float32)).shape)",
        blocked=heavy,
    )
    assert done.stdout == "(9, 3, 64, 64)\n", done.stderr


def test_run_decodes_with_the_bundles_decoder(bundle, run_fkv, tmp_path):
    for decode, size in (("tae", 64), ("vae", 16)):
        out = tmp_path / f"{decode}.npz"
        done = run_fkv(
            "run", bundle, "--prompt", "a digit 3 moving left .", "--decode", decode, "--out", out,
            "--num-chunks", 2, "--num-threads", 1, "--json",
        )  # fmt: skip
        assert done.code == 0, done.err
        record = json.loads(done.out)
        assert (record["decoder"], record["decoder_backend"]) == (decode, "onnxruntime")
        assert len(record["decoder_chunk_ms"]) == 2
        assert re.search(rf"decoded by {decode} on onnxruntime.*, decoding \d+\.\d ms", done.err)
        with np.load(out) as data:
            assert data["frames"].shape[1:] == (size, size, 3)
            assert len(data["frames"]) == (21 if decode == "tae" else 11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--decode", "vae", "--decode-backend", "tensorrt"), "--backend tensorrt`"),
        (("--decode", "tae", "--decode-backend", "inductor"), "--backend inductor`"),
        (("--decode", "tae", "--decode-backend", "magic"), "'magic' is unknown; choose one of"),
        (("--decode-backend", "inductor"), "--decode vae or tae"),
    ],
)
def test_a_backend_that_has_no_engine_is_refused(bundle, run_fkv, tmp_path, options, message):
    done = run_fkv("run", bundle, "--prompt", "a digit 3 moving left .", "--num-chunks", 1,
                   "--num-threads", 1, "--out", tmp_path / "v.npz", *options)  # fmt: skip
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "v.npz").exists()


def test_a_second_decoder_of_a_kind_needs_force(bundle, sources, run_fkv):
    before = (bundle / "manifest.json").read_bytes()
    done = run_fkv("add-decoder", bundle, "--tae", sources / "taew2_1.pth")
    assert done.code == 2
    assert "--force" in done.err
    assert (bundle / "manifest.json").read_bytes() == before
    done = run_fkv("add-decoder", bundle, "--tae", sources / "taew2_1.pth", "--force", "--json")
    assert done.code == 0, done.err
    assert set(json.loads(done.out)) == {"vae", "tae", "digest"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --vae, --tae or both"),
        (("--tae", "nothing.pth"), "no such file"),
        (("--vae", "nothing.pth"), "no such file"),
        (("--tae", "x.pth", "--dtype", "int8"), 'Invalid value "int8" for --dtype'),
    ],
)
def test_mistakes_leave_the_bundle_as_it_is(digits_bundle, run_fkv, options, message):
    before = {file: file.stat().st_mtime_ns for file in digits_bundle.rglob("*")}
    done = run_fkv("add-decoder", digits_bundle, *options)
    assert done.code == 2
    assert message in done.err
    assert {file: file.stat().st_mtime_ns for file in digits_bundle.rglob("*")} == before


def test_a_device_that_is_not_there_is_refused(bundle, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendUnavailableError, match="onnxruntime-gpu"):
        VideoDecoder.open(bundle, read_manifest(bundle), "tae", "onnxruntime-cuda")


def test_missing_and_altered_decoders_are_named(bundle, digits_bundle, run_fkv, tmp_path):
    with pytest.raises(InputError, match="fkv add-decoder"):
        VideoDecoder.open(digits_bundle, read_manifest(digits_bundle), "vae")
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    with (folder / "graphs" / "tae.bin").open("r+b") as file:
        file.write(b"\1\2\3\4")
    with pytest.raises(BundleError, match="altered since export"):
        VideoDecoder.open(folder, read_manifest(folder), "tae")
    assert "tae.bin" in run_fkv("inspect", folder).err
    assert run_fkv("inspect", bundle).code == 0
    with pytest.raises(InputError, match="backend 'tpu' is unknown; choose one of"):
        VideoDecoder.open(bundle, read_manifest(bundle), "tae", "tpu")
    decoder = VideoDecoder.open(bundle, read_manifest(bundle), "tae", num_threads=1)
    with pytest.raises(InputError, match=r"takes frames of \[16, 8, 8\]"):
        decoder.decode(np.zeros((3, 16, 4, 8), np.float32))
