"""One session or decoder in two threads: the second caller is told, the first never disturbed."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fake_backend import LATENTS, CountingRunner, FakeBackend, counting_decoder

from forcing_kv.runtime_trt.errors import ForcingKvError, InputError
from forcing_kv.runtime_trt.session import Session

PROMPT = np.ones((3, 5), np.float32)


@pytest.fixture
def backend(tiny_config):
    return FakeBackend(tiny_config)


@pytest.fixture
def session(backend):
    opened = Session(backend)
    opened.set_prompt(PROMPT)
    return opened


@pytest.fixture
def other():
    """Another thread."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


def held_up(gate, other, call):
    """Begin a call in the other thread and return once it is inside the backend."""
    gate.arm()
    future = other.submit(call)
    assert gate.entered.wait(timeout=60)
    return future


CALLS = {
    "set_prompt": lambda session: session.set_prompt(PROMPT),
    "switch_prompt": lambda session: session.switch_prompt(PROMPT),
    "generate_chunk": lambda session: session.generate_chunk(),
    "stream": lambda session: next(session.stream()),
    "reset": lambda session: session.reset(),
    "sibling": lambda session: session.sibling(),
    "close": lambda session: session.close(),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_second_call_is_told_which_one_is_running(session, backend, other, call):
    wanted = session.generate_chunk(seed=3).latents
    session.reset()
    session.set_prompt(PROMPT)
    first = held_up(backend.gate, other, lambda: session.generate_chunk(seed=3))
    before = list(backend.calls)
    with pytest.raises(ForcingKvError, match=r"another thread is in generate_chunk, .*sibling"):
        CALLS[call](session)
    assert backend.calls == before
    backend.gate.open()
    np.testing.assert_array_equal(first.result(60).latents, wanted)
    # The video goes on as if nobody had called.
    assert session.generate_chunk().index == 1
    session.close()
    assert backend.closed == 1


@pytest.mark.parametrize("call", CALLS)
def test_the_running_call_is_named(session, backend, other, call):
    first = held_up(backend.gate, other, lambda: CALLS[call](session))
    with pytest.raises(ForcingKvError, match=f"another thread is in {call}, "):
        session.generate_chunk()
    backend.gate.open()
    first.result(60)


def test_two_streams_take_turns_and_the_loser_may_try_again(session, backend, other):
    mine, theirs = session.stream(seed=1), session.stream(seed=1)
    chunk = held_up(backend.gate, other, lambda: next(theirs))
    for _ in range(2):
        with pytest.raises(ForcingKvError, match="another thread is in stream"):
            next(mine)
    backend.gate.open()
    assert [chunk.result(60).index, next(mine).index, next(theirs).index] == [0, 1, 2]


def test_one_stream_in_two_threads(session, backend, other):
    stream = session.stream(2, run_ahead=True)
    first = held_up(backend.gate, other, lambda: next(stream))
    with pytest.raises(ForcingKvError, match="another thread is in stream"):
        next(stream)
    backend.gate.open()
    assert [first.result(60).index, *(chunk.index for chunk in stream)] == [0, 1]


def test_an_abandoned_stream_does_not_disturb_a_running_call(session, backend, other):
    stream = session.stream(run_ahead=True)
    next(stream)
    chunk = held_up(backend.gate, other, session.generate_chunk)
    stream.close()
    backend.gate.open()
    assert chunk.result(60).index == 2
    assert session.generate_chunk().index == 3


def test_a_failing_call_of_one_thread_lets_the_next_one_in(session, backend, other, monkeypatch):
    def fail(_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(backend, "submit", fail)
        with pytest.raises(MemoryError):
            other.submit(session.generate_chunk).result(60)
    with pytest.raises(ForcingKvError, match="half-way"):
        session.generate_chunk()
    session.reset()
    session.set_prompt(PROMPT)
    assert session.generate_chunk().index == 0


def test_a_call_out_of_a_call_names_its_own_thread(session, backend):
    """A signal handler or a callback."""
    backend.gate.pass_through = session.close
    with pytest.raises(ForcingKvError, match="this thread is in generate_chunk"):
        session.generate_chunk()


def test_sessions_of_their_own_run_side_by_side(session, backend, other):
    second = session.sibling()
    first = held_up(backend.gate, other, session.generate_chunk)
    second.set_prompt(PROMPT)
    assert second.generate_chunk().index == 0
    second.close()
    backend.gate.open()
    assert first.result(60).index == 0


def test_many_threads_share_one_session_without_a_wrong_chunk(session):
    """Whoever is refused asks again; every chunk is handed out once, and is the right one."""
    alone = {chunk.index: chunk.latents for chunk in session.stream(24, seed=5)}
    session.reset()
    session.set_prompt(PROMPT)
    start, refusals = threading.Barrier(4), []

    def work():
        made = []
        start.wait(timeout=60)
        while len(made) < 6:
            try:
                made.append(session.generate_chunk(seed=5))
            except ForcingKvError as error:
                refusals.append(str(error))
        return made

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(work) for _ in range(4)]
        chunks = [chunk for future in futures for chunk in future.result(60)]
    assert all("another thread is in generate_chunk" in refusal for refusal in refusals)
    assert sorted(chunk.index for chunk in chunks) == list(range(24))
    for chunk in chunks:
        np.testing.assert_array_equal(chunk.latents, alone[chunk.index])


def test_many_threads_drain_one_stream(session):
    stream, start = session.stream(40, run_ahead=True), threading.Barrier(4)

    def work():
        made = []
        start.wait(timeout=60)
        while True:
            try:
                made.append(next(stream))
            except StopIteration:
                return made
            except ForcingKvError:  # It is another's turn.
                continue

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(work) for _ in range(4)]
        indices = [chunk.index for future in futures for chunk in future.result(60)]
    assert sorted(indices) == list(range(40))


def test_a_stream_that_has_ended_ends_while_another_thread_works(session, backend, other):
    stream = session.stream(1)
    next(stream)
    chunk = held_up(backend.gate, other, session.generate_chunk)
    assert list(stream) == []
    backend.gate.open()
    assert chunk.result(60).index == 1


DECODER_CALLS = {
    "decode": lambda decoder: decoder.decode(LATENTS),
    "reset": lambda decoder: decoder.reset(),
    "close": lambda decoder: decoder.close(),
}


@pytest.mark.parametrize("running", DECODER_CALLS)
@pytest.mark.parametrize("call", [*DECODER_CALLS, "read_state"])
def test_a_decoder_serves_one_call_at_a_time(other, running, call):
    runner = CountingRunner()
    decoder = counting_decoder(runner)
    decoder.decode(LATENTS)
    first = held_up(runner.gate, other, lambda: DECODER_CALLS[running](decoder))
    with pytest.raises(ForcingKvError, match=f"another thread is in {running}, and a decoder"):
        DECODER_CALLS.get(call, lambda decoder: decoder.read_state())(decoder)
    runner.gate.open()
    first.result(60)
    if running == "close":
        assert runner.closed
    else:
        decoder.decode(LATENTS)
        assert runner.count == {"decode": 3, "reset": 1}[running]


def test_a_session_needs_a_backend():
    with pytest.raises(InputError, match=r"backend is 'bundle'; open a bundle with Session.open"):
        Session("bundle")
