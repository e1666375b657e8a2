"""The training sequences, the training loop, and that training and inference compute the same."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forcing_kv.tools.digits.training import sequences

pytest.importorskip("sklearn", reason="needs scikit-learn (extra `train`)")
torch = pytest.importorskip("torch", reason="needs torch (extra `train`)")


def test_batches_follow_from_seed_and_index() -> None:
    first, again, other = (sequences.make_batch(0, index, 4) for index in (7, 7, 8))
    assert np.array_equal(first.latents, again.latents)
    assert np.array_equal(first.visible, again.visible)
    assert not np.array_equal(first.latents, other.latents)


def test_heldout_captions_are_never_trained() -> None:
    captions = sequences.training_captions()
    assert len(captions) == 36
    assert not set(captions) & set(sequences.HELDOUT_CAPTIONS)
    assert {digit for digit, _ in captions} == set(range(10))


@pytest.mark.parametrize("long", [False, True])
def test_no_chunk_sees_itself_or_later_in_the_clean_part(long: bool) -> None:
    for index in range(20):
        batch = sequences.make_batch(1, index, 8, long)
        assert batch.num_clean == (6 if long else 3)
        clean = batch.chunks[:, :-1].repeat(sequences.FRAMES, axis=1)
        later = clean[:, None] >= batch.query_chunks[:, :, None]
        assert not batch.visible[later].any()


def test_cache_patterns_cover_dense_windows_and_single_segments() -> None:
    rng = sequences.sample_rng(0, 0)
    frames, query = np.arange(9), np.array([0, 1, 2, 0, 1, 2, 3])
    seen = [sequences.sample_visible(frames, query, rng)[-1] for _ in range(200)]
    frames_seen = [pattern.all(-1).sum() for pattern in seen]
    assert frames_seen.count(9) > 50
    assert frames_seen.count(2) > 30
    partial = [pattern.any(-1).sum() > pattern.all(-1).sum() for pattern in seen]
    assert 20 < sum(partial) < 100


def test_coupled_noise_says_the_style_and_nothing_else_changes() -> None:
    from forcing_kv.tools.digits.training.network import couple_noise, style_basis

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, 4, 3, 16, 8, 8, generator=generator)
    styles = torch.randn(5, 1, sequences.data.STYLE_DIM, generator=generator)
    basis = style_basis().flatten(1)
    coupled = couple_noise(noise, styles)
    torch.testing.assert_close(coupled.flatten(2) @ basis.T, styles.expand(-1, 4, -1))
    change = (coupled - noise).flatten(2)
    torch.testing.assert_close(change, change @ basis.T @ basis, atol=1e-6, rtol=0)
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)))


@pytest.fixture
def small_shape(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Trainers train a model of this shape: two layers of two heads."""
    from forcing_kv.tools.digits.shipped import MODEL
    from forcing_kv.tools.digits.training import network, trainer

    shape = replace(MODEL, num_layers=2, dim=64, ffn_dim=64, num_heads=2)
    monkeypatch.setattr(trainer, "build_model", lambda seed: network.build_model(seed, shape))
    return shape


def _trainer(folder: Path):  # type: ignore[no-untyped-def]
    from forcing_kv.tools.digits.training.config import TrainConfig
    from forcing_kv.tools.digits.training.trainer import Trainer

    config = TrainConfig(
        steps=8,
        batch=1,
        warmup=1,
        forcing_start=0.2,
        long_start=0.2,
        precision="float32",
        compile=False,
    )
    return Trainer(config, folder)


@pytest.mark.usefixtures("small_shape")
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = _trainer(tmp_path / "whole")
    records = [whole.train_step() for _ in range(4)]
    first = _trainer(tmp_path / "parts")
    for _ in range(2):
        first.train_step()
    first.save()
    second = _trainer(tmp_path / "parts")
    assert second.progress.step == 2
    resumed = [second.train_step() for _ in range(2)]
    assert [record["loss"] for record in resumed] == [record["loss"] for record in records[2:]]
    for name, value in whole.average.state_dict().items():
        assert torch.equal(value, second.average.state_dict()[name]), name


