"""Files of encoded prompts: safetensors, read and written with numpy alone.

Layout: an unsigned 64-bit little-endian header length, a JSON header, the raw tensors. The one
tensor is `prompt_embeds` [prompts, text_len, text_dim]; the metadata holds the texts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.files import replaced_file

Float32 = NDArray[np.float32]

TENSOR = "prompt_embeds"
FORMAT = "forcing_kv.prompts"
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_MAX_HEADER_NBYTES = 1 << 20


@dataclass(frozen=True)
class PromptFile:
    """Encoded prompts and what they were."""

    prompts: tuple[str, ...]
    """The texts; empty strings where the file does not hold them."""
    embeds: Float32
    """[prompts, text_len, text_dim], padding rows zero."""
    text_encoder: str = ""
    """Kind of encoder that made them, such as umt5-xxl."""


def write_prompts(path: Path, content: PromptFile) -> None:
    """Write encoded prompts, whole or not at all.

    Args:
        path: `.safetensors` file; replaced if it exists.
        content: what to write, as float32.
    """
    embeds = np.ascontiguousarray(content.embeds, "<f4")
    metadata = {
        "format": FORMAT,
        "prompts": json.dumps(list(content.prompts)),
        "text_encoder": content.text_encoder,
    }
    tensor = {"dtype": "F32", "shape": list(embeds.shape), "data_offsets": [0, embeds.nbytes]}
    header = json.dumps({"__metadata__": metadata, TENSOR: tensor}).encode()
    header += b" " * (-len(header) % 8)
    with replaced_file(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(embeds.tobytes())


def read_prompts(path: Path) -> PromptFile:
    """Read encoded prompts: this project's files, or any safetensors file with `prompt_embeds`.

    Args:
        path: `.safetensors` file; the tensor may be float32, float16 or bfloat16.

    Raises:
        InputError: missing, truncated, malformed, of another dtype or rank, or not finite.
    """
    remedy = "encode the prompt again with `fkv encode-prompt`"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    try:
        header, data = _split(content)
        tensor = header[TENSOR]
        begin, end = tensor["data_offsets"]
        stored = np.frombuffer(data[begin:end], np.dtype(_DTYPES[tensor["dtype"]]))
        array = stored.reshape(tensor["shape"])
        metadata: Mapping[str, Any] = header.get("__metadata__", {})
        texts = json.loads(metadata.get("prompts", "[]"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not a file of encoded prompts, or truncated ({error!r}); {remedy}"
        ) from error
    if tensor["dtype"] == "BF16":
        array = (array.astype("<u4") << 16).view("<f4")
    embeds = array.astype(np.float32)
    embeds = embeds[None] if embeds.ndim == 2 else embeds
    if embeds.ndim != 3 or len(embeds) == 0 or not np.isfinite(embeds).all():
        raise InputError(
            f"{path}: {TENSOR} has shape {list(array.shape)}; needed are finite numbers of shape "
            f"[prompts, text_len, text_dim]; {remedy}"
        )
    prompts = tuple(str(text) for text in texts) or ("",) * len(embeds)
    if len(prompts) != len(embeds):
        raise InputError(f"{path}: {len(embeds)} embeddings but {len(prompts)} texts; {remedy}")
    return PromptFile(prompts, embeds, metadata.get("text_encoder", ""))


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    if not 2 <= length <= min(_MAX_HEADER_NBYTES, len(content) - 8):
        raise ValueError("no safetensors header")
    header = json.loads(content[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    return header, content[8 + length :]
