"""Decoders on engines over the CPU double: the same code that runs on a GPU."""

import gc
import shutil
import sys
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from fake_tensorrt import FakeTensorRt
from host_cuda import HostCuda
from host_engine import HostEngine
from manifests import edit as change

from forcing_kv.runtime_trt.bundle.hashes import sha256_of
from forcing_kv.runtime_trt.bundle.manifest import Bundle, read_manifest
from forcing_kv.runtime_trt.decode.graph import GraphDecodeRunner
from forcing_kv.runtime_trt.decoder import VideoDecoder, follow_session
from forcing_kv.runtime_trt.errors import (
    BackendUnavailableError,
    BundleError,
    ForcingKvError,
    InputError,
)
from forcing_kv.runtime_trt.tensorrt.open import open_tensorrt_decoder


class StrictEngine(HostEngine):
    """Refuses a launch that reads and writes at one address."""

    def enqueue(self, graph, bindings, stream):
        info = self._manifest.graphs[graph]
        read = {bindings[tensor.name] for tensor in info.inputs}
        written = {bindings[tensor.name] for tensor in info.outputs}
        assert len(written) == len(info.outputs)
        assert not read & written
        super().enqueue(graph, bindings, stream)


class Decoders:
    """Opens decoders of one bundle on the double, and on ONNX Runtime."""

    def __init__(self, bundle):
        self.bundle, self.manifest = bundle, read_manifest(bundle)

    def runner(self, cuda, kind, **options):
        info = self.manifest.decoders[kind]
        return GraphDecodeRunner(
            cuda, StrictEngine(cuda, self.bundle, info), info.graphs, **options
        )

    def open(self, cuda, kind, **options):
        return VideoDecoder(self.runner(cuda, kind, **options), self.manifest.decoders[kind])

    def reference(self, kind):
        return VideoDecoder.open(self.bundle, self.manifest, kind, num_threads=1)

    def latents(self, seed=0, num_frames=7):
        shape = (num_frames, *self.manifest.config.latent_shape[1:])
        return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.fixture(scope="module")
def decoders(decoder_bundle):
    return Decoders(decoder_bundle)


@pytest.mark.parametrize("use_graphs", [True, False], ids=["captured", "enqueued"])
@pytest.mark.parametrize("kind", ["vae", "tae"])
def test_a_stream_equals_the_whole_clip_on_onnx_runtime(decoders, kind, use_graphs):
    cuda = HostCuda()
    with decoders.open(cuda, kind, use_graphs=use_graphs) as decoder:
        # Videos of even and odd lengths: the next one begins whichever set holds the state.
        for seed, num_frames in ((0, 7), (1, 4), (2, 1), (3, 6)):
            latents = decoders.latents(seed, num_frames)
            reference = decoders.reference(kind)
            wanted = reference.decode(latents)
            parts = [latents[:3], latents[3:4], latents[4:]]
            found = [decoder.decode(part) for part in parts if len(part)]
            np.testing.assert_array_equal(np.concatenate(found), wanted)
            assert np.isfinite(wanted).all()
            states = decoder.read_state()
            for name, state in reference.read_state().items():
                np.testing.assert_array_equal(states[name], state)
            decoder.reset()
    assert not cuda.live


@pytest.mark.parametrize(("kind", "num_variants"), [("vae", 3), ("tae", 2)])
def test_one_launch_a_latent_frame_and_every_variant_captured_on_opening(
    decoders, kind, num_variants
):
    cuda = HostCuda()
    runner = decoders.runner(cuda, kind)
    assert len(runner.captured_graphs) == num_variants
    assert all(graph.nodes == {"kernel": 1} for graph in runner.captured_graphs.values())
    with VideoDecoder(runner, decoders.manifest.decoders[kind]) as decoder:
        before = cuda.calls.copy()
        decoder.decode(decoders.latents())
        new = cuda.calls - before
    assert new["graph"] == 7
    # The latents up and the frames down.
    assert new["memcpy"] == 14
    assert new["kernel"] == new["begin_capture"] == new["malloc"] == new["malloc_host"] == 0


