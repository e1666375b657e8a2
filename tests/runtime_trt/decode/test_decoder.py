"""What a video decoder does around the graphs that it runs."""

import numpy as np
import pytest

from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo, TensorInfo
from forcing_kv.runtime_trt.bundle.manifest import DecoderInfo
from forcing_kv.runtime_trt.decode.runner import DecodeRunner
from forcing_kv.runtime_trt.decoder import VideoDecoder
from forcing_kv.runtime_trt.errors import ForcingKvError

LATENTS = np.zeros((1, 2, 3, 3), np.float32)


class Counting(DecodeRunner):
    """Its one state counts latent frames; raises `fault` once where one is set."""

    name = "counting"

    def __init__(self):
        self.count, self.fault, self.closed = 0, None, False

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
        return np.full((1, 3, 3, 3), self.count, np.float32)

    def read_state(self, name):
        return np.asarray(self.count)

    def close(self):
        self.closed = True


@pytest.fixture
def runner():
    return Counting()


@pytest.fixture
def decoder(runner):
    latents = (TensorInfo("latents", LATENTS.shape, "float32"),)
    graph = GraphInfo("decode.onnx", "0" * 64, latents, ())
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
