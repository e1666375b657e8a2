"""Encoded prompts on disk: what the safetensors package writes and reads, and broken files."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from forcing_kv.runtime_trt.bundle.prompt_file import PromptFile, read_prompts, write_prompts
from forcing_kv.runtime_trt.errors import InputError


@pytest.fixture
def content() -> PromptFile:
    embeds = np.random.default_rng(0).standard_normal((2, 4, 3), np.float32)
    return PromptFile(("a cat", "ein Hund, läuft"), embeds, "umt5-xxl")


def test_written_file_reads_back_and_is_plain_safetensors(tmp_path, content):
    write_prompts(tmp_path / "p.safetensors", content)
    found = read_prompts(tmp_path / "p.safetensors")
    assert found.prompts == content.prompts
    assert found.text_encoder == "umt5-xxl"
    assert np.array_equal(found.embeds, content.embeds)
    with safe_open(tmp_path / "p.safetensors", "np") as file:
        assert np.array_equal(file.get_tensor("prompt_embeds"), content.embeds)
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_of_other_programs_are_read(tmp_path, dtype):
    embeds = torch.randn(4, 3).to(dtype)
    save_file({"prompt_embeds": embeds}, tmp_path / "p.safetensors")
    found = read_prompts(tmp_path / "p.safetensors")
    assert found.prompts == ("",)
    assert np.array_equal(found.embeds[0], embeds.float().numpy())


def test_broken_files_are_one_clear_error(tmp_path, content):
    path = tmp_path / "p.safetensors"
    with pytest.raises(InputError, match=r"cannot be read.*encode-prompt"):
        read_prompts(path)
    write_prompts(path, content)
    whole = path.read_bytes()
    for broken in (b"", b"text", whole[:-5], whole[:20], b"\xff" * 64):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="truncated"):
            read_prompts(path)
    save_file({"other": torch.zeros(2, 2)}, path)
    with pytest.raises(InputError, match="prompt_embeds"):
        read_prompts(path)
    save_file({"prompt_embeds": torch.full((2, 2), float("nan"))}, path)
    with pytest.raises(InputError, match="finite"):
        read_prompts(path)


def test_plain_arrays_are_read(tmp_path, content):
    np.save(tmp_path / "p.npy", content.embeds.astype(np.float64))
    found = read_prompts(tmp_path / "p.npy", (4, 3))
    assert found.prompts == ("", "")
    assert found.embeds.dtype == np.float32
    assert np.array_equal(found.embeds, content.embeds)
    np.savez(tmp_path / "p.npz", many=content.embeds, one=content.embeds[0])
    found = read_prompts(tmp_path / "p.npz")
    assert found.prompts == ("many[0]", "many[1]", "one")
    assert np.array_equal(found.embeds, content.embeds[[0, 1, 0]])


@pytest.mark.parametrize(
    ("array", "size", "message"),
    [
        (np.ones((4, 3), np.int32), None, r"int32 of shape \[4, 3\]; needed are finite floats"),
        (np.ones(3, np.float32), None, r"shape \[3\]; .* of shape \[text_len, text_dim\]"),
        (np.ones((0, 4, 3), np.float32), None, r"shape \[0, 4, 3\]"),
        (np.full((4, 3), np.inf, np.float32), None, "finite"),
        (np.ones((4, 3), np.float32), (4, 2), r"of shape \[4, 3\]; .* of shape \[4, 2\]"),
    ],
)
def test_arrays_that_are_no_prompts_are_refused(tmp_path, array, size, message):
    np.save(tmp_path / "p.npy", array)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / "p.npy", size)


def test_arrays_of_two_sizes_are_refused(tmp_path):
    np.savez(tmp_path / "p.npz", a=np.ones((4, 3), np.float32), b=np.ones((5, 3), np.float32))
    with pytest.raises(InputError, match="arrays of one size"):
        read_prompts(tmp_path / "p.npz")
    (tmp_path / "p.npz").write_bytes(b"text")
    with pytest.raises(InputError, match=r"cannot be read as encoded prompts in \.npy or \.npz"):
        read_prompts(tmp_path / "p.npz")


def test_runtime_reads_it_without_torch_or_safetensors(tmp_path, content, run_blocked):
    write_prompts(tmp_path / "p.safetensors", content)
    done = run_blocked(
        "from pathlib import Path\n"
        "from forcing_kv.runtime_trt.bundle.prompt_file import read_prompts\n"
        f"print(read_prompts(Path({str(tmp_path / 'p.safetensors')!r})).embeds.shape)"
    )
    assert done.stdout == "(2, 4, 3)\n", done.stderr
