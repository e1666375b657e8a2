"""The chunk-graph runtime over the CPU double: the same code that runs on a GPU."""

import gc
import weakref
from contextlib import closing

import numpy as np
import pytest
from graphed import same
from host_cuda import HostCuda
from host_engine import HostEngine, PlacingEngine

from forcing_kv.runtime_trt.cuda.chunk_program import (
    ChunkProgram,
    expected_variants,
)
from forcing_kv.runtime_trt.errors import BackendUnavailableError, ForcingKvError, InputError


@pytest.mark.parametrize("make", [HostEngine, PlacingEngine], ids=["bound", "placed"])
@pytest.mark.parametrize("use_graphs", [True, False], ids=["captured", "enqueued"])
def test_chunks_equal_those_of_the_plain_loop(graphed, prompts, use_graphs, make):
    cuda = HostCuda()
    opened = graphed.session(cuda, make=make, use_graphs=use_graphs)
    with opened as session, graphed.reference() as reference:
        for each in (session, reference):
            each.set_prompt(prompts(0))
        for _ in range(5):
            found = session.generate_chunk(seed=3, keep_x0=True)
            wanted = reference.generate_chunk(seed=3, keep_x0=True)
            same(found, wanted)
            np.testing.assert_array_equal(found.x0_steps, wanted.x0_steps)
        for layer in range(2):
            for left, right in zip(
                session.backend.read_pool(layer), reference.backend.read_pool(layer), strict=True
            ):
                np.testing.assert_array_equal(left, right)
    assert not cuda.live


@pytest.mark.parametrize("make", [HostEngine, PlacingEngine], ids=["bound", "placed"])
def test_pass_by_pass_it_equals_eager(graphed, monkeypatch, make):
    from forcing_kv.export.verify.bundle import verify_bundle

    cleaned = []
    run_clean = ChunkProgram.clean

    def clean(program, stream, x, **form):
        cleaned.append(x)
        run_clean(program, stream, x, **form)

    with closing(graphed.backend(HostCuda(), make=make)) as backend:
        monkeypatch.setattr(ChunkProgram, "clean", clean)
        assert "new_k.1" in backend.outputs_of("clean")
        assert backend.num_text_rows == backend.config.model.text_len
        report = verify_bundle(graphed.bundle, backend, num_chunks=4)
    assert report.passed, report
    # An engine may have a graph of its own for the clean pass, so no denoise step stands for it.
    assert len(cleaned) >= 4


def test_one_launch_and_one_upload_a_chunk(graphed, prompts):
    cuda = HostCuda()
    with graphed.session(cuda) as session:
        session.set_prompt(prompts(0))
        session.generate_chunk()
        before = cuda.calls.copy()
        session.generate_chunk()
        new = cuda.calls - before
    assert new["graph"] == 1
    # The upload, the result's copy aside, and its copy to the host.
    assert new["memcpy"] == 3
    assert new["kernel"] == new["begin_capture"] == new["malloc"] == 0


def test_every_variant_is_captured_when_opening(graphed, prompts):
    cuda = HostCuda()
    with graphed.session(cuda) as session:
        captured = session.backend.captured_graphs
        # First chunk, the next one, re-encode, the first eviction, then the steady form.
        expected = list(expected_variants(session.config, graphed.manifest.graphs))
        assert list(captured) == expected
        steady = [False, False, False, False, True]
        assert sorted(variant.steady for variant in expected) == steady
        # Two steps, clean pass, eviction and the commit, which is one launch.
        assert sorted(graph.nodes["kernel"] for graph in captured.values()) == [2, 4, 4, 5, 5]
        assert {graph.nodes["memcpy"] for graph in captured.values()} == {0}
        num_captures = cuda.calls["begin_capture"]
        session.set_prompt(prompts(0))
        for _ in session.stream(5):
            pass
        session.switch_prompt(prompts(1))
        session.generate_chunk()
        assert list(captured) == expected
        assert cuda.calls["begin_capture"] == num_captures


