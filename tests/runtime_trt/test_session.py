"""Sessions: what they accept, refuse, repeat and survive."""

import itertools
import resource
import sys
import tracemalloc

import numpy as np
import pytest

from forcing_kv.runtime_trt import Session
from forcing_kv.runtime_trt.errors import ForcingKvError, InputError


@pytest.fixture
def session(tiny_bundle):
    with Session.open(tiny_bundle, backend="onnxruntime", num_threads=1) as opened:
        yield opened


@pytest.fixture
def started(session, prompts):
    session.set_prompt(prompts(0))
    return session


def video(chunks):
    return np.concatenate([chunk.latents for chunk in chunks])


def test_a_stream_yields_chunks_with_all_that_is_promised(started, tiny_config):
    chunks = list(started.stream(4, seed=3))
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]
    for chunk in chunks:
        assert chunk.latents.shape == tiny_config.latent_shape
        assert chunk.latents.dtype == np.float32
        assert chunk.latents.flags.owndata
        assert np.isfinite(chunk.latents).all()
        assert set(chunk.timings_ms) >= {"steps", "clean", "commit"}
        assert all(time >= 0 for time in chunk.timings_ms.values())
    # a = 1: the first selection is after chunk 2.
    assert [chunk.kept is not None for chunk in chunks] == [False, False, True, True]
    assert chunks[2].kept.shape == (6,)
    assert chunks[2].scores.shape == (3, 6)
    assert started.num_frames == 12


def test_chunks_do_not_change_after_they_are_handed_out(started):
    chunks = []
    copies = []
    for chunk in started.stream(4):
        chunks.append(chunk)
        copies.append([np.copy(a) for a in (chunk.latents, chunk.kept) if a is not None])
    for chunk, copy in zip(chunks, copies, strict=True):
        for now, then in zip((chunk.latents, chunk.kept), copy, strict=False):
            assert np.array_equal(now, then)


def test_the_same_seed_gives_the_same_video(started, prompts, tiny_bundle):
    first = video(started.stream(4, seed=5))
    started.reset()
    started.set_prompt(prompts(0))
    assert np.array_equal(video(started.stream(4, seed=5)), first)
    with Session.open(tiny_bundle, num_threads=1) as other:
        other.set_prompt(prompts(0))
        assert np.array_equal(video(other.stream(seed=5, num_chunks=4)), first)
        other.reset()
        other.set_prompt(prompts(0))
        assert not np.allclose(video(other.stream(4, seed=6)), first)
        other.reset()
        other.set_prompt(prompts(1))
        assert not np.allclose(video(other.stream(4, seed=5)), first)


def test_chunk_by_chunk_and_run_ahead_are_the_same_video(started, prompts):
    first = video(started.stream(4, seed=5))
    for make in (
        lambda: [started.generate_chunk(seed=5) for _ in range(4)],
        lambda: started.stream(4, seed=5, run_ahead=True),
        lambda: itertools.islice(started.stream(seed=5), 4),
    ):
        started.reset()
        started.set_prompt(prompts(0))
        assert np.array_equal(video(make()), first)


@pytest.mark.parametrize("resume", ["chunk by chunk", "stream", "run ahead"])
@pytest.mark.parametrize("num_taken", [1, 2, 4])
def test_an_abandoned_stream_hands_its_last_chunk_to_the_next_call(
    started, prompts, resume, num_taken
):
    whole = list(started.stream(5, seed=5))
    started.reset()
    started.set_prompt(prompts(0))
    stream = started.stream(5, seed=5, run_ahead=True)
    taken = list(itertools.islice(stream, num_taken))
    stream.close()
    left = 5 - num_taken
    if resume == "chunk by chunk":
        taken += [started.generate_chunk(seed=5) for _ in range(left)]
    else:
        taken += started.stream(left, seed=5, run_ahead=resume == "run ahead")
    assert [chunk.index for chunk in taken] == [0, 1, 2, 3, 4]
    assert np.array_equal(video(taken), video(whole))


def test_a_chunk_that_was_begun_has_its_noise(started, prompts):
    next(iter(stream := started.stream(seed=5, run_ahead=True)))
    stream.close()
    for other in ({"seed": 6}, {"seed": 5, "keep_x0": True}):
        with pytest.raises(InputError, match=r"chunk 1 was begun by stream\(run_ahead=True\)"):
            started.generate_chunk(**other)
    started.switch_prompt(prompts(1))  # After the chunk that was begun, as while streaming.
    assert started.generate_chunk(seed=5).index == 1
    assert started.generate_chunk(seed=6).index == 2
    stream = started.stream(seed=5, run_ahead=True)
    next(stream)
    started.reset()
    stream.close()
    started.set_prompt(prompts(0))
    assert started.generate_chunk(seed=7).index == 0