def test_a_run_ends_saves_and_logs(tmp_path: Path, small_shape) -> None:  # type: ignore[no-untyped-def]
    trainer, reported = _trainer(tmp_path), []
    trainer.run(lambda progress, record: reported.append(record), every=4)
    assert [record["step"] for record in reported] == [4, 8]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    trainer.progress.step = 4
    trainer.save()
    _trainer(tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
    weights = trainer.average.state_dict()
    from forcing_kv.export.checkpoint.load import load_model

    loaded = load_model(tmp_path / "average.safetensors", small_shape).state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_muon_updates_have_singular_values_near_one() -> None:
    from forcing_kv.tools.digits.training.optimiser import orthogonalise

    torch.manual_seed(0)
    matrices = torch.randn(3, 24, 8) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    for singular in torch.linalg.svdvals(orthogonalise(matrices)):
        assert singular.min() > 0.5
        assert singular.max() < 1.3


def test_muon_learns_a_matrix() -> None:
    from forcing_kv.tools.digits.training.optimiser import Muon

    torch.manual_seed(0)
    wanted, found = torch.randn(12, 8), torch.nn.Parameter(torch.zeros(12, 8))
    muon = Muon([found], lr=0.05)
    for _ in range(200):
        ((found - wanted) ** 2).sum().backward()
        muon.step()
        muon.zero_grad()
    assert (found - wanted).square().mean() < 0.05 * wanted.square().mean()


def _random_model():  # type: ignore[no-untyped-def]
    from forcing_kv.tools.digits.training.network import build_model

    model = build_model(0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.requires_grad_(False)


def test_a_training_sequence_computes_what_a_rollout_computes() -> None:
    import dense_rollout

    from forcing_kv.tools.digits import shipped
    from forcing_kv.tools.digits.training import network

    model, captions = _random_model(), ["a digit 3 moving left ."]
    prompts = dense_rollout.embed_captions(captions)
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 7, 3, 16, 8, 8, generator=generator)
    levels = torch.tensor([[4, 4, 4, 0, 1, 2, 3]])
    query = np.array([0, 1, 2, 0, 1, 2, 3])
    visible = sequences._dense(np.arange(9), query)[None]
    frames = torch.from_numpy(query)[:, None] * 3 + torch.arange(3)
    cos, sin = network.frame_rope(frames.flatten()[None], model.shape, shipped.CHUNK)
    flow = network.sequence_flow(
        model,
        latents,
        network.level_sinusoids()[levels],
        torch.from_numpy(prompts),
        (cos[:, None], sin[:, None]),
        network.attention_bias(torch.from_numpy(visible), shipped.CHUNK),
    )
    plain = dense_rollout.DenseRollout(model, prompts)
    timesteps = shipped.SCHEDULE.timesteps
    for chunk in range(4):
        expected, _ = plain._forward(latents[:, 3 + chunk], float(timesteps[chunk]), chunk)
        torch.testing.assert_close(flow[:, 3 + chunk], expected, atol=2e-5, rtol=1e-4)
        if chunk < 3:
            _, entries = plain._forward(latents[:, chunk], 0.0, chunk)
            for past, entry in zip(plain.past, entries, strict=True):
                past.append(entry)


def test_the_plain_rollout_equals_the_eager_session() -> None:
    import dense_rollout

    from forcing_kv.export.verify.eager import eager_session
    from forcing_kv.runtime_trt.rollout.config import RolloutConfig
    from forcing_kv.runtime_trt.rollout.layout import HeadPartition
    from forcing_kv.runtime_trt.rollout.policy import CachePolicy
    from forcing_kv.tools.digits import shipped

    model, caption = _random_model(), "a digit 7 moving up ."
    noise, eps = dense_rollout.clip_noise(4, 1, 3)
    dense = dense_rollout.DenseRollout(model, dense_rollout.embed_captions([caption]))
    plain = torch.cat([dense.chunk(i, noise[:, i], eps[:, i]) for i in range(3)], dim=1)
    partition = HeadPartition.uniform(model.shape.num_layers, model.shape.num_heads, static=False)
    policy = CachePolicy.dense(21, shipped.CHUNK.num_frames)
    config = RolloutConfig(model.shape, shipped.CHUNK, policy, partition, shipped.SCHEDULE)
    with eager_session(model, config) as session:
        session.set_prompt(dense_rollout.embed_captions([caption])[0])
        chunks = session.stream(3, noise=noise[0].numpy(), eps=eps[0].numpy())
        latents = np.concatenate([chunk.latents for chunk in chunks])
    np.testing.assert_allclose(latents, plain[0].numpy(), atol=1e-4)