def test_nothing_is_stale(graphed, prompts):
    """Prompt, seed, history and buffers' content reach the replay."""
    cuda = HostCuda()
    with graphed.session(cuda) as session, graphed.reference() as reference:
        for each in (session, reference):
            each.set_prompt(prompts(0))
        for seed in (0, 1):
            same(session.generate_chunk(seed=seed), reference.generate_chunk(seed=seed))
        for prompt in (1, 2):
            for each in (session, reference):
                each.switch_prompt(prompts(prompt))
            for seed in range(3):
                same(session.generate_chunk(seed=seed), reference.generate_chunk(seed=seed))
        for each in (session, reference):
            each.reset()
            each.set_prompt(prompts(3))
        same(session.generate_chunk(seed=9), reference.generate_chunk(seed=9))
        # A pool that is overwritten between replays is what the next replay reads.
        noise = np.random.default_rng(0).standard_normal(session.config.latent_shape)
        eps = np.zeros((1, *session.config.latent_shape))
        pool = session.backend.read_tensor("hist_k.1")
        changed = np.asarray(pool + 1, np.float32)
        memory = session.backend.memory
        memory.write(cuda, "hist_k.1", changed, session.backend._stream)
        reference.backend.buffers["hist_k.1"][...] = changed
        same(session.generate_chunk(noise, eps), reference.generate_chunk(noise, eps))


@pytest.mark.parametrize("use_graphs", [True, False], ids=["captured", "enqueued"])
def test_a_reset_leaves_nothing_that_is_not_finite(graphed, prompts, use_graphs):
    """A fused kernel multiplies masked rows by zero, which keeps an overflow of the last video."""
    with graphed.session(HostCuda(), use_graphs=use_graphs) as session:
        session.allow_non_finite = True
        session.set_prompt(prompts(0))
        huge = np.full(session.config.latent_shape, 3e38, np.float32)
        ahead = (session.generate_chunk(huge) for _ in range(3))
        assert not all(np.isfinite(chunk.latents).all() for chunk in ahead)
        assert not np.isfinite(session.backend.read_pool(1)[1]).all()
        session.reset()
        for layer in range(session.config.model.num_layers):
            assert not any(pool.any() for pool in session.backend.read_pool(layer))


def test_a_reset_frees_the_slot_of_an_abandoned_chunk(graphed, prompts):
    cuda = HostCuda()
    with graphed.session(cuda) as session, graphed.reference() as reference:
        session.set_prompt(prompts(0))
        ahead = session.stream(run_ahead=True)
        next(ahead)
        session.reset()
        on_their_way = [kind for stream in cuda.streams.values() for kind, _ in stream.queue]
        assert set(on_their_way) == {"memset"}, "the chunk may still read or write its slot"
        for each in (session, reference):
            each.set_prompt(prompts(1))
        with pytest.raises(InputError, match="was reset, which ends this stream"):
            next(ahead)
        for _ in range(3):
            same(session.generate_chunk(), reference.generate_chunk())
            assert not session.backend._waiting


def test_running_ahead_gives_the_same_chunks(graphed, prompts):
    cuda = HostCuda()
    with graphed.session(cuda) as session, graphed.reference() as reference:
        for each in (session, reference):
            each.set_prompt(prompts(0))
        ahead = session.stream(6, seed=4, run_ahead=True)
        for found, wanted in zip(ahead, reference.stream(6, seed=4), strict=True):
            assert found.index == wanted.index
            same(found, wanted)


def test_chunks_fetched_out_of_order_are_their_own(graphed, prompts):
    """A call within a stream is handed its chunk before the stream hands out the one under way."""
    with graphed.session(HostCuda()) as session, graphed.reference() as reference:
        for each in (session, reference):
            each.set_prompt(prompts(0))
        wanted = list(reference.stream(6))
        ahead = session.stream(4, run_ahead=True)
        found = [next(ahead), session.generate_chunk(), session.generate_chunk(), *ahead]
        assert [chunk.index for chunk in found] == [0, 2, 3, 1, 4, 5]
        for chunk in found:
            same(chunk, wanted[chunk.index])


def test_a_prompt_switch_after_running_ahead(graphed, prompts):
    cuda = HostCuda()
    with graphed.session(cuda) as session, graphed.reference() as reference:
        for each in (session, reference):
            each.set_prompt(prompts(0))
        ahead = session.stream(3, run_ahead=True)
        next(ahead)
        # Chunk 1 is on its way already.
        session.switch_prompt(prompts(1))
        wanted = [reference.generate_chunk(), reference.generate_chunk()]
        same(next(ahead), wanted[1])
        reference.switch_prompt(prompts(1))
        same(next(ahead), reference.generate_chunk())


