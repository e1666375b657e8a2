"""`fkv encode-prompt`: text to a file that the torch-free runtime loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from forcing_kv.export.request.flags import File, Json, Natural, PositiveInt, flags
from forcing_kv.runtime_trt.bundle.atomic.locks import claimed
from forcing_kv.runtime_trt.bundle.prompt_file import PromptFile, write_prompts
from forcing_kv.runtime_trt.console import print_json, talk, track
from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.tools.digits import text as digits
from forcing_kv.tools.run.video import check_output


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
    num_threads: Natural = 0
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
    """Encode prompts with the encoder in a folder, or with the shipped model's word table."""
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


def read_lines(path: Path) -> list[str]:
    """Non-empty lines of a text file.

    Raises:
        InputError: missing, not UTF-8, or empty.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error
    lines = [line for line in lines if line]
    if not lines:
        raise InputError(f"{path}: holds no prompt; write one a line")
    return lines
