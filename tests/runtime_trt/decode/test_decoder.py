"""What a video decoder does around the graphs that it runs."""

import numpy as np
import pytest

from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo, TensorInfo
from forcing_kv.runtime_trt.bundle.manifest import DecoderInfo
from forcing_kv.runtime_trt.decode.runner import DecodeRunner
from forcing_kv.runtime_trt.decoder import VideoDecoder
from forcing_kv.runtime_trt.errors import ForcingKvError, InputError, NonFiniteError

LATENTS = np.zeros((1, 2, 3, 3), np.float32)


class Counting(DecodeRunner):
    """Its one state counts latent frames; raises `fault` once and shows `pixel`, where set."""

    name = "counting"

    def __init__(self):
        self.count, self.fault, self.closed, self.pixel = 0, None, False, None

    def _fail(self):
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault

    def reset(self):
        self._fail()
        self.count = 0

    def run(self, graph, latents):
        self._fail()
        self.count += 1
        frames = np.full((1, 3, 3, 3), self.count, np.float32)
        if self.pixel is not None:
            frames[0, 0, 0, 0] = self.pixel
        return frames

    def read_state(self, name):
        return np.asarray(self.count)

    def close(self):
        self.closed = True


@pytest.fixture
def runner():
    return Counting()


@pytest.fixture
def decoder(runner):
    inputs = (
        TensorInfo("latents", LATENTS.shape, "float32"),
        TensorInfo("state.0", (1,), "float32"),
    )
    graph = GraphInfo("decode.onnx", "0" * 64, inputs, ())
    return VideoDecoder(runner, DecoderInfo({"decode": graph}, "w.bin", "0" * 64, 0))


@pytest.mark.parametrize("fault", [ForcingKvError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["decode", "reset"])
def test_what_fails_half_way_asks_for_a_reset(runner, decoder, call, fault):
    decoder.decode(LATENTS)
    runner.fault = fault
    with pytest.raises(type(fault)):
        decoder.reset() if call == "reset" else decoder.decode(LATENTS)
    with pytest.raises(ForcingKvError, match="call reset to begin another video"):
        decoder.decode(LATENTS)
    decoder.reset()
    assert (decoder.decode(LATENTS) == 1).all()


def test_a_decoder_that_cannot_begin_releases_its_backend(runner, decoder):
    runner.fault = ForcingKvError("broken")
    with pytest.raises(ForcingKvError, match="broken"):
        VideoDecoder(runner, decoder._info)
    assert runner.closed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_frames_that_are_not_finite_stop_the_video(runner, decoder, value):
    decoder.decode(LATENTS)
    runner.pixel = value
    with pytest.raises(NonFiniteError, match=r"latent frames 1 to 1: .* 1 of 27 pixel values"):
        decoder.decode(LATENTS)
    runner.pixel = None
    with pytest.raises(ForcingKvError, match="call reset"):
        decoder.decode(LATENTS)
    decoder.reset()
    assert decoder.decode(LATENTS).max() == 1
    runner.pixel = value
    given = VideoDecoder(runner, decoder._info, allow_non_finite=True).decode(LATENTS)
    assert np.isnan(given).any() == np.isnan(value)


def test_frames_are_clipped_where_they_are_finite(runner, decoder):
    for pixel, shown in ((-3.0, 0.0), (7.0, 1.0), (0.25, 0.25), (3e38, 1.0)):
        runner.pixel = pixel
        assert decoder.decode(LATENTS)[0, 0, 0, 0] == np.float32(shown)


@pytest.mark.parametrize("latents", [np.full_like(LATENTS, np.nan), LATENTS[:0]])
def test_latents_that_cannot_be_decoded_do_no_harm(decoder, latents):
    with pytest.raises(InputError, match="latents"):
        decoder.decode(latents)
    assert (decoder.decode(LATENTS) == 1).all()
