"""A backend and a decode runner that compute next to nothing, and stop where a test wants them."""

import threading

import numpy as np

from forcing_kv.runtime_trt.backends.base import Backend, ChunkResult, PendingChunk
from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo, TensorInfo
from forcing_kv.runtime_trt.bundle.manifest import DecoderInfo
from forcing_kv.runtime_trt.decode.runner import DecodeRunner
from forcing_kv.runtime_trt.decoder import VideoDecoder

LATENTS = np.zeros((1, 2, 3, 3), np.float32)
"""One latent frame of `counting_decoder`."""


class Gate:
    """Holds up whoever enters it, once, until the test lets it go."""

    def __init__(self):
        self.entered, self._go, self._armed = threading.Event(), threading.Event(), False

    def arm(self):
        self._armed = True

    def open(self):
        self._go.set()

    def pass_through(self):
        if self._armed:
            self._armed = False
            self.entered.set()
            assert self._go.wait(timeout=60)


class FakeChunk(PendingChunk):
    def __init__(self, latents):
        self._result = ChunkResult(latents, {"chunk": 0.0})

    def result(self):
        return self._result


class FakeBackend(Backend):
    """A chunk's latents are its noise plus the mean of the prompt; `gate` is in every method."""

    name = "fake"

    def __init__(self, config):
        super().__init__(config)
        self.gate, self.calls, self.closed, self._prompt = Gate(), [], 0, 0.0

    def _called(self, name):
        self.calls.append(name)
        self.gate.pass_through()

    def set_prompt(self, prompt_embeds):
        self._called("set_prompt")
        self._prompt = prompt_embeds.mean()

    def submit(self, request):
        self._called("submit")
        return FakeChunk(request.noise + self._prompt)

    def recache(self, request):
        self._called("recache")

    def reset(self):
        self._called("reset")

    def sibling(self):
        self._called("sibling")
        return FakeBackend(self.config)

    def close(self):
        self._called("close")
        self.closed += 1

    run_step = run_evict = commit = None


class CountingRunner(DecodeRunner):
    """Its one state counts latent frames; raises `fault` once and shows `pixel`, where set."""

    name = "counting"

    def __init__(self):
        self.count, self.fault, self.closed, self.gate = 0, None, False, Gate()
        self.pixel = None

    def _called(self):
        self.gate.pass_through()
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault

    def reset(self):
        self._called()
        self.count = 0

    def run(self, graph, latents):
        self._called()
        self.count += 1
        frames = np.full((1, 3, 3, 3), self.count, np.float32)
        if self.pixel is not None:
            frames[0, 0, 0, 0] = self.pixel
        return frames

    def read_state(self, name):
        return np.asarray(self.count)

    def close(self):
        self._called()
        self.closed = True


def counting_decoder(runner):
    latents = (TensorInfo("latents", LATENTS.shape, "float32"),)
    graph = GraphInfo("decode.onnx", "0" * 64, latents, ())
    return VideoDecoder(runner, DecoderInfo({"decode": graph}, "w.bin", "0" * 64, 0))
