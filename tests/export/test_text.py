"""UMT5 prompt embeddings: cleaning, padding, both folder layouts, on a tiny random encoder."""

import json

import numpy as np
import pytest
import torch
from command_line import fkv
from stand_ins import tiny_tokenizer, tiny_umt5, umt5_original, write_wan_text_encoder

from forcing_kv.export import text
from forcing_kv.export.text import TextEncoder, clean_prompt
from forcing_kv.runtime_trt.bundle.prompt_file import read_prompts
from forcing_kv.runtime_trt.errors import InputError

TEXT_LEN = 12


@pytest.fixture(scope="module")
def encoder():
    return tiny_umt5()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folders(encoder, tokenizer, tmp_path_factory):
    """The same encoder as diffusers and as Wan2.1 lay it out."""
    root = tmp_path_factory.mktemp("text")
    encoder.save_pretrained(root / "diffusers" / "text_encoder")
    tokenizer.save_pretrained(root / "diffusers" / "tokenizer")
    write_wan_text_encoder(root / "original")
    return root


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_embeddings_equal_those_of_the_padded_batch(folders, encoder, tokenizer, layout):
    """Wan2.1 pads to text_len, masks, and zeroes what follows the last token."""
    found = TextEncoder(folders / layout, TEXT_LEN, "float32").encode("A cat  runs\non grass")
    batch = tokenizer(
        "a cat runs on grass", padding="max_length", max_length=TEXT_LEN, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = encoder(batch["input_ids"], attention_mask=batch["attention_mask"])[0][0]
    assert found.shape == (TEXT_LEN, 16)
    np.testing.assert_allclose(found[:6], hidden[:6].numpy(), atol=2e-6)
    assert not found[6:].any()
    assert found[:6].any(axis=1).all()


def test_cleaning_is_wans():
    assert clean_prompt("  a&amp;amp;b \t\n c&lt;d ") == "a&b c<d"
    assert clean_prompt("cafÃ©") == "café"


def test_too_long_and_empty_prompts(folders):
    encoder = TextEncoder(folders / "diffusers", 4, "float32")
    with pytest.raises(InputError, match=r"has 6 tokens, the model takes 4.*--truncate"):
        encoder.encode("a cat runs on grass")
    cut = encoder.encode("a cat runs on grass", truncate=True)
    np.testing.assert_array_equal(cut, encoder.encode("a cat runs"))
    with pytest.raises(InputError, match="empty"):
        encoder.encode(" \n ")


def test_folders_without_an_encoder_are_refused(folders, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        TextEncoder(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no text encoder"):
        TextEncoder(tmp_path)
    with pytest.raises(InputError, match="dtype"):
        TextEncoder(folders / "original", dtype="int8")
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    (tmp_path / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"cut off")
    with pytest.raises(InputError, match=r"truncated|does not load"):
        TextEncoder(tmp_path)


def test_weights_of_something_else_are_refused(encoder):
    state = umt5_original(encoder)
    with pytest.raises(InputError, match=r"blocks\.0\.self_attn"):
        text.umt5_from_original({"blocks.0.self_attn.q.weight": state["norm.weight"]},
                                torch.float32, "denoiser.pt")  # fmt: skip
    del state["blocks.1.ffn.fc1.weight"]
    with pytest.raises(InputError, match="not a whole UMT5 encoder"):
        text.umt5_from_original(state, torch.float32, "encoder.pth")


def test_encode_prompt_writes_a_file(folders, tmp_path):
    (tmp_path / "more.txt").write_text("a cat\n\na cat runs\n")
    options = ["encode-prompt", "grass", "--prompts", tmp_path / "more.txt", "--text-encoder",
               folders / "original", "--text-len", TEXT_LEN, "--out", tmp_path / "p.safetensors",
               "--json"]  # fmt: skip
    done = fkv(*options)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["shape"] == [3, TEXT_LEN, 16]
    found = read_prompts(tmp_path / "p.safetensors")
    assert found.prompts == ("grass", "a cat", "a cat runs")
    with pytest.raises(InputError, match="exists already"):
        fkv(*options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "p.safetensors"], "no prompt is given"),
        (["a cat", "--out", "p.npz"], "give .safetensors"),
        (["a cat", "--out", "no/p.safetensors"], "is no folder; make it first"),
        (["--prompts", "none.txt", "--out", "p.safetensors"], "cannot be read"),
        (["a cat", "--out", "p.safetensors"], "unknown words"),
        (["a cat", "--text-encoder", "none", "--out", "p.safetensors"], "no such folder"),
    ],
)
def test_mistakes_write_nothing(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        fkv("encode-prompt", *options)
    assert list(tmp_path.iterdir()) == []


def test_quantised_encoders_are_refused(encoder):
    state = umt5_original(encoder)
    state["blocks.0.attn.q.weight"] = state["blocks.0.attn.q.weight"].to(torch.int8)
    with pytest.raises(
        InputError, match=r"blocks\.0\.attn\.q\.weight is no tensor of real numbers"
    ):
        text.umt5_from_original(state, torch.float32, "encoder.pth")
