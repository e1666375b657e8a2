"""Captures: what a thread must have run before, and what must not happen meanwhile."""

import gc
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
from graphed import in_another_thread, late, same
from host_cuda import HostCuda
from host_engine import HostEngine

from forcing_kv.runtime_trt.cuda.capture import capture
from forcing_kv.runtime_trt.cuda.chunk_graph import ChunkGraphBackend
from forcing_kv.runtime_trt.cuda.runtime import CudaError
from forcing_kv.runtime_trt.errors import ForcingKvError


def test_a_thread_runs_the_graphs_before_it_captures_them(graphed, prompts):
    with late(graphed, HostCuda()) as session, graphed.reference() as reference:
        for each in (session, reference):
            each.set_prompt(prompts(0))
        same(in_another_thread(session.generate_chunk), reference.generate_chunk())
        same(session.generate_chunk(), reference.generate_chunk())
        in_another_thread(partial(session.switch_prompt, prompts(1)))
        reference.switch_prompt(prompts(1))
        same(session.generate_chunk(), reference.generate_chunk())


def test_a_capture_in_a_thread_that_ran_nothing_is_refused(graphed, prompts, monkeypatch):
    cuda = HostCuda()
    with late(graphed, cuda) as session:
        session.set_prompt(prompts(0))
        monkeypatch.setattr(ChunkGraphBackend, "_warm_thread", lambda _: None)
        with pytest.raises(ForcingKvError, match=r"StreamCaptureUnsupported.*during a capture"):
            in_another_thread(session.generate_chunk)
    assert not cuda.live


@pytest.fixture(params=[True, False], ids=["on", "off"])
def collector(request):
    """Python's garbage collector: on and as eager as it gets, or off; afterwards as it was."""
    enabled, thresholds = gc.isenabled(), gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    (gc.enable if request.param else gc.disable)()
    yield request.param
    gc.set_threshold(*thresholds)
    (gc.enable if enabled else gc.disable)()


@pytest.mark.parametrize("failing", [None, "step"])
def test_no_garbage_is_collected_in_a_capture(graphed, collector, failing):
    class Cycle:
        def __init__(self, release):
            self.myself = self
            weakref.finalize(self, release)

    class Littering(HostEngine):
        """Leaves garbage in every capture that would free device memory."""

        def enqueue(self, graph, bindings, stream):
            if cuda.streams[stream].capture is not None:
                Cycle(partial(cuda.free, spare.pop()))
                self.fail_at = failing
            super().enqueue(graph, bindings, stream)

    cuda = HostCuda()
    spare = [cuda.malloc(8) for _ in range(50)]
    engine = Littering(cuda, graphed.bundle, graphed.manifest)
    config, graphs = graphed.manifest.config, graphed.manifest.graphs
    with nullcontext() if failing is None else pytest.raises(RuntimeError, match="made to fail"):
        ChunkGraphBackend(cuda, engine, config, graphs).close()
    assert gc.isenabled() == collector
    gc.collect()
    assert cuda.live == {"memory": len(spare)}


FORBIDDEN = {
    "free": lambda cuda, event: cuda.free(next(iter(cuda.memory))),
    "malloc": lambda cuda, event: cuda.malloc(8),
    "destroy_event": lambda cuda, event: cuda.destroy_event(event),
    "synchronize_event": lambda cuda, event: cuda.synchronize_event(event),
    "synchronize": lambda cuda, event: cuda.synchronize(cuda.create_stream()),
}


@pytest.mark.parametrize("call", FORBIDDEN)
def test_what_a_capturing_thread_must_not_do_spoils_the_capture(call):
    cuda = HostCuda()
    stream, event, memory = cuda.create_stream(), cuda.create_event(), cuda.malloc(8)

    def work():
        cuda.fill(memory, 0, 8, stream)
        with pytest.raises(CudaError, match="not permitted when stream is capturing"):
            FORBIDDEN[call](cuda, event)
        in_another_thread(lambda: FORBIDDEN["malloc"](cuda, event))

    with pytest.raises(ForcingKvError, match=r"StreamCaptureInvalidated.*--no-cuda-graph"):
        capture(cuda, stream, work, nullcontext(), memory, "nothing much")
    cuda.synchronize(stream)


def test_an_engine_that_fails_in_a_capture_can_be_used_again(graphed, prompts):
    cuda = HostCuda()
    with late(graphed, cuda) as session:
        session.set_prompt(prompts(0))
        for _ in range(3):
            session.generate_chunk()
        session.backend.engine.fail_at = "step"
        with pytest.raises(RuntimeError, match="step was made to fail"):
            session.switch_prompt(prompts(1))
        session.reset()
        session.set_prompt(prompts(0))
        session.generate_chunk()
        session.switch_prompt(prompts(1))
        session.generate_chunk()
    assert not cuda.live


@pytest.mark.parametrize("escaping", ["step", "evict"])
def test_a_graph_that_escapes_the_capture_is_refused(graphed, escaping):
    class OtherStream(HostEngine):
        """Runs one graph's work at once, wherever it is told to."""

        def enqueue(self, graph, bindings, stream):
            if graph != escaping:
                super().enqueue(graph, bindings, stream)

    cuda = HostCuda()
    engine = OtherStream(cuda, graphed.bundle, graphed.manifest)
    message = rf"the capture of graph {escaping} holds no kernel.*--no-cuda-graph"
    with pytest.raises(ForcingKvError, match=message):
        ChunkGraphBackend(cuda, engine, graphed.manifest.config, graphed.manifest.graphs)
    assert engine.closed == 1
    assert not cuda.live
