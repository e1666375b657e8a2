"""How a process of `fkv` ends other than by itself: told to by a signal, or read by nobody.

Both unwind what is running, so that nothing half-made stays, and give the exit code that a shell
gives a process which the signal itself has ended: 128 and its number.
"""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from forcing_kv.runtime_trt.errors import ForcingKvError

OUTPUT_CLOSED = 128 + signal.SIGPIPE
"""Exit code where whoever read the output has left, such as `head`."""
_AGAIN_S = 0.2


@contextmanager
def ended_by_signals() -> Iterator[list[int]]:
    """Within the block SIGTERM and SIGHUP unwind it as Ctrl-C does.

    Further ones do not disturb the unwinding. Where the first is lost (Python drops what is raised
    in a finaliser, libraries catch it), it is told again until the block ends. A signal that is
    ignored already, as under `nohup`, stays so.

    Yields:
        The signal that has arrived, also where something else has come of it meanwhile.

    Raises:
        KeyboardInterrupt: on SIGINT.
        SystemExit: on the others.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []  # Python tells the main thread alone.
        return
    asked = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.getsignal(each) for each in asked}
    heard = [each for each in asked if before[each] not in (signal.SIG_IGN, None)]
    before[signal.SIGALRM] = signal.getsignal(signal.SIGALRM)
    told: list[int] = []
    raised: list[BaseException] = []

    def end(number: int, _: object) -> None:
        if not told:
            told.append(number)
            interrupt = number == signal.SIGINT
            raised.append(KeyboardInterrupt() if interrupt else SystemExit(128 + number))
            signal.signal(signal.SIGALRM, end)
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S, _AGAIN_S)
        if not _unwinding(raised[0]):
            raise raised[0]

    for each in heard:
        signal.signal(each, end)
    try:
        yield told
    finally:
        if told:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before[signal.SIGALRM])
        for each in heard:
            signal.signal(each, before[each])


def _unwinding(error: BaseException) -> bool:
    """Whether `error`, or what it became, is being handled where a signal has arrived."""
    current = sys.exc_info()[1]
    while current is not None and current is not error:
        current = current.__context__
    return current is error


class _Closed(io.TextIOBase):
    """Standard output where there is none: what is printed is not lost in silence."""

    def write(self, _: str) -> NoReturn:
        raise ForcingKvError("standard output is closed, and this command prints there; open it")


def fill_closed_descriptors() -> None:
    """Open what of standard input, output and error is closed, or the next file would be it."""
    if sys.stdout is None:
        sys.stdout = _Closed()
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # Takes the lowest that is free: this one.


def nobody_reads(error: BaseException) -> bool:
    """Whether an error comes of printing to a pipe that nobody reads any more."""
    if isinstance(error, SystemExit):  # That is what rich makes of it, for its consoles alone.
        return isinstance(error.__context__, BrokenPipeError)
    return isinstance(error, BrokenPipeError) and bool(_closed_outputs())


def discard_output() -> None:
    """Let Python's last flush go nowhere, where nobody reads it."""
    for descriptor in _closed_outputs():
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _closed_outputs() -> list[int]:
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            poll.register(stream.fileno(), 0)
    return [descriptor for descriptor, event in poll.poll(0) if event & select.POLLERR]
