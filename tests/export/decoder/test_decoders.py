"""Video decoders a latent frame at a time: equal to the whole clip, from any file."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from stand_ins import decode_clip, vae_original_name

from forcing_kv.export.decoder.tae import TinyDecoder, tiny_decoder
from forcing_kv.export.decoder.vae import wan_decoder
from forcing_kv.runtime_trt.errors import InputError

SIZE = (4, 6)


@pytest.fixture(scope="module")
def vae():
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=4, z_dim=16).eval()


@pytest.fixture(scope="module")
def latents():
    return torch.randn(6, 16, *SIZE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def decode_whole(vae, latents):
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    pixels = vae.decode(latents.transpose(0, 1)[None] * std + mean).sample
    return (pixels[0].transpose(0, 1) + 1) / 2


@pytest.mark.parametrize("layout", ["vae folder", "pipeline folder", "Wan2.1_VAE.pth"])
def test_streaming_equals_decoding_the_whole_clip(vae, latents, tmp_path, layout):
    if layout == "Wan2.1_VAE.pth":
        state = {vae_original_name(name): value for name, value in vae.state_dict().items()}
        torch.save(state, tmp_path / layout)
        path = tmp_path / layout
    else:
        vae.save_pretrained(tmp_path / "vae")
        path = tmp_path if layout == "pipeline folder" else tmp_path / "vae"
    source = wan_decoder(path, SIZE)
    with torch.no_grad():
        found = decode_clip(source, latents)
    assert found.shape == (21, 3, 32, 48)  # 1 + 5 * 4: the first latent frame makes one
    torch.testing.assert_close(found, decode_whole(vae, latents), rtol=0, atol=1e-6)


def tiny_file(path, latent_channels=16, widths=(12, 8, 6, 6)):
    torch.manual_seed(2)
    model = TinyDecoder(latent_channels, widths)
    state = model.state_dict() | {"encoder.0.weight": torch.zeros(1)}
    torch.save(state, path) if path.suffix == ".pth" else save_file(state, path)
    return model


@torch.no_grad()
def decode_tiny_whole(model, latents):
    """TAEHV over all frames at once: every block's past is the clip shifted by one frame."""
    x = torch.tanh(latents / 3) * 3
    for i, layer in enumerate(model.decoder):
        if 3 <= i <= 17 and hasattr(layer, "conv") and isinstance(layer.conv, torch.nn.Sequential):
            past = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1]
            x = F.relu(layer.conv(torch.cat([x, past], 1)) + x)
        elif i:
            x = layer(x)
    return x.clamp(0, 1)[3:]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_tiny_decoder_streams_what_it_decodes_at_once(latents, tmp_path, suffix):
    path = tmp_path / f"taew2_1{suffix}"
    model = tiny_file(path)
    source = tiny_decoder(path, SIZE)
    with torch.no_grad():
        found = decode_clip(source, latents)
    assert found.shape == (21, 3, 32, 48)
    torch.testing.assert_close(found, decode_tiny_whole(model, latents), rtol=0, atol=1e-6)


def test_tiny_file_with_more_growth_keeps_the_last_frames(tmp_path):
    """Files serve decoders with less temporal growth: the wanted frames are the last ones."""
    path = tmp_path / "taew2_1.pth"
    model = tiny_file(path)
    state = torch.load(path, weights_only=True)
    kept = state["decoder.7.conv.weight"]
    state["decoder.7.conv.weight"] = torch.cat([torch.full_like(kept, 9.0), kept])
    torch.save(state, path)
    loaded = tiny_decoder(path, SIZE).decode
    assert torch.equal(loaded.get_parameter("decoder.7.conv.weight"),
                       model.get_parameter("decoder.7.conv.weight"))  # fmt: skip


def test_other_files_are_refused(vae, tmp_path):
    save_file({"blocks.0.weight": torch.zeros(1)}, tmp_path / "denoiser.safetensors")
    with pytest.raises(InputError, match=r"not a Wan2\.1 VAE"):
        wan_decoder(tmp_path / "denoiser.safetensors", SIZE)
    with pytest.raises(InputError, match="not a TAEHV file"):
        tiny_decoder(tmp_path / "denoiser.safetensors", SIZE)
    with pytest.raises(InputError, match="no such file"):
        wan_decoder(tmp_path / "nothing.pth", SIZE)
    with pytest.raises(InputError, match=r"config\.json: no such VAE config"):
        wan_decoder(tmp_path, SIZE)
    state = {vae_original_name(name): value for name, value in vae.state_dict().items()}
    del state["decoder.upsamples.3.time_conv.bias"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(InputError, match=r"time_conv\.bias"):
        wan_decoder(tmp_path / "cut.pth", SIZE)
    type(vae)(base_dim=4, z_dim=16, patch_size=2, in_channels=12, out_channels=12
                     ).save_pretrained(tmp_path / "vae")  # fmt: skip
    with pytest.raises(InputError, match=r"Wan2\.2"):
        wan_decoder(tmp_path, SIZE)