def test_explicit_noise(started, prompts, tiny_config):
    random = np.random.default_rng(0)
    noise = random.standard_normal((3, *tiny_config.latent_shape))
    eps = random.standard_normal((3, 1, *tiny_config.latent_shape)).astype(np.float32)
    first = video(started.stream(3, noise=noise, eps=eps))
    started.reset()
    started.set_prompt(prompts(0))
    by_hand = [started.generate_chunk(noise[i], eps[i], seed=99) for i in range(3)]
    assert np.array_equal(video(by_hand), first)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"noise": np.zeros((2, 3, 2, 4, 6))}, "2 chunks but num_chunks is 3"),
        ({"eps": np.zeros((4, 1, 3, 2, 4, 6))}, "4 chunks but num_chunks is 3"),
        ({"num_chunks": None, "noise": np.zeros((2, 3, 2, 4, 6))}, "num_chunks is None"),
        ({"num_chunks": 0}, "from 1 on, or None"),
        ({"seed": -1}, "seed"),
        ({"noise": np.zeros((3, 3, 2, 6, 4))}, r"noise has shape .*needed is \(3, 3, 2, 4, 6\)"),
        ({"eps": np.zeros((3, 2, 3, 2, 4, 6))}, "eps has shape"),
        ({"noise": np.zeros((3, 3, 2, 4, 6), np.int32)}, "noise has dtype int32"),
        ({"eps": np.full((3, 1, 3, 2, 4, 6), np.nan)}, "eps holds NaN"),
        ({"noise": np.full((3, 3, 2, 4, 6), -np.inf)}, "noise holds NaN or infinite"),
        ({"noise": np.full((3, 3, 2, 4, 6), 1e300)}, "noise holds NaN or infinite"),
    ],
)
def test_wrong_noise_is_refused_and_does_no_harm(started, prompts, changes, told):
    arguments = {"num_chunks": 3, "seed": 5, **changes}
    with pytest.raises(InputError, match=told):
        list(started.stream(**arguments))
    assert started.num_frames == 0
    after = video(started.stream(3, seed=5))
    started.reset()
    started.set_prompt(prompts(0))
    assert np.array_equal(video(started.stream(3, seed=5)), after)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (np.zeros((3, 4), np.float32), r"prompt_embeds has shape \(3, 4\); .*\(3, 5\)"),
        (np.zeros((1, 3, 5), np.float32), "shape"),
        (np.zeros((3, 5), np.int64), "dtype int64"),
        (np.zeros((3, 5), bool), "dtype bool"),
        (np.zeros((3, 5), np.complex64), "dtype complex64"),
        (np.full((3, 5), np.nan, np.float32), "NaN"),
        (None, "prompt_embeds"),
        ("a digit", "prompt_embeds"),
    ],
)
def test_wrong_prompts_are_refused(session, prompts, prompt, told):
    with pytest.raises(InputError, match=told):
        session.set_prompt(prompt)
    with pytest.raises(InputError, match="no prompt is set"):
        session.generate_chunk()
    session.set_prompt(prompts(0))
    session.generate_chunk()
    with pytest.raises(InputError, match=told):
        session.switch_prompt(prompt)
    session.generate_chunk()


def test_prompts_may_be_lists_and_float64_and_strided(session, prompts):
    given = prompts(0)
    wide = np.zeros((3, 10), np.float64)
    wide[:, ::2] = given
    videos = []
    for prompt in (given, given.tolist(), given.astype(np.float64), wide[:, ::2]):
        session.reset()
        session.set_prompt(prompt)
        videos.append(video(session.stream(2)))
    assert all(np.array_equal(made, videos[0]) for made in videos)


def test_set_prompt_is_for_the_beginning(session, prompts):
    session.set_prompt(prompts(1))
    session.set_prompt(prompts(0))
    first = session.generate_chunk()
    with pytest.raises(InputError, match=r"switch_prompt .* reset"):
        session.set_prompt(prompts(1))
    session.generate_chunk()
    session.reset()
    with pytest.raises(InputError, match="no prompt is set"):
        session.generate_chunk()
    session.set_prompt(prompts(0))
    assert np.array_equal(session.generate_chunk().latents, first.latents)


