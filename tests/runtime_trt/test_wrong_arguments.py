"""Every argument of the public classes, of every wrong kind: one `InputError`, and no harm."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_backend import LATENTS, CountingRunner, FakeBackend, counting_decoder
from hypothesis import given
from hypothesis import strategies as st

from forcing_kv.runtime_trt.bundle.manifest import DecoderInfo, Manifest
from forcing_kv.runtime_trt.bundle.prompt_file import PromptFile, read_prompts, write_prompts
from forcing_kv.runtime_trt.decoder import VideoDecoder, follow_session
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.open import open_backend
from forcing_kv.runtime_trt.rollout.arguments import check_threads, whole_number
from forcing_kv.runtime_trt.session import Session

PROMPT = np.ones((3, 5), np.float32)


class Hostile:
    """Fails at whatever it is asked; hypothesis cannot show it either."""

    def __repr__(self):
        raise RuntimeError("no repr")

    def __index__(self):
        raise RuntimeError("no index")

    def __array__(self, *_, **__):
        raise RuntimeError("no array")

    def __fspath__(self):
        raise RuntimeError("no path")

    __len__ = __bool__ = __index__


NO_NUMBERS = [
    None, "3", b"3", "a\x1b[31m", 1.0, 1.5, math.nan, math.inf, 1j, [3], (3,), {}, {3}, object, len,
    np.float32(3), np.array([1, 2]), np.array(1.0), np.datetime64(1, "s"), torch.ones(2),
    Path("3"), range(3), True, False, np.True_,
]  # fmt: skip
NO_FLAGS = [None, 0, 1, "yes", "", [], np.array([True, False]), 1.0, torch.ones(2)]
NO_PATHS = [None, 3, 1.5, b"bundle", "", "a\0b", [], object(), np.zeros(2), True]
NO_NAMES = [None, 3, "tpu", "", "ONNXRUNTIME", b"auto", ["auto"], {}, np.zeros(2), "a\0"]
NO_ARRAYS = [
    None, "a cat", b"a cat", Path("p.npy"), 3, 1.5, math.nan, [], [[]], [[1.0], [1.0, 2.0]], [None],
    ["a", "b"], {}, {1.0}, object(), iter([1.0]), np.zeros(0), np.array("cat"),
    np.zeros((3, 5), np.int64), np.zeros((3, 5), bool), np.zeros((3, 5), complex),
    np.zeros((3, 5), "datetime64[s]"), np.zeros((3, 5), object), np.zeros((3, 5), [("x", "f4")]),
    np.full((3, 5), np.nan), np.full((3, 5), 1e300), np.zeros((5, 3)), np.zeros((1, 3, 5)),
    torch.zeros(3, 5, requires_grad=True), torch.zeros(3, 5, dtype=torch.bfloat16),
    torch.zeros(3, 5, dtype=torch.int32), torch.zeros(3, 5, device="meta"),
    torch.zeros(3, 5).to_sparse(), np.zeros((3, 5), np.longdouble),
]  # fmt: skip

wrong_numbers = st.sampled_from(NO_NUMBERS) | st.floats() | st.text() | st.complex_numbers()
wrong_seeds = wrong_numbers | st.integers(max_value=-1) | st.integers(min_value=2**64)
wrong_counts = wrong_numbers.filter(lambda each: each is not None) | st.integers(max_value=0)
wrong_threads = wrong_numbers | st.integers(max_value=-1) | st.integers(min_value=100_000)
wrong_arrays = st.sampled_from(NO_ARRAYS) | st.text() | st.lists(st.integers() | st.text())
wrong_noise = wrong_arrays.filter(lambda each: each is not None)


@pytest.fixture
def session(tiny_config):
    opened = Session(FakeBackend(tiny_config))
    opened.set_prompt(PROMPT)
    return opened


def refused(call, *names):
    """The call raises one `InputError` of one short line that names the argument."""
    with pytest.raises(InputError) as error:
        call()
    message = str(error.value)
    assert type(error.value) is InputError
    assert any(name in message for name in names), message
    assert len(message) < 600
    assert message.isprintable(), message


@pytest.fixture(scope="module")
def played(tiny_config):
    """A session that has made a chunk; calls that are refused leave it so."""
    opened = Session(FakeBackend(tiny_config))
    opened.set_prompt(PROMPT)
    opened.generate_chunk()
    return opened


@given(wrong_seeds, wrong_counts, wrong_arrays, wrong_noise, st.sampled_from(NO_FLAGS))
def test_every_argument_of_a_session(played, seed, count, prompt, noise, flag):
    calls = len(played.backend.calls)
    refused(lambda: played.generate_chunk(seed=seed), "seed")
    refused(lambda: played.generate_chunk(noise), "noise")
    refused(lambda: played.generate_chunk(eps=noise), "eps")
    refused(lambda: played.generate_chunk(keep_x0=flag), "keep_x0")
    refused(lambda: played.switch_prompt(prompt), "prompt_embeds")
    refused(lambda: played.stream(seed=seed), "seed")
    refused(lambda: played.stream(count), "num_chunks")
    refused(lambda: played.stream(2, noise=noise), "noise")
    refused(lambda: played.stream(2, eps=noise), "eps", "noise")
    refused(lambda: played.stream(2, run_ahead=flag), "run_ahead")
    assert len(played.backend.calls) == calls
    assert played.num_frames == 3


@given(wrong_arrays)
def test_every_prompt(tiny_config, prompt):
    session = Session(FakeBackend(tiny_config))
    refused(lambda: session.set_prompt(prompt), "prompt_embeds")
    refused(session.generate_chunk, "no prompt is set")


@pytest.mark.parametrize("prompt", ["a cat", b"a cat", Path("cat.safetensors"), None])
def test_a_prompt_as_text_is_told_how_it_is_encoded(session, prompt):
    with pytest.raises(InputError, match=r"float32 \[3, 5\].*`fkv encode-prompt`.*read_prompts"):
        session.set_prompt(prompt)


def test_what_fails_at_every_question(played):
    test_every_argument_of_a_session.hypothesis.inner_test(played, *[Hostile()] * 5)
    test_every_option_of_opening.hypothesis.inner_test(*[Hostile()] * 4)
    test_every_argument_of_decoding.hypothesis.inner_test(Hostile())


@given(
    st.sampled_from(NO_PATHS), st.sampled_from(NO_NAMES), wrong_threads, st.sampled_from(NO_FLAGS)
)
def test_every_option_of_opening(path, name, threads, flag):
    """Before anything is looked for on the disk."""
    for opened in (Session.open, open_backend):
        refused(lambda opened=opened: opened(path), "bundle")
        refused(lambda opened=opened: opened("nowhere", name), "backend")
        refused(lambda opened=opened: opened("nowhere", num_threads=threads), "num_threads")
        refused(lambda opened=opened: opened("nowhere", use_graphs=flag), "use_graphs")


@given(
    st.sampled_from(NO_PATHS), st.sampled_from(NO_NAMES), wrong_threads, st.sampled_from(NO_FLAGS)
)
def test_every_option_of_a_decoder(tiny_config, path, name, threads, flag):
    decoders = {"tae": DecoderInfo({}, "w.bin", "0" * 64, 0)}
    manifest = Manifest("tiny", tiny_config, {}, "0" * 64, 0, decoders=decoders)
    which = ("nowhere", manifest, "tae")
    refused(lambda: VideoDecoder.open(path, manifest, "tae"), "bundle")
    refused(lambda: VideoDecoder.open("nowhere", name, "tae"), "manifest")
    refused(lambda: VideoDecoder.open("nowhere", manifest, name), "kind", "decoder (it has")
    refused(lambda: VideoDecoder.open(*which, name), "decode backend")
    refused(lambda: VideoDecoder.open(*which, num_threads=threads), "num_threads")
    refused(lambda: VideoDecoder.open(*which, use_graphs=flag), "use_graphs")
    refused(lambda: follow_session(path, manifest, "tae", "onnxruntime"), "bundle")


@given(wrong_noise)
def test_every_argument_of_decoding(latents):
    decoder = counting_decoder(CountingRunner())
    refused(lambda: decoder.decode(latents), "latents")
    assert (decoder.decode(LATENTS) == 1).all()


@given(st.sampled_from(NO_PATHS), wrong_numbers)
def test_every_argument_of_prompt_files(tmp_path_factory, path, number):
    folder = tmp_path_factory.mktemp("prompts")
    file = folder / "p.safetensors"
    content = PromptFile(("a",), PROMPT[None])
    refused(lambda: read_prompts(path), "path")
    refused(lambda: write_prompts(path, content), "path")
    if number is not None:
        refused(lambda: read_prompts(file, number), "size")
    for wrong in (number, path, PROMPT):
        refused(lambda wrong=wrong: write_prompts(file, wrong), "content")
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("prompts", "embeds", "told"),
    [
        (("a",), np.zeros((2, 3, 5), np.float32), "2 embeddings but 1 texts"),
        (("a",), PROMPT, "shape"),
        (("a",), np.full((1, 3, 5), np.nan), "NaN"),
        (("a",), np.zeros((1, 3, 5), np.int32), "dtype int32"),
        (("a",), None, "None"),
        ((), np.zeros((0, 3, 5)), "shape"),
        ((3,), np.zeros((1, 3, 5)), "prompts"),
        ("a", np.zeros((1, 3, 5)), "prompts"),
        (None, np.zeros((1, 3, 5)), "prompts"),
    ],
)
def test_a_prompt_file_that_could_not_be_read_is_not_written(tmp_path, prompts, embeds, told):
    with pytest.raises(InputError, match=told):
        write_prompts(tmp_path / "p.safetensors", PromptFile(prompts, embeds))
    assert not list(tmp_path.iterdir())


def test_paths_of_prompt_files_may_be_text(tmp_path):
    file = str(tmp_path / "p.safetensors")
    write_prompts(file, PromptFile(("a cat",), PROMPT[None]))
    assert read_prompts(file, (3, 5)).prompts == ("a cat",)


def test_what_is_allowed(session, tiny_config):
    """Whole numbers of any kind, arrays of any kind of float, lists, and tensors on the host."""
    wanted = session.generate_chunk(seed=7).latents
    noise = np.random.default_rng(0).standard_normal(tiny_config.latent_shape).astype(np.float32)
    for seed in (7, np.int64(7), np.uint8(7), np.array(7), torch.tensor(7)):
        session.reset()
        session.set_prompt(PROMPT)
        np.testing.assert_array_equal(session.generate_chunk(seed=seed).latents, wanted)
    for given_noise in (
        noise, noise.tolist(), noise.astype(np.float64), noise.astype(">f4"), torch.tensor(noise),
        np.asfortranarray(noise),
    ):  # fmt: skip
        made = session.generate_chunk(given_noise).latents
        np.testing.assert_array_equal(made, noise + np.float32(1))
    for prompt in (PROMPT, PROMPT.tolist(), torch.tensor(PROMPT), PROMPT.astype(np.float16)):
        session.switch_prompt(prompt)
    assert next(session.stream(np.int32(2), seed=2**64 - 1, run_ahead=np.True_)).index == 7


@pytest.mark.parametrize(
    ("seed", "told"),
    [(None, "None"), (1.5, "1.5"), (-1, "-1"), (2**64, str(2**64)), (True, "True")],
)
def test_a_wrong_seed_is_told_what_to_do(session, seed, told):
    with pytest.raises(InputError, match=rf"seed is {told}; give .* from 0 to 2\*\*64 - 1 \(.*\)"):
        session.generate_chunk(seed=seed)


def test_threads_are_bounded_by_the_machine(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert check_threads(32) == 32
    with pytest.raises(InputError, match=r"from 0 to 32 \(8 for each CPU .*\), or 0 for an autom"):
        check_threads(33)
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert check_threads(8) == 8


@given(st.integers())
def test_whole_numbers_stay_what_they_are(number):
    assert whole_number("number", number, -(10**99), 10**99) == number