def test_closing_twice_and_using_afterwards(decoders):
    cuda = HostCuda()
    decoder = decoders.open(cuda, "vae")
    engine = decoder._runner._engine
    for _ in range(2):
        decoder.close()
    assert not cuda.live
    assert engine.closed == 1
    for use in (decoder.reset, lambda: decoder.decode(decoders.latents())):
        with pytest.raises(ForcingKvError, match="closed"):
            use()


def test_garbage_collection_releases_everything(decoders):
    cuda = HostCuda()
    decoder = decoders.open(cuda, "tae")
    decoder.decode(decoders.latents())
    gone = weakref.ref(decoder._runner)
    del decoder
    gc.collect()
    assert gone() is None
    assert not cuda.live


@pytest.mark.parametrize(
    "call",
    ["malloc", "malloc_host", "create_stream", "begin_capture", "end_capture", "instantiate",
     "kernel", "memset", "synchronize"],
)  # fmt: skip
def test_a_failure_while_opening_leaves_nothing(decoders, call):
    cuda = HostCuda()
    cuda.fail_at = (call, 1)
    with pytest.raises(ForcingKvError):
        decoders.runner(cuda, "vae")
    assert not cuda.live


@pytest.mark.parametrize("call", ["graph", "memcpy", "synchronize"])
def test_a_failure_in_a_frame_asks_for_a_reset(decoders, call):
    cuda = HostCuda()
    with decoders.open(cuda, "vae") as decoder:
        decoder.decode(decoders.latents(num_frames=2))
        cuda.fail_at = (call, 1)
        with pytest.raises(ForcingKvError, match="made to fail"):
            decoder.decode(decoders.latents())
        with pytest.raises(ForcingKvError, match="reset"):
            decoder.decode(decoders.latents())
        decoder.reset()
        wanted = decoders.reference("vae").decode(decoders.latents(1))
        np.testing.assert_array_equal(decoder.decode(decoders.latents(1)), wanted)
    assert not cuda.live


def test_a_wrong_shape_leaves_the_video_as_it_was(decoders):
    with decoders.open(HostCuda(), "vae") as decoder:
        latents = decoders.latents()
        first = decoder.decode(latents[:2])
        with pytest.raises(InputError, match="takes frames of"):
            decoder.decode(latents[:, :1])
        wanted = decoders.reference("vae").decode(latents)
        found = np.concatenate([first, decoder.decode(latents[2:])])
        np.testing.assert_array_equal(found, wanted)


def test_too_little_memory_is_refused(decoders):
    cuda = HostCuda(free_nbytes=10_000)
    with pytest.raises(BackendUnavailableError, match=r"needs 0\.00 GB"):
        decoders.runner(cuda, "vae")
    assert not cuda.live


class Deployment:
    """A bundle whose decoders have stand-in engines; the denoiser's plans are no plans."""

    def __init__(self, bundle, monkeypatch, **cuda_options):
        self.bundle = bundle
        self.cuda = HostCuda(**cuda_options)
        self.kinds = ("vae", "tae")
        self.manifest = read_manifest(bundle)
        self.modules = {
            kind: FakeTensorRt(self.cuda, bundle, self.manifest.decoders[kind])
            for kind in self.kinds
        }
        self._monkeypatch = monkeypatch
        self._record()

    def _record(self):
        folder = "engines/tensorrt-sm89"
        (self.bundle / folder).mkdir(parents=True)
        denoiser = self._part(folder, self.manifest.graphs)
        decoders = {}
        for kind, module in self.modules.items():
            info = self.manifest.decoders[kind]
            module.write_plans(self.bundle / folder / kind)
            part = self._part(f"{folder}/{kind}", info.graphs)
            decoders[kind] = {**part, "decoder_sha256": info.sha256, "build_seconds": 1.0}
        record = {
            "backend": "tensorrt", "target": "sm89", "options": {}, "build_seconds": 1.0,
            "environment": {"tensorrt": "11.4.0.106", "sm": "89"}, **denoiser, "decoders": decoders,
        }  # fmt: skip
        change(self.bundle, lambda content: content["engines"].append(record))

    def _part(self, folder, graphs):
        described, files = {}, {}
        for name, info in graphs.items():
            file = f"{folder}/{name}.plan"
            if not (self.bundle / file).exists():
                (self.bundle / file).write_text("no plan")
            files[file] = sha256_of(self.bundle / file)
            described[name] = asdict(replace(info, file=file, sha256=files[file]))
        details = {name: {"weight_nbytes": 1000, "scratch_nbytes": 5000} for name in graphs}
        return {"folder": folder, "files": files, "graphs": described, "details": details}

    def open(self, kind):
        self._monkeypatch.setitem(sys.modules, "tensorrt", self.modules[kind])
        with Bundle(self.bundle) as bundle:
            runner = open_tensorrt_decoder(bundle, kind, "tensorrt", cuda=self.cuda)
            return VideoDecoder(runner, bundle.manifest.decoders[kind])


