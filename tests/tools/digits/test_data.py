"""Clips, latents and captions of the digits model."""

import json

import numpy as np
import pytest

from forcing_kv.export.request.model_config import model_shape_from_official
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import ChunkShape
from forcing_kv.runtime_trt.rollout.schedule import Schedule
from forcing_kv.tools.digits import codec, data, shipped, text

pytest.importorskip("sklearn", reason="needs scikit-learn (extra `train`)")


def _style(seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=seed)).standard_normal(data.STYLE_DIM)


def test_a_clip_follows_from_its_arguments_alone() -> None:
    clips = [data.make_clip(3, "left", _style(1), np.arange(9)) for _ in range(2)]
    assert np.array_equal(*clips)
    assert not np.array_equal(clips[0], data.make_clip(3, "left", _style(2), np.arange(9)))


@pytest.mark.parametrize("direction", text.DIRECTIONS)
def test_motion_starts_as_asked_and_bounces(direction: str) -> None:
    path = data.motion_of(direction, _style(5)).positions(np.arange(40))
    assert (path[2] - path[0] == 2 * np.array(data.VELOCITY[direction])).all()
    assert path.min() >= 0
    assert path.max() <= data.TRAVEL
    steps = np.abs(np.diff(path, axis=0)).sum(1)
    assert steps.max() == data.SPEED
    assert np.abs(np.diff(np.sign(np.diff(path.sum(1))))).sum() >= 3


def test_frames_may_be_asked_for_out_of_order_and_far_away() -> None:
    whole = data.make_clip(7, "down", _style(0), np.arange(70))
    some = np.array([66, 0, 12])
    assert np.array_equal(data.make_clip(7, "down", _style(0), some), whole[some])


def test_training_and_heldout_instances_are_disjoint() -> None:
    train, heldout = data.load_split(heldout=False), data.load_split(heldout=True)
    assert len(train.images) + len(heldout.images) == 1797
    shown = np.concatenate([shapes.images for shapes in data.training_shapes()])
    assert all(np.abs(shown - image).max(axis=(1, 2)).min() > 0.1 for image in heldout.images[:50])


def test_starts_are_equally_likely() -> None:
    rng = np.random.Generator(np.random.Philox(key=3))
    starts = [data.motion_of("right", rng.standard_normal(6)).start for _ in range(2000)]
    columns, rows = np.transpose(starts)
    assert (np.bincount(columns) > 400).all()
    assert len(np.bincount(columns)) == data.NUM_STARTS
    assert sorted(set(rows)) == [6, 7, 8, 9, 10]


def test_codec_round_trip() -> None:
    video = data.make_clip(5, "up", _style(2), np.arange(6))
    latents = codec.encode(video)
    assert latents.shape == (6, 16, 8, 8)
    assert 0.5 < np.sqrt((latents**2).mean()) < 2
    assert np.abs(codec.decode(latents) - video).max() < 1e-6


def test_codec_cells_are_four_by_four_pixels() -> None:
    video = np.zeros((1, 32, 32), np.float32)
    video[0, 6, 11] = 1.0  # row 1 of cells, column 2; row 2 and column 3 inside: channel 11
    moved = codec.encode(video) - codec.encode(np.zeros_like(video))
    assert [tuple(place) for place in np.argwhere(moved)] == [(0, 11, 1, 2)]


@pytest.mark.parametrize("shape", [(3, 30, 32), (32,)])
def test_codec_refuses_other_sizes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="multiples of 4"):
        codec.encode(np.zeros(shape, np.float32))
    with pytest.raises(InputError, match="16, h, w"):
        codec.decode(np.zeros((3, 15, 8, 8), np.float32))


def test_word_vectors_are_orthogonal_and_padding_is_zero() -> None:
    table = text.word_table()
    assert np.array_equal(table @ table.T, text.TEXT_DIM * np.eye(len(text.WORDS)))
    embeds = text.encode_prompt(text.caption_of(3, "left"))
    assert embeds.shape == (text.TEXT_LEN, text.TEXT_DIM)
    assert embeds.dtype == np.float32
    assert np.abs(embeds[:6]).min() == 1
    assert not embeds[6:].any()


def test_unknown_words_are_named_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown words \['cat', '12'\].*'digit'.*'left'"):
        text.encode_prompt("a cat 12 moving left .")


@pytest.mark.parametrize("prompt", ["", "a a a a a a a a a"])
def test_prompts_of_the_wrong_length_are_refused(prompt: str) -> None:
    with pytest.raises(InputError, match="1 to 8"):
        text.encode_prompt(prompt)


def test_captions_are_parsed_back() -> None:
    assert text.parse_caption(text.caption_of(4, "down")) == (4, "down")
    with pytest.raises(InputError, match="one digit"):
        text.parse_caption("a digit moving left .")


def test_the_config_file_says_what_the_code_says() -> None:
    config = json.loads(shipped.CHECKPOINT.with_name("config.json").read_text())
    assert model_shape_from_official(config["model"], "config.json") == shipped.MODEL
    assert ChunkShape(**config["chunk"]) == shipped.CHUNK
    assert Schedule(**config["schedule"]) == shipped.SCHEDULE


def test_the_shipped_weights_are_small_and_have_official_names() -> None:
    assert shipped.CHECKPOINT.stat().st_size <= 8_000_000
    header = shipped.CHECKPOINT.read_bytes()
    names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert "blocks.3.self_attn.norm_q.weight" in names
    assert {entry["dtype"] for entry in names.values()} == {"F32"}
