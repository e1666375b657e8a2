"""UMT5 prompt embeddings as Wan2.1 makes them: cleaned text, 512 rows, padding rows zero."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forcing_kv.export.checkpoint.files import read_tensor_file
from forcing_kv.runtime_trt.dtypes import COMPUTE_DTYPES
from forcing_kv.runtime_trt.errors import InputError, require

ORIGINAL_WEIGHTS = "models_t5_umt5-xxl-enc-*.*"
"""File of the official Wan2.1 folder, beside `google/umt5-xxl` with the tokenizer."""

# wan/modules/t5.py of Wan2.1 -> transformers' UMT5EncoderModel.
_BLOCK_NAMES = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.weight")


def clean_prompt(prompt: str) -> str:
    """Clean a prompt as Wan2.1's tokenizer does: mojibake, HTML entities, white space."""
    fixed = require("ftfy").fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(fixed)).strip()).strip()


class TextEncoder:
    """A UMT5 encoder with its tokenizer.

    Args:
        folder: an official Wan2.1 folder (`models_t5_umt5-xxl-enc-bf16.pth` and
            `google/umt5-xxl`), or one in diffusers' layout (`text_encoder` and `tokenizer`).
        text_len: rows of an embedding.
        dtype: compute dtype; Wan2.1 runs the encoder in bfloat16.

    Raises:
        InputError: the folder has neither layout, or its files do not load.
    """

    def __init__(
        self,
        folder: Path,
        text_len: int = 512,
        dtype: str = "bfloat16",
        device: str = "cpu",
    ) -> None:
        if dtype not in COMPUTE_DTYPES:
            raise InputError(f"dtype is {dtype!r}; give float32, float16 or bfloat16")
        self.text_len = text_len
        self._device = torch.device(device)
        compute: torch.dtype = getattr(torch, dtype)
        tokenizer, weights = _find(folder)
        transformers = require("transformers")
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(tokenizer), local_files_only=True
            )
            if weights.is_dir():
                loader = transformers.UMT5EncoderModel
                model = loader.from_pretrained(
                    str(weights), torch_dtype=compute, local_files_only=True
                )
            else:
                model = umt5_from_original(read_tensor_file(weights), compute, str(weights))
        except InputError:
            raise
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"{folder}: the text encoder does not load ({reason})") from error
        self._model: Any = model.to(self._device).eval().requires_grad_(False)

    @property
    def text_dim(self) -> int:
        return int(self._model.config.d_model)

    @torch.inference_mode()
    def encode(self, prompt: str, *, truncate: bool = False) -> NDArray[np.float32]:
        """Encode one prompt.

        Only the prompt's own tokens go through the encoder: padding is masked there and zeroed
        afterwards, so leaving it out changes nothing but the time.

        Args:
            truncate: cut a prompt that is too long, as Wan2.1 does, instead of refusing it.

        Returns:
            [text_len, text_dim] float32, padding rows zero.

        Raises:
            InputError: the prompt is empty or too long.
        """
        cleaned = clean_prompt(prompt)
        if not cleaned:
            raise InputError(f"prompt {prompt!r} is empty; say what to generate")
        ids: list[int] = self._tokenizer(cleaned, add_special_tokens=True)["input_ids"]
        if len(ids) > self.text_len and not truncate:
            raise InputError(
                f"the prompt has {len(ids)} tokens, the model takes {self.text_len}; shorten it, "
                f"or cut it with --truncate (it begins {cleaned[:40]!r})"
            )
        if len(ids) > self.text_len:
            ids = self._tokenizer(
                cleaned, add_special_tokens=True, truncation=True, max_length=self.text_len
            )["input_ids"]
        tokens = torch.tensor([ids], device=self._device)
        hidden: Tensor = self._model(tokens, attention_mask=torch.ones_like(tokens))[0][0]
        embeds = np.zeros((self.text_len, self.text_dim), np.float32)
        embeds[: len(ids)] = hidden.float().cpu().numpy()
        return embeds


def _find(folder: Path) -> tuple[Path, Path]:
    """Tokenizer folder and weights (a file, or a folder in transformers' layout)."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of the text encoder")
    original = sorted(folder.glob(ORIGINAL_WEIGHTS))
    tokenizer = folder / "google" / "umt5-xxl"
    if original and tokenizer.is_dir():
        return tokenizer, original[0]
    if (folder / "text_encoder").is_dir() and (folder / "tokenizer").is_dir():
        return folder / "tokenizer", folder / "text_encoder"
    raise InputError(
        f"{folder}: holds no text encoder; needed are {ORIGINAL_WEIGHTS} and google/umt5-xxl "
        "(Wan2.1), or text_encoder and tokenizer (diffusers)"
    )


def umt5_from_original(state: Mapping[str, Any], dtype: torch.dtype, where: str) -> Any:
    """A `UMT5EncoderModel` from the official encoder weights; its size is read off them.

    Args:
        state: tensors under the names of Wan2.1's `T5Encoder`.

    Raises:
        InputError: not the encoder's names.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        match = _BLOCK.fullmatch(name)
        if match and match[2] in _BLOCK_NAMES:
            renamed[f"encoder.block.{match[1]}.{_BLOCK_NAMES[match[2]]}.weight"] = value.to(dtype)
        elif name == "norm.weight":
            renamed["encoder.final_layer_norm.weight"] = value.to(dtype)
        elif name == "token_embedding.weight":
            renamed["shared.weight"] = value.to(dtype)
        else:
            raise InputError(f"{where}: {name} is no parameter of Wan2.1's UMT5 encoder")
    try:
        config = _umt5_config(renamed)
    except (KeyError, ValueError) as error:
        raise InputError(f"{where}: {error} is missing; give the UMT5 encoder's weights") from error
    with torch.device("meta"):
        model = require("transformers").UMT5EncoderModel(config)
    embedding = renamed["shared.weight"]
    aliases = [name for name in model.state_dict() if name.endswith("embed_tokens.weight")]
    renamed |= dict.fromkeys(aliases, embedding)
    missing, unknown = model.load_state_dict(renamed, strict=False, assign=True)
    if missing or unknown:
        raise InputError(f"{where}: not a whole UMT5 encoder ({[*missing, *unknown][:3]})")
    return model


def _umt5_config(renamed: Mapping[str, Tensor]) -> Any:
    """Size of an encoder, from its tensors."""
    first = "encoder.block.0.layer.0.SelfAttention"
    vocab_size, d_model = renamed["shared.weight"].shape
    num_buckets, num_heads = renamed[f"{first}.relative_attention_bias.weight"].shape
    return require("transformers").UMT5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=renamed[f"{first}.q.weight"].shape[0] // num_heads,
        d_ff=renamed["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        num_layers=1 + max(int(name.split(".")[2]) for name in renamed if ".block." in name),
        num_heads=num_heads,
        relative_attention_num_buckets=num_buckets,
        feed_forward_proj="gated-gelu",
    )
