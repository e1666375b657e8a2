"""Tiny random models written in the exact file formats of the real ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from forcing_kv.export import text
from forcing_kv.export.checkpoint.names import OFFICIAL_OF_MODULE
from forcing_kv.export.decoder.add import DecoderSource
from forcing_kv.export.decoder.tae import TinyDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "runs", "on", "grass"]


def tiny_umt5() -> UMT5EncoderModel:
    """A UMT5 encoder of width 16."""
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3,
        relative_attention_num_buckets=8, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = UMT5EncoderModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of a few words that ends every text with `</s>`, as UMT5's does."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def umt5_original(encoder: UMT5EncoderModel) -> dict[str, torch.Tensor]:
    """The encoder under the names of Wan2.1's own file."""
    theirs = {new: old for old, new in text._BLOCK_NAMES.items()}
    renamed = {}
    for name, value in encoder.state_dict().items():
        parts = name.split(".")
        if "block" in parts:
            rest = ".".join(parts[3:-1])
            renamed[f"blocks.{parts[2]}.{theirs[rest]}.weight"] = value
    renamed["token_embedding.weight"] = encoder.state_dict()["shared.weight"]
    renamed["norm.weight"] = encoder.state_dict()["encoder.final_layer_norm.weight"]
    return renamed


def write_wan_text_encoder(folder: Path) -> None:
    """Encoder and tokenizer as the official Wan2.1 folder has them."""
    tiny_tokenizer().save_pretrained(folder / "google" / "umt5-xxl")
    torch.save(umt5_original(tiny_umt5()), folder / "models_t5_umt5-xxl-enc-bf16.pth")


def vae_original_name(name: str) -> str:
    """The name in Wan2.1_VAE.pth of a parameter of diffusers' `AutoencoderKLWan`."""
    name = re.sub(r"^quant_conv", "conv1", re.sub(r"^post_quant_conv", "conv2", name))
    for resnet, place in ((0, 0), (1, 2)):
        name = name.replace(f"mid_block.resnets.{resnet}", f"middle.{place}")
    name = name.replace("mid_block.attentions.0", "middle.1").replace("conv_in", "conv1")
    name = name.replace("norm_out", "head.0").replace("conv_out", "head.2")
    name = name.replace("down_blocks", "downsamples")
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)",
                  lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", name)  # fmt: skip
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0",
                  lambda m: f"upsamples.{4 * int(m[1]) + 3}", name)  # fmt: skip
    for ours, theirs in (("norm1", 0), ("conv1", 2), ("norm2", 3), ("conv2", 6)):
        name = re.sub(rf"((?:middle|samples)\.\d+)\.{ours}\.", rf"\1.residual.{theirs}.", name)
    return name.replace("conv_shortcut", "shortcut")


def tiny_decoder_files(folder: Path, channels: int = 16) -> tuple[Path, Path]:
    """Files of both decoders with random weights, the VAE with two levels less."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae, tae = folder / "vae", folder / "taew2_1.pth"
    scales = torch.linspace(0.5, 1.5, channels)
    AutoencoderKLWan(
        base_dim=4, z_dim=channels, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=(scales - 1).tolist(), latents_std=scales.tolist(),
    ).save_pretrained(vae)  # fmt: skip
    torch.save(TinyDecoder(channels, (8, 6, 4, 4)).state_dict(), tae)
    return vae, tae


def prefixed(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The same tensors with something in front of every name."""
    return {prefix + name: value for name, value in weights.items()}


def fsdp_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as EMA_FSDP of Self Forcing keeps them: shards and checkpointed blocks show."""
    inner = "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module."
    renamed = {name.replace("blocks.0.", inner): value for name, value in weights.items()}
    return prefixed(renamed, "model._fsdp_wrapped_module.")


def peft_file(
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]], adapter: str = ""
) -> dict[str, torch.Tensor]:
    """What peft's get_peft_model_state_dict returns for {layer: (A, B)}."""
    pairs = {}
    for layer, (down, up) in factors.items():
        pairs[f"base_model.model.{layer}.lora_A.{adapter}weight"] = down
        pairs[f"base_model.model.{layer}.lora_B.{adapter}weight"] = up
    return pairs


def write_sharded(folder: Path, tensors: dict[str, torch.Tensor], stem: str) -> Path:
    """Two shards and their index, as transformers and diffusers write them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i, half in enumerate((names[::2], names[1::2])):
        file = f"{stem}-{i + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, folder / file)
        weight_map |= dict.fromkeys(half, file)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


def diffusers_name(name: str) -> str:
    """Diffusers' name of an official parameter of the denoiser."""
    modules = {official: theirs for theirs, official in OFFICIAL_OF_MODULE.items()}
    match = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    block, rest = match.groups() if match else ("", name)
    if rest in ("modulation", "head.modulation"):
        return f"{block}scale_shift_table"
    module, _, kind = rest.rpartition(".")
    return f"{block}{modules[module]}.{kind}"


def decode_clip(source: DecoderSource, latents: torch.Tensor) -> torch.Tensor:
    """Decode a clip [F, C, h, w] in torch as a decoder does; frames [F', 3, H, W] in 0..1."""
    state, frames = source.new_state(), []
    for i, latent in enumerate(latents.split(1)):
        if i == 0 and source.decode_first is not None:
            out, begun = source.decode_first(latent)
            for place, value in zip(source.first_states, begun, strict=True):
                state[place] = value
        else:
            out, state = source.decode(latent, state)
        frames.append(out)
    return torch.cat(frames)[source.num_trimmed_frames :].clamp(0, 1)