def test_a_prompt_switch_changes_what_follows_and_only_that(started, prompts):
    plain = list(started.stream(5))
    started.reset()
    started.set_prompt(prompts(0))
    switched = list(started.stream(3))
    started.switch_prompt(prompts(1))
    switched += started.stream(2)
    assert np.array_equal(video(plain[:3]), video(switched[:3]))
    assert not np.allclose(plain[3].latents, switched[3].latents)
    assert [chunk.index for chunk in switched] == [0, 1, 2, 3, 4]
    assert started.num_frames == 15


def test_a_switch_before_the_first_chunk_is_set_prompt(session, prompts):
    session.switch_prompt(prompts(0))
    first = video(session.stream(3))
    session.reset()
    session.set_prompt(prompts(0))
    assert np.array_equal(video(session.stream(3)), first)


def test_a_switch_within_a_stream(started, prompts):
    indices = []
    for chunk in started.stream(4):
        indices.append(chunk.index)
        if chunk.index == 1:
            started.switch_prompt(prompts(1))
    assert indices == [0, 1, 2, 3]


def test_close_twice_and_use_after_close(tiny_bundle, prompts):
    session = Session.open(tiny_bundle)
    session.set_prompt(prompts(0))
    stream = session.stream()
    next(stream)
    session.close()
    session.close()
    for use in (
        lambda: session.set_prompt(prompts(0)),
        lambda: session.switch_prompt(prompts(0)),
        session.generate_chunk,
        session.reset,
        lambda: next(stream),
    ):
        with pytest.raises(ForcingKvError, match="closed; open the bundle again"):
            use()


def test_an_exception_in_the_with_block_closes(tiny_bundle, prompts):
    with pytest.raises(KeyError), Session.open(tiny_bundle) as session:
        raise KeyError
    with pytest.raises(ForcingKvError, match="closed"):
        session.set_prompt(prompts(0))


@pytest.mark.parametrize("part", ["run_step", "run_evict", "commit"])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_failure_in_the_middle_asks_for_reset_and_leaves_no_trace(
    started, prompts, monkeypatch, part, error
):
    wanted = video(started.stream(4, seed=1))
    started.reset()
    started.set_prompt(prompts(1))

    def fail(*_):
        raise error

    list(started.stream(2))
    with monkeypatch.context() as patch:
        patch.setattr(started.backend, part, fail)
        with pytest.raises(error):
            started.generate_chunk()
    for use in (started.generate_chunk, lambda: started.switch_prompt(prompts(0))):
        with pytest.raises(ForcingKvError, match="reset and set_prompt"):
            use()
    started.reset()
    started.set_prompt(prompts(0))
    assert np.array_equal(video(started.stream(4, seed=1)), wanted)


@pytest.mark.parametrize("part", ["set_prompt", "recache"])
def test_a_failing_switch_asks_for_reset(started, prompts, monkeypatch, part):
    def fail(*_):
        raise MemoryError

    list(started.stream(2))
    with monkeypatch.context() as patch:
        patch.setattr(started.backend, part, fail)
        with pytest.raises(MemoryError):
            started.switch_prompt(prompts(1))
    with pytest.raises(ForcingKvError, match="reset and set_prompt"):
        started.generate_chunk()


def test_nothing_of_the_last_video_is_left_in_the_next(started, prompts):
    """Unread rows may hold anything: poison them."""
    first = video(started.stream(4))
    started.reset()
    for name, buffer in started.backend.buffers.items():
        if buffer.dtype == np.float32:
            buffer.fill(np.nan)
        assert buffer.size, name
    started.set_prompt(prompts(0))
    np.testing.assert_array_equal(video(started.stream(4)), first)


def test_memory_is_flat_over_500_chunks(started):
    for _ in started.stream(20):
        pass
    tracemalloc.start()
    try:
        before, peak = tracemalloc.get_traced_memory()[0], resident_kb()
        for chunk in started.stream(500):
            last = chunk.latents
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert after - before < 64 * 1024
    assert resident_kb() - peak < 4 * 1024
    assert started.num_frames == 520 * 3
    # Positions have no limit: the official rotary tables end at frame 1024.
    assert np.isfinite(last).all()


def resident_kb() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak
