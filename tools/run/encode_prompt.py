"""`fkv encode-prompt`: text to a file that the torch-free runtime loads."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import category

import numpy as np

from forcing_kv.export.request.flags import File, Json, PositiveInt, Threads, flags
from forcing_kv.runtime_trt.bundle.atomic.locks import claimed
from forcing_kv.runtime_trt.bundle.hashes import open_regular
from forcing_kv.runtime_trt.bundle.prompt_file import PromptFile, write_prompts
from forcing_kv.runtime_trt.console import print_json, talk, track
from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.runtime_trt.errors import InputError, shown
from forcing_kv.tools.digits import text as digits
from forcing_kv.tools.run.video import check_output

MAX_NBYTES = 16 << 20
"""Longest file of prompts that is read."""
MAX_PROMPT_LENGTH = 1 << 16
"""Characters of a prompt: text encoders take 512 tokens."""


@flags()
@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """Which text encoder, and how it is run."""

    text_encoder: str = "digits"
    """Folder of the text encoder (Wan2.1's own, or diffusers' layout), or digits."""
    text_len: PositiveInt = 512
    """Rows of an embedding."""
    truncate: bool = False
    """Cut prompts that are too long."""
    dtype: DType = "bfloat16"
    """What the encoder computes in."""
    device: str = "cpu"
    """PyTorch device."""
    num_threads: Threads = 0
    """CPU threads; 0: automatic."""


def encode_prompt(
    *prompt: str,
    out: File,
    prompts: Path | None = None,
    encoder: EncoderOptions = EncoderOptions(),
    force: bool = False,
    as_json: Json = False,
) -> None:
    """Encode prompts once, for machines that have no text encoder.

    Args:
        prompt: Prompts, each in quotes.
        out: File to write, .safetensors.
        prompts: Text file, a prompt a line.
        encoder: which encoder.
        force: Replace an earlier file.
        as_json: Print what was written.
    """
    texts = [*prompt, *(read_lines(prompts) if prompts else [])]
    if not texts:
        raise InputError("no prompt is given; name some, or a file of them with --prompts")
    check_output(out, [".safetensors"], force=force)
    with claimed(out):
        content = encode_texts(texts, encoder)
        write_prompts(out, content, force=force)
    shape = list(content.embeds.shape)
    talk(f"wrote {out}: {len(texts)} prompts, embeddings {shape[1]}x{shape[2]} float32")
    if as_json:
        print_json({
            "out": out, "prompts": texts, "shape": shape, "text_encoder": content.text_encoder
        })  # fmt: skip


def encode_texts(texts: Sequence[str], encoder: EncoderOptions) -> PromptFile:
    """Encode prompts with the encoder in a folder, or with the shipped model's word table.

    Raises:
        InputError: see `check_prompt`; or the encoder does not load, or cannot take a prompt.
    """
    for text in texts:
        check_prompt(text)
    if encoder.text_encoder == "digits":
        embeds = np.stack([digits.encode_prompt(text) for text in texts])
        return PromptFile(tuple(texts), embeds, "digits")
    import torch

    from forcing_kv.export.text import TextEncoder

    if encoder.num_threads:
        torch.set_num_threads(encoder.num_threads)
    talk(f"loading the text encoder from {encoder.text_encoder}")
    folder = Path(encoder.text_encoder)
    model = TextEncoder(folder, encoder.text_len, encoder.dtype, encoder.device)
    rows = [
        model.encode(text, truncate=encoder.truncate) for text in track(texts, "encoding prompts")
    ]
    return PromptFile(tuple(texts), np.stack(rows), "umt5-xxl")


def check_prompt(text: str) -> None:
    """Refuse a prompt that is no text.

    Raises:
        InputError: control characters, bytes that were no UTF-8, or longer than any prompt.
    """
    if len(text) > MAX_PROMPT_LENGTH:
        raise InputError(
            f"prompt {shown(text)} has {len(text)} characters; give at most {MAX_PROMPT_LENGTH}"
        )
    for place, character in enumerate(text):
        wrong = category(character) == "Cs" or (
            category(character) == "Cc" and not character.isspace()
        )
        if wrong:
            raise InputError(
                f"prompt {shown(text)} holds U+{ord(character):04X} at character {place + 1}, "
                "which is no text; save the file as UTF-8, or leave it out"
            )


def read_lines(path: Path) -> list[str]:
    """Non-empty lines of a text file, ended by newlines alone, with CR before them or not.

    A byte-order mark is left out, also within the file, where joining files leaves them.

    Raises:
        InputError: missing, not UTF-8, longer than any such file, or empty.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MAX_NBYTES + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error
    if len(content) > MAX_NBYTES:
        raise InputError(f"{path}: longer than {MAX_NBYTES >> 20} MB, so no file of prompts")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        line = content.count(b"\n", 0, error.start) + 1
        what = "is UTF-16" if utf16 else f"line {line} is not UTF-8 ({error.reason})"
        raise InputError(f"{path}: cannot be read as text: {what}; save it as UTF-8") from error
    # `splitlines` would also split at VT, FF, NEL, U+2028 and U+2029, which prompts hold.
    lines = [line.strip().lstrip("\ufeff").lstrip() for line in text.split("\n")]
    lines = [line for line in lines if line]
    if not lines:
        raise InputError(f"{path}: holds no prompt; write one a line")
    return lines
