"""Times of calls over a simulated device: what the host costs is not among them."""

from types import SimpleNamespace

import pytest
import torch

from forcing_kv.tools.bench.kernels.timing import time_cold

FLUSH_US, RECORD_US, ENQUEUE_US = 80.0, 2.0, 5.0


class Stream:
    """Work that the host enqueues and the device does in order; times in microseconds."""

    host = 0.0
    device = 0.0

    def enqueue(self, host_us: float, device_us: float) -> float:
        """Returns when the device has done it."""
        self.host += host_us
        self.device = max(self.device, self.host) + device_us
        return self.device

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def record(self) -> None:
        self.at = self.stream.enqueue(RECORD_US, 0.0)

    def query(self) -> bool:
        return self.at <= self.stream.host

    def elapsed_time(self, end: "Event") -> float:
        assert max(self.at, end.at) <= self.stream.host, "asked before the device is done"
        return (end.at - self.at) / 1000


@pytest.fixture
def stream(monkeypatch):
    made = Stream()
    buffer = SimpleNamespace(zero_=lambda: made.enqueue(ENQUEUE_US, FLUSH_US))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: buffer)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=50 * 2**20)
    )
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(made))
    return made


@pytest.mark.parametrize(("host_us", "device_us"), [(20, 500), (150, 10), (1500, 10)])
def test_what_the_host_takes_is_not_in_the_time(host_us, device_us, stream):
    times_ms = time_cold(lambda: stream.enqueue(host_us, device_us), warmup=2, iterations=5)
    assert times_ms == pytest.approx([device_us / 1000] * 5)


def test_call_that_waits_for_the_device_is_timed_all_the_same(stream):
    def call() -> None:
        stream.enqueue(ENQUEUE_US, 10)
        stream.synchronize()
        stream.enqueue(ENQUEUE_US, 10)

    assert len(time_cold(call, warmup=1, iterations=3)) == 3