@pytest.fixture
def deployment(decoder_bundle, tmp_path, monkeypatch):
    bundle = Path(shutil.copytree(decoder_bundle, tmp_path / "bundle"))
    return Deployment(bundle, monkeypatch)


@pytest.mark.parametrize("kind", ["vae", "tae"])
def test_a_tensorrt_engine_decodes_and_the_denoisers_is_not_touched(deployment, decoders, kind):
    for plan in (deployment.bundle / "engines/tensorrt-sm89").glob("*.plan"):
        plan.unlink()
    latents = decoders.latents()
    with deployment.open(kind) as decoder:
        assert decoder.backend_name == "tensorrt"
        wanted = decoders.reference(kind).decode(latents)
        np.testing.assert_array_equal(decoder.decode(latents), wanted)
    gc.collect()
    assert not deployment.cuda.live
    assert not deployment.modules[kind].live


def replace_decoder(content):
    content["decoders"]["vae"]["weights_sha256"] = "0" * 64


def forget_decoder(content):
    del content["engines"][0]["decoders"]["vae"]


REFUSALS = {
    "replaced": (
        replace_decoder,
        r"its vae decoder was compiled from another one than the bundle holds now; `fkv build",
    ),
    "never built": (forget_decoder, r"holds no vae decoder; make it with `fkv build"),
}


@pytest.mark.parametrize(("edit", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_an_engine_of_another_decoder_is_not_run(deployment, edit, message):
    change(deployment.bundle, edit)
    with pytest.raises((BackendUnavailableError, BundleError), match=message):
        deployment.open("vae")
    deployment.open("tae").close()


def test_a_tampered_plan_never_reaches_tensorrt(deployment):
    (deployment.bundle / "engines/tensorrt-sm89/vae/decode.plan").write_text("{}")
    with pytest.raises(BundleError, match=r"vae/decode\.plan: altered.*`fkv build"):
        deployment.open("vae")
    assert not hasattr(deployment.modules["vae"], "runtime")


def test_too_little_memory_for_an_engine_is_named(deployment):
    deployment.cuda._free_nbytes = 20_000
    with pytest.raises(BackendUnavailableError, match=r"the vae decoder of .* on tensorrt needs"):
        deployment.open("vae")


def follow(deployment, kind="vae", backend="tensorrt"):
    manifest = read_manifest(deployment.bundle)
    return follow_session(deployment.bundle, manifest, kind, backend, num_threads=1)


def test_auto_follows_the_session_and_says_where_it_does_not(deployment, monkeypatch):
    monkeypatch.setattr("forcing_kv.runtime_trt.tensorrt.open.Cuda", lambda **_: deployment.cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", deployment.modules["vae"])
    with follow(deployment) as decoder:
        assert (decoder.backend_name, decoder.chosen_because) == ("tensorrt", "as the session")
    with follow(deployment, backend="eager") as decoder:
        assert decoder.backend_name == "onnxruntime"
    change(deployment.bundle, forget_decoder)
    with follow(deployment) as decoder:
        assert decoder.backend_name == "onnxruntime"
        assert "holds no vae decoder; make it with `fkv build" in decoder.chosen_because


def test_auto_does_not_pass_over_an_engine_of_another_decoder(deployment, monkeypatch):
    monkeypatch.setattr("forcing_kv.runtime_trt.tensorrt.open.Cuda", lambda **_: deployment.cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", deployment.modules["vae"])
    part = "engines/tensorrt-sm89"
    change(
        deployment.bundle,
        lambda content: content["engines"][0]["decoders"]["vae"].update(decoder_sha256="0" * 64),
    )
    with pytest.raises(BundleError, match=rf"{part}: its vae decoder .*--backend tensorrt`"):
        follow(deployment)