def test_parts_are_timed_where_launches_are_separate(graphed, prompts):
    names = {}
    for use_graphs in (True, False):
        with graphed.session(HostCuda(), use_graphs=use_graphs) as session:
            session.set_prompt(prompts(0))
            names[use_graphs] = list(session.generate_chunk().timings_ms)
    assert names == {True: ["chunk"], False: ["steps", "clean", "evict", "commit"]}


def test_siblings_share_weights_and_nothing_else(graphed, prompts):
    cuda = HostCuda()
    first = graphed.session(cuda)
    second = first.sibling()
    shared = first.backend.engine.shared
    assert shared["users"] == 2
    with graphed.reference() as reference:
        wanted = {}
        for prompt in (0, 1):
            reference.set_prompt(prompts(prompt))
            wanted[prompt] = [reference.generate_chunk(seed=prompt) for _ in range(3)]
            reference.reset()
    first.set_prompt(prompts(0))
    second.set_prompt(prompts(1))
    for i in range(3):
        same(first.generate_chunk(seed=0), wanted[0][i])
        if i == 1:
            first.close()
            assert shared["sessions"]
            break
        same(second.generate_chunk(seed=1), wanted[1][i])
    for i in (1, 2):
        same(second.generate_chunk(seed=1), wanted[1][i])
    second.close()
    assert not shared["sessions"]
    assert not cuda.live


def test_a_backend_that_cannot_share_says_so(graphed):
    with graphed.reference() as session, pytest.raises(InputError, match="open the bundle again"):
        session.sibling()


def test_closing_twice_and_using_afterwards(graphed):
    cuda = HostCuda()
    session = graphed.session(cuda)
    backend = session.backend
    for _ in range(2):
        session.close()
        backend.close()
    assert not cuda.live
    assert backend.engine.closed == 1
    with pytest.raises(ForcingKvError, match="closed"):
        backend.read_tensor("x0/0")


def test_garbage_collection_releases_everything(graphed, prompts):
    cuda = HostCuda()
    session = graphed.session(cuda)
    session.set_prompt(prompts(0))
    session.generate_chunk()
    gone = weakref.ref(session.backend)
    del session
    gc.collect()
    assert gone() is None
    assert not cuda.live


@pytest.mark.parametrize(
    "call",
    ["malloc", "malloc_host", "create_stream", "create_event", "begin_capture", "end_capture",
     "instantiate", "kernel", "memcpy", "memset", "synchronize"],
)  # fmt: skip
def test_a_failure_while_opening_leaves_nothing(graphed, call):
    cuda = HostCuda()
    cuda.fail_at = (call, 1)
    with pytest.raises(ForcingKvError):
        graphed.backend(cuda)
    assert not cuda.live


@pytest.mark.parametrize("call", ["graph", "memcpy", "eventrecord", "synchronize_event"])
def test_a_failure_in_a_chunk_asks_for_a_reset(graphed, prompts, call):
    cuda = HostCuda()
    with graphed.session(cuda) as session, graphed.reference() as reference:
        for each in (session, reference):
            each.set_prompt(prompts(0))
            each.generate_chunk()
        cuda.fail_at = (call, 1)
        with pytest.raises(ForcingKvError, match="made to fail"):
            session.generate_chunk()
        with pytest.raises(ForcingKvError, match="reset"):
            session.generate_chunk()
        for each in (session, reference):
            each.reset()
            each.set_prompt(prompts(1))
        for _ in range(3):
            same(session.generate_chunk(seed=2), reference.generate_chunk(seed=2))
    assert not cuda.live


def test_too_little_memory_is_refused_in_gigabytes(graphed):
    cuda = HostCuda(free_nbytes=10_000)
    with pytest.raises(BackendUnavailableError, match=r"needs 0\.00 GB.*0\.00 GB.*fkv plan"):
        graphed.backend(cuda)
    assert not cuda.live


def test_buffers_hold_what_the_layout_says(graphed):
    config = graphed.manifest.config
    with graphed.session(HostCuda()) as session:
        specs = session.backend.memory.plan.specs
        pools = [spec for name, spec in specs.items() if name.startswith("hist_") and "." in name]
        assert sum(spec.nbytes for spec in pools) == config.nbytes_kv
