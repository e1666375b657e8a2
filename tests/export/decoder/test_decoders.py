"""Video decoders a latent frame at a time: equal to the whole clip, from any file."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from stand_ins import decode_clip, tiny_decoder_files, vae_original_name

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


@pytest.fixture
def files(tmp_path):
    """A folder of the VAE and a file of the tiny decoder, which may be changed."""
    return tiny_decoder_files(tmp_path, 4)


def change_weights(vae, change):
    file = vae / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


CONV = "decoder.conv_in.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop(CONV), rf"such as {CONV} \(the first is missing"),
        (lambda w: w.pop("encoder.conv_in.bias"), r"encoder\.conv_in\.bias"),
        (lambda w: w.update(extra=torch.ones(1)), r"such as extra \(.* needed is unknown"),
        (lambda w: w.update({CONV: w[CONV][:-1].clone()}), r"such as decoder\.conv_in\.weight"),
        (lambda w: w.update({CONV: w[CONV].int()}), r"no plain floats, .*weight \(int32\)"),
        (lambda w: w.clear(), "holds no tensors"),
    ],
    ids=["incomplete", "no encoder", "extra", "mis-shaped", "integers", "empty"],
)
def test_a_vae_is_exactly_its_config(files, change, told):
    """Nothing is filled in with random weights."""
    change_weights(files[0], change)
    with pytest.raises(InputError, match=told):
        wan_decoder(files[0], SIZE)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"latents_mean": [0.0]}, "latents_mean has 1 entries; z_dim needs 4"),
        ({"latents_std": [1.0] * 5}, "latents_std has 5 entries; z_dim needs 4"),
        ({"latents_std": [1.0, 1.0, 0.0, 1.0]}, "all must be positive"),
        ({"latents_mean": [0, 0, 0, "1"]}, "must be a number"),
        ({"z_dim": 5}, "z_dim needs 5"),
        ({"z_dim": -1}, "widths must be from 1"),
        ({"base_dim": 8}, "not the weights of this decoder"),
        ({"base_dim": 2**40}, "widths must be from 1 to 65536"),
        ({"num_res_blocks": 10**9}, "num_res_blocks is 1000000000"),
        ({"temperal_downsample": []}, "dim_mult needs 1"),
        ({"out_channels": 12}, "only 3"),
        ({"is_residual": True}, r"Wan2\.2"),
        ({"latent_channels": 4}, r"unknown keys \['latent_channels'\]; allowed are"),
        ({"_class_name": "AutoencoderKL"}, "describes 'AutoencoderKL', not AutoencoderKLWan"),
        ({"_class_name": {}}, "not AutoencoderKLWan"),
    ],
    ids=str,
)
def test_a_wrong_config_names_the_entry_and_the_file(files, change, told):
    path = files[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=told) as caught:
        wan_decoder(files[0], SIZE)
    assert str(files[0]) in str(caught.value)


def change_tiny(path, change):
    weights = torch.load(path, weights_only=True)
    change(weights)
    torch.save(weights, path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("decoder.3.conv.0.weight"), r"decoder\.3\.conv\.0\.weight"),
        (lambda w: w.update({"decoder.1.bias": w["decoder.1.bias"].long()}), r"bias \(int64\)"),
        (lambda w: w.update({"decoder.1.weight": torch.ones(())}), "another model"),
        (lambda w: w.update({"decoder.14.weight": torch.ones(0, 1, 1, 1)}), "another model"),
        (lambda w: w.update({"decoder.7.conv.weight": torch.ones(())}), r"7\.conv\.weight"),
        (lambda w: w.update({"decoder.19.conv.weight": torch.ones(9, 4, 1, 1)}), "19"),
        (lambda w: w.update(other=torch.ones(1)), "such as other"),
        (lambda w: w.update(other=1), "entry 'other' is a int, not a tensor"),
    ],
    ids=["missing", "integers", "scalar", "no rows", "scalar growth", "growth", "extra", "int"],
)
def test_a_tiny_decoder_is_exactly_its_weights(files, change, told):
    change_tiny(files[1], change)
    with pytest.raises(InputError, match=told):
        tiny_decoder(files[1], SIZE)


def spoil(files, value):
    """Both decoders with one value changed; how each is loaded, and its tensor."""
    change_weights(files[0], lambda w: w[CONV].flatten()[:1].fill_(value))
    change_tiny(files[1], lambda w: w["decoder.1.weight"].flatten()[:1].fill_(value))
    return (wan_decoder, files[0], CONV), (tiny_decoder, files[1], "decoder.1.weight")


@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [
        (float("nan"), "float32", "holds 1 NaN or infinite values of .* in the file"),
        (-float("inf"), "bfloat16", "in the file"),
        (1e6, "float16", r"as float16, which ends at 65504, for they reach 1e\+06"),
    ],
)
def test_weights_that_are_not_finite_are_named_before_anything_is_written(
    files, value, dtype, told
):
    for load, path, name in spoil(files, value):
        source = load(path, SIZE, dtype)
        with pytest.raises(InputError, match=told) as caught:
            source.check(4, allow_non_finite=False)
        assert str(path) in str(caught.value)
        assert name in str(caught.value)
        source.check(4, allow_non_finite=True)


def test_a_vae_whose_unused_encoder_is_damaged_is_refused(files):
    change_weights(files[0], lambda w: w["encoder.conv_in.bias"].fill_(float("nan")))
    with pytest.raises(InputError, match=r"encoder\.conv_in\.bias"):
        wan_decoder(files[0], SIZE).check(4, allow_non_finite=False)


def test_means_that_float32_cannot_hold_are_named(files):
    path = files[0] / "config.json"
    entries = json.loads(path.read_text()) | {"latents_mean": [0.0, 1e39, 0.0, 0.0]}
    path.write_text(json.dumps(entries))
    with pytest.raises(InputError, match="latents_mean holds 1 NaN or infinite values of 4"):
        wan_decoder(files[0], SIZE).check(4, allow_non_finite=False)


def test_a_decoder_of_other_latents_is_refused(files):
    for load, path in zip((wan_decoder, tiny_decoder), files, strict=True):
        with pytest.raises(InputError, match="latents of 4 channels, but this bundle's have 16"):
            load(path, SIZE).check(16, allow_non_finite=False)
