"""Chunks that hold NaN or infinities stop a video, on every kind of backend, unless asked for."""

from dataclasses import replace

import numpy as np
import pytest
from host_cuda import HostCuda
from host_engine import HostEngine

from forcing_kv.runtime_trt import Session
from forcing_kv.runtime_trt.bundle.manifest import read_manifest
from forcing_kv.runtime_trt.cuda.chunk_graph import ChunkGraphBackend
from forcing_kv.runtime_trt.errors import ForcingKvError, NonFiniteError
from forcing_kv.runtime_trt.open import open_backend

LARGE = np.float32(3e38)


def overflowing(array):
    """The same signs, and values whose sums are infinite."""
    return np.copysign(LARGE, array)


@pytest.fixture(params=["onnxruntime", "captured chunks"])
def backend(request, tiny_bundle):
    if request.param == "onnxruntime":
        yield open_backend(tiny_bundle, "onnxruntime", num_threads=1)
        return
    cuda, manifest = HostCuda(), read_manifest(tiny_bundle)
    engine = HostEngine(cuda, tiny_bundle, manifest)
    yield ChunkGraphBackend(cuda, engine, manifest.config, manifest.graphs)


def latents(session, prompt, count=2):
    session.set_prompt(prompt)
    return np.stack([chunk.latents for chunk in session.stream(count, seed=3)])


def test_a_chunk_that_is_not_finite_stops_the_video_and_leaves_no_trace(backend, prompts):
    with Session(backend) as session:
        wanted = latents(session, prompts(0))
        session.reset()
        session.set_prompt(overflowing(prompts(0)))
        with pytest.raises(NonFiniteError, match=r"chunk 0: 144 of 144 latent values") as caught:
            session.generate_chunk(seed=3)
        assert "values of the prompt up to" in str(caught.value)
        assert "noise up to" not in str(caught.value)
        for use in (session.generate_chunk, lambda: session.switch_prompt(prompts(1))):
            with pytest.raises(ForcingKvError, match="call reset and set_prompt"):
                use()
        session.reset()
        np.testing.assert_array_equal(latents(session, prompts(0)), wanted)


def test_it_is_found_in_the_chunk_where_it_arises(backend, prompts, tiny_config):
    shape = tiny_config.latent_shape
    noise = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    noise[1] = overflowing(noise[1])
    with Session(backend) as session:
        session.set_prompt(prompts(0))
        stream = session.stream(3, noise=noise, run_ahead=True)
        assert np.isfinite(next(stream).latents).all()
        with pytest.raises(
            NonFiniteError, match=r"chunk 1: .* values of the noise up to 3\.0e\+38"
        ):
            next(stream)


def test_whoever_asks_gets_what_is_not_finite(backend, prompts):
    with Session(backend, allow_non_finite=True) as session:
        assert np.isnan(latents(session, overflowing(prompts(0)))).all()
        session.allow_non_finite = False
        with pytest.raises(NonFiniteError, match="chunk 2"):
            session.generate_chunk()


def test_a_float16_session_tells_of_its_range(tiny_bundle, prompts):
    backend = open_backend(tiny_bundle, "onnxruntime", num_threads=1)
    with Session(backend) as session:
        session.config = replace(session.config, dtype="float16")
        session.set_prompt(overflowing(prompts(0)))
        with pytest.raises(NonFiniteError, match=r"an overflow of float16, which ends at 65504"):
            session.generate_chunk()
