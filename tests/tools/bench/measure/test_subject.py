"""A subject is measured behind the gate; a wrong or a failing one gives a row without a number."""

import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from host_cuda import HostCuda
from host_engine import HostEngine
from shared_exports import export_once

from forcing_kv.export.bundle.write import BundleLabels
from forcing_kv.export.cost.memory import buffer_nbytes
from forcing_kv.export.cost.work import first_steady_chunk
from forcing_kv.export.verify.eager import eager_session
from forcing_kv.runtime_trt.cuda.chunk_graph import ChunkGraphBackend
from forcing_kv.runtime_trt.session import Session
from forcing_kv.tools.bench.measure.options import MeasureOptions
from forcing_kv.tools.bench.measure.subject import measure
from forcing_kv.tools.bench.pixel_decoders import PixelDecoder, random_decoders
from forcing_kv.tools.bench.pytorch.backend import TorchBackend
from forcing_kv.tools.bench.pytorch.options import TorchOptions
from forcing_kv.tools.bench.subjects import SUBJECTS, Subject, subject


@pytest.fixture
def options(tmp_path):
    return MeasureOptions("cpu", num_chunks=5, warmup_chunks=3, gate_chunks=4, folder=tmp_path)


def wrong(scale: float) -> Subject:
    """Our operators on weights that are off by `scale`."""

    @contextmanager
    def open_it(workload, device, clock):
        model = workload.load(device)
        model.head.head.weight.data *= 1 + scale
        with Session(
            TorchBackend(model, workload.config, device, TorchOptions("operators"))
        ) as opened:
            yield opened

    return Subject("wrong", "forcing-kv", "off", open_it)


def spoiled() -> Subject:
    """Our operators with one weight that is no number."""

    @contextmanager
    def open_it(workload, device, clock):
        model = workload.load(device)
        model.head.head.weight.data[0, 0] = float("nan")
        options = TorchOptions("operators")
        with Session(TorchBackend(model, workload.config, device, options)) as opened:
            yield opened

    return Subject("spoiled", "forcing-kv", "NaN", open_it)


def broken() -> Subject:
    @contextmanager
    def open_it(workload, device, clock):
        raise RuntimeError("no such kernel")
        yield

    return Subject("broken", "forcing-kv", "fails", open_it)


@pytest.mark.parametrize("name", ["eager-dense", "eager-forcing-kv", "operators"])
def test_good_subject_gives_every_row(tiny, options, name):
    chosen = subject(name)
    rows = list(measure(chosen, tiny(chosen.policy), options))
    assert [row.kind for row in rows] == ["load", "chunk", "step", "rollout"]
    assert {row.status for row in rows} == {"ok"}
    assert rows[0].gate["passed"]
    metrics = rows[1].metrics
    parts = [metrics[f"{part}_ms"] for part in ("steps_only", "clean", "evict", "commit")]
    whole = metrics["denoiser_ms"]
    assert 0.5 * sum(p["p20"] for p in parts) < whole["median"] < 2 * sum(p["p80"] for p in parts)
    config = tiny(chosen.policy).config
    sizes = buffer_nbytes(config)
    own = sizes["K/V of the chunk"] + sizes["K/V of the eviction"]
    assert metrics["kv_nbytes"] == config.nbytes_kv + own
    assert metrics["kv_history_nbytes"] == metrics["kv_nbytes"] - own * (name != "eager-dense")
    assert len(rows[3].metrics["chunk_ms"]) == 5


@pytest.fixture
def captured():
    """A subject that is one captured graph a chunk, on the CPU double of CUDA."""

    def open_it(workload, device, clock):
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        bundle = Path(folder) / "bundle"
        labels = BundleLabels("tiny")
        manifest = export_once(workload.load(device), workload.config, bundle, labels)
        cuda = HostCuda()
        engine = HostEngine(cuda, bundle, manifest)
        return Session(ChunkGraphBackend(cuda, engine, workload.config, manifest.graphs))

    with ExitStack() as stack:
        yield Subject("captured", "forcing-kv", "one graph a chunk", open_it)


def test_parts_of_a_captured_chunk_are_timed_call_by_call(tiny, options, captured):
    rows = list(measure(captured, tiny(), options))
    assert [row.kind for row in rows] == ["load", "chunk", "step", "rollout"], rows[0].error
    metrics = rows[1].metrics
    assert metrics["parts_from"] == "5 chunks more, call by call"
    assert rows[1].run["num_chunks"] == len(rows[3].metrics["chunk_ms"]) == 5
    # Between any two events of the double lies a millisecond: the captured whole, and every part.
    parts = ("denoiser", "steps_only", "clean", "evict", "commit")
    assert [metrics[f"{part}_ms"]["median"] for part in parts] == [1.0] * 5
    assert rows[2].metrics["step_ms"]["median"] == 0.5


def test_first_chunk_is_warm_when_it_is_timed(tiny, options, monkeypatch):
    seen = []
    real = Session.generate_chunk

    def generate(session, *noise, **named):
        seen.append((session.num_frames, "seed" in named))
        return real(session, *noise, **named)

    monkeypatch.setattr(Session, "generate_chunk", generate)
    list(measure(subject("eager-dense"), tiny("dense"), options))
    assert seen[:3] == [(0, True), (0, True), (0, False)]


