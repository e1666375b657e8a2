"""`fkv encode-prompt`: text to a file that the torch-free runtime loads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from forcing_kv.runtime_trt.console import print_json, talk, track
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.prompt_file import PromptFile, write_prompts
from forcing_kv.tools.digits import text as digits


def encode_prompt(
    out: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, a prompt a line.")] = None,
    text_encoder: Annotated[
        str,
        typer.Option(
            help="Folder of the text encoder (Wan2.1's own, or diffusers' layout), or digits."
        ),
    ] = "digits",
    text_len: Annotated[int, typer.Option(min=1, help="Rows of an embedding.")] = 512,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut prompts that are too long.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="PyTorch device.")] = "cpu",
    num_threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: automatic.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written.")] = False,
) -> None:
    """Encode prompts once, for machines that have no text encoder."""
    texts = [*(prompt or []), *(read_lines(prompts) if prompts else [])]
    if not texts:
        raise InputError("no prompt is given; name some, or a file of them with --prompts")
    check_file(out, ".safetensors", force=force)
    content = encode_texts(
        texts, text_encoder, text_len, truncate=truncate, dtype=dtype, device=device,
        num_threads=num_threads,
    )  # fmt: skip
    write_prompts(out, content)
    shape = list(content.embeds.shape)
    talk(f"wrote {out}: {len(texts)} prompts, embeddings {shape[1]}x{shape[2]} float32")
    if as_json:
        print_json({
            "out": out, "prompts": texts, "shape": shape, "text_encoder": content.text_encoder
        })  # fmt: skip


def encode_texts(
    texts: list[str],
    text_encoder: str,
    text_len: int = 512,
    *,
    truncate: bool = False,
    dtype: str = "bfloat16",
    device: str = "cpu",
    num_threads: int = 0,
) -> PromptFile:
    """Encode prompts with the encoder in a folder, or with the shipped model's word table."""
    if text_encoder == "digits":
        embeds = np.stack([digits.encode_prompt(text) for text in texts])
        return PromptFile(tuple(texts), embeds, "digits")
    import torch

    from forcing_kv.export.text import TextEncoder

    if num_threads:
        torch.set_num_threads(num_threads)
    talk(f"loading the text encoder from {text_encoder}")
    encoder = TextEncoder(Path(text_encoder), text_len, dtype, device)
    rows = [encoder.encode(text, truncate=truncate) for text in track(texts, "encoding prompts")]
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


def check_file(path: Path, suffix: str, *, force: bool) -> None:
    """Refuse an output file that is in the way or cannot be written.

    Raises:
        InputError: what is wrong.
    """
    if path.suffix != suffix:
        raise InputError(f"{path}: suffix {path.suffix!r}; give {suffix}")
    if not path.parent.is_dir():
        raise InputError(f"{path}: folder {path.parent} does not exist; make it first")
    if path.exists() and not force:
        raise InputError(f"{path}: exists already; choose another path or give --force")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: cannot be written; choose another path")