def small_tae() -> PixelDecoder:
    return next(random_decoders(4, (4, 6), "cpu", widths=(8, 8, 8, 8)))


def test_decoders_and_growth_come_after_the_rollout(tiny, options):
    workload = replace(tiny(), decoders=lambda device: [small_tae()])
    chosen = replace(options, growth_chunks=7)
    rows = list(measure(subject("operators"), workload, chosen))
    assert [row.kind for row in rows][3:] == ["rollout", "decode", "growth"]
    decode, growth = rows[4].metrics, rows[5]
    assert decode["tae_ms"]["median"] > 0
    assert 0 < decode["with_tae_fps"] < 1e3 * workload.pixel_frames / decode["tae_ms"]["median"]
    first = rows[0].metrics["time_to_first_latents_ms"] + decode["tae_ms"]["median"]
    assert decode["time_to_first_frame_tae_ms"] == pytest.approx(first, abs=1e-3)
    assert "pixels_fps" not in decode
    assert len(growth.metrics["chunk_ms"]) == growth.run["asked_chunks"] == 7
    short = replace(chosen, num_chunks=9, deadline=0.0)
    *_, rollout, _, late = measure(subject("operators"), workload, short)
    assert len(late.metrics["chunk_ms"]) == len(rollout.metrics["chunk_ms"]) == 5
    assert (rollout.run["asked_chunks"], rollout.run["num_chunks"]) == (9, 5)


def test_tiny_decoder_goes_on_where_it_was():
    decoder, again = small_tae(), small_tae()
    latents = torch.randn(4, 4, 4, 6)
    whole = decoder(latents)
    assert whole.shape == (16, 3, 32, 48)
    again._decode.load_state_dict(decoder._decode.state_dict())
    parts = torch.cat([again(latents[:1]), again(latents[1:])])
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)


def test_random_wan_vae_makes_four_frames_of_one():
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'forcing-kv[vae]'")
    from forcing_kv.export.decoder.vae import random_wan_decoder

    small = random_wan_decoder((4, 6), "float32", base_dim=8, z_dim=4,
                               latents_mean=[0.0] * 4, latents_std=[1.0] * 4)  # fmt: skip
    decoder = PixelDecoder(small, "cpu")
    assert decoder.name == "vae"
    assert decoder(torch.randn(2, 4, 4, 6)).shape == (8, 3, 32, 48)


def test_smaller_size_bounds_the_gate(tiny, options):
    workload, chosen = tiny().as_dtype("bfloat16"), subject("operators")
    bounded = replace(options, gate_scale=workload)
    rows = list(measure(chosen, workload, bounded))
    assert {row.status for row in rows} == {"ok"}, rows[0].error
    assert rows[0].gate["reference"] == "same dtype"
    (row,) = measure(wrong(0.5), workload, bounded)
    assert row.status == "gate_failed"


def test_wrong_subject_gets_no_number(tiny, options):
    (row,) = measure(wrong(1e-2), tiny(), options)
    assert row.status == "gate_failed"
    assert row.gate["error"] > row.gate["bound"]
    assert not row.metrics
    assert not row.gate["passed"]


def test_number_stays_where_what_follows_it_fails(tiny, options):
    def no_decoder(device):
        raise RuntimeError("no such decoder")

    *rows, last = measure(subject("operators"), replace(tiny(), decoders=no_decoder), options)
    assert [row.kind for row in rows] == ["load", "chunk", "step", "rollout"]
    assert (last.kind, last.status) == ("rest", "failed")
    assert len({row.key for row in (*rows, last)}) == 5


def test_failing_subject_is_a_row(tiny, options):
    (row,) = measure(broken(), tiny(), options)
    assert row.status == "failed"
    assert "RuntimeError: no such kernel" in row.error
    assert str(options.folder) not in row.error


def test_no_speed_is_told_of_what_is_not_finite(tiny, options):
    (row,) = measure(spoiled(), tiny(), options)
    assert (row.status, row.metrics) == ("failed", {})
    assert row.error.startswith("NonFiniteError: chunk 0: ")


def test_dense_baseline_wraps_around_like_the_engine(tiny):
    workload = tiny("dense")
    chunks = []
    for session in (
        eager_session(workload.load("cpu"), workload.config),
        Session(TorchBackend(workload.load("cpu"), workload.config, "cpu", TorchOptions("dense"))),
    ):
        with session:
            session.set_prompt(workload.prompt())
            chunks.append(np.stack([chunk.latents for chunk in session.stream(10)]))
    np.testing.assert_allclose(*chunks, atol=1e-5)


def test_first_steady_chunk(tiny):
    assert first_steady_chunk(tiny().config) == 3
    assert first_steady_chunk(tiny("dense").config) == 6
    late = replace(tiny().config, policy=replace(tiny().config.policy, last_warmup_chunk=2))
    assert first_steady_chunk(late) == 4


def test_gate_is_long_enough_for_what_is_compiled():
    assert [each.name for each in SUBJECTS.values() if each.is_port] == ["eager-dense"]
    assert subject("eager-dense").gate_chunks(7) == 2
    assert subject("eager-grouped").gate_chunks(7) == 7
    for each in SUBJECTS.values():
        steady = 6 if each.policy == "dense" else 3
        if "compile" in each.name or "graph" in each.name:
            assert each.min_gate_chunks > steady + ("graph" in each.name)
