"""Weights in FP8 and GGUF give what their format says, to the bit; other formats are named."""

import json

import gguf
import pytest
import torch
from safetensors.torch import save_file
from stand_ins import diffusers_name, peft_file, prefixed, write_sharded

from forcing_kv.export.checkpoint.adapter.file import adapter_files
from forcing_kv.export.checkpoint.files import read_checkpoint
from forcing_kv.export.checkpoint.load import CheckpointSource, load_model
from forcing_kv.export.commands.export import BundleOutput, export
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.request.options import ExportRequest
from forcing_kv.export.request.request import resolve
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import ModelShape

SHAPE = ModelShape(1, 64, 96, 2, in_channels=4, text_len=6, text_dim=32, freq_dim=32)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {name: value.shape for name, value in CausalWanModel(SHAPE).state_dict().items()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def linears(weights):
    """Layers of the blocks that converters store in 8 bits."""
    names = [name for name, value in weights.items() if "blocks" in name and value.ndim == 2]
    return [name.removesuffix(".weight") for name in names if name.endswith(".weight")]


def scaled(weights, suffix, scale_of, dtype=E4M3):
    """A file in FP8 and the weights that it means; `scale_of` takes the largest magnitudes."""
    file, meant = dict(weights), dict(weights)
    for layer in linears(weights):
        weight = weights[f"{layer}.weight"]
        stored, whole = scale_of(weight)
        codes = (weight / whole).to(dtype)
        file |= {f"{layer}.weight": codes, f"{layer}.{suffix}": stored}
        meant[f"{layer}.weight"] = codes.float() * whole
    return file, meant


def per_tensor(weight):
    scale = weight.abs().max() / 448
    return scale, scale


def per_channel(weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    return scale, scale


def per_channel_flat(weight):
    return per_channel(weight)[0].flatten(), per_channel(weight)[1]


def per_block(weight):
    """musubi-tuner: blocks of 16 in a row, [out, blocks, 1]."""
    rows, columns = weight.shape
    scale = weight.reshape(rows, -1, 16).abs().amax(2, keepdim=True) / 448
    return scale, scale.expand(-1, -1, 16).reshape(rows, columns)


def per_square(weight):
    """DeepSeek: blocks of rows and columns."""
    scale = weight.reshape(weight.shape[0] // 32, 32, -1, 32).abs().amax((1, 3)) / 448
    return scale, scale.repeat_interleave(32, 0).repeat_interleave(32, 1)


def assert_loads(path, meant, **more):
    found = load_model(CheckpointSource(path, **more), SHAPE).state_dict()
    assert set(found) == set(meant)
    for name, value in meant.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value), name


CASES = {
    "comfyui": ("scale_weight", per_tensor, E4M3),
    "e5m2": ("scale_weight", per_tensor, E5M2),
    "lightx2v": ("weight_scale", per_channel, E4M3),
    "flat": ("weight_scale", per_channel_flat, E4M3),
    "musubi": ("scale_weight", per_block, E4M3),
    "deepseek": ("weight_scale_inv", per_square, E4M3),
}


@pytest.mark.parametrize("case", CASES)
def test_scales_are_taken_into_the_weights(case, tmp_path, weights):
    suffix, scale_of, dtype = CASES[case]
    file, meant = scaled(weights, suffix, scale_of, dtype)
    save_file({k: v.contiguous() for k, v in file.items()}, tmp_path / "w.safetensors")
    torch.save({"model": prefixed(file, "model.diffusion_model.")}, tmp_path / "w.pt")
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pt"):
        assert_loads(path, meant)
        form = read_checkpoint(path).form
        assert f"{len(linears(weights))} weights in {str(dtype).removeprefix('torch.')}" in form
        assert f"({suffix})" in form


def test_comfyui_files_with_everything_that_they_may_hold(tmp_path, weights):
    """Marker, activation scales and the newer descriptions of layers, under a prefix."""
    file, meant = scaled(weights, "scale_weight", per_tensor)
    described = torch.tensor([*b'{"format": "float8_e4m3fn"}'], dtype=torch.uint8)
    for layer in linears(weights):
        file |= {
            f"{layer}.scale_input": torch.tensor(3.0),
            f"{layer}.comfy_quant": described.clone(),
        }
    file["scaled_fp8"] = torch.zeros(2, dtype=E4M3)
    save_file(prefixed(file, "model.diffusion_model."), tmp_path / "w.safetensors")
    assert_loads(tmp_path / "w.safetensors", meant)
    form = read_checkpoint(tmp_path / "w.safetensors").form
    assert f"{len(linears(weights))} scales of activations are not used" in form


def test_musubis_second_scale(tmp_path, weights):
    file, meant = scaled(weights, "scale_weight", per_block)
    for layer in linears(weights):
        file[f"{layer}.scale_weight"] = file[f"{layer}.scale_weight"] * 4
        file[f"{layer}.scale_weight_tensor"] = torch.tensor(0.25)
    save_file({k: v.contiguous() for k, v in file.items()}, tmp_path / "w.safetensors")
    assert_loads(tmp_path / "w.safetensors", meant)


def test_deepseeks_last_block_may_be_shorter(tmp_path):
    """160 rows in blocks of 128 are two, the second of 32."""
    shape = ModelShape(1, 160, 96, 2, in_channels=4, text_len=6, text_dim=32, freq_dim=32)
    torch.manual_seed(0)
    state = {n: torch.randn(v.shape) for n, v in CausalWanModel(shape).state_dict().items()}
    name, scale = "blocks.0.self_attn.q.weight", torch.tensor([[0.5, 2.0], [4.0, 8.0]])
    codes = state[name].to(E4M3)
    file = state | {name: codes, "blocks.0.self_attn.q.weight_scale_inv": scale}
    save_file(file, tmp_path / "w.safetensors")
    found = load_model(tmp_path / "w.safetensors", shape).state_dict()[name]
    wanted = codes.float()
    wanted[:128, :128] *= 0.5
    wanted[:128, 128:] *= 2
    wanted[128:, :128] *= 4
    wanted[128:, 128:] *= 8
    assert torch.equal(found, wanted)


def test_adapters_and_overflows_of_computed_weights(tmp_path, weights):
    """An adapter is added to what the codes mean; a scale that overflows float16 is told."""
    file, meant = scaled(weights, "scale_weight", per_tensor)
    save_file(file, tmp_path / "w.safetensors")
    layer = linears(weights)[0]
    down, up = torch.randn(4, 64), torch.randn(64, 4)
    save_file(peft_file({layer: (down, up)}), tmp_path / "lora.safetensors")
    meant[f"{layer}.weight"] = meant[f"{layer}.weight"] + up @ down
    assert_loads(
        tmp_path / "w.safetensors", meant, adapters=adapter_files(tmp_path / "lora.safetensors")
    )
    save_file(file | {f"{layer}.scale_weight": torch.tensor(1e4)}, tmp_path / "w.safetensors")
    with pytest.raises(
        InputError, match=rf"tensor {layer}\.weight holds .* as float16, which ends"
    ):
        load_model(tmp_path / "w.safetensors", SHAPE, "float16")


def test_plain_fp8_diffusers_names_and_shards(tmp_path, weights):
    plain = {name: value.to(E4M3) for name, value in weights.items()}
    save_file(plain, tmp_path / "plain.safetensors")
    assert_loads(tmp_path / "plain.safetensors", {k: v.float() for k, v in plain.items()})
    assert "float8_e4m3fn without scales" in read_checkpoint(tmp_path / "plain.safetensors").form
    file, meant = scaled(weights, "weight_scale", per_tensor)
    layers = {layer: diffusers_name(f"{layer}.weight").removesuffix(".weight")
              for layer in linears(weights)}  # fmt: skip
    renamed = {}
    for name, value in file.items():
        layer, _, last = name.rpartition(".")
        renamed[f"{layers[layer]}.{last}" if layer in layers else diffusers_name(name)] = value
    index = write_sharded(tmp_path / "diffusers", renamed, "diffusion_pytorch_model")
    assert_loads(index, meant)


def test_quantised_weights_are_never_all_in_memory(tmp_path, weights):
    """Until a weight's turn comes it has no data."""
    file, _ = scaled(weights, "scale_weight", per_tensor)
    save_file(file, tmp_path / "w.safetensors")
    read = read_checkpoint(tmp_path / "w.safetensors")
    assert {name for name, value in read.tensors.items() if value.is_meta} == set(read.packed)
    assert len(read.packed) == len(linears(weights))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x.scale_weight": torch.tensor(0.0)}, "zero, negative or not finite"),
        ({"x.scale_weight": torch.tensor(-1.0)}, "zero, negative or not finite"),
        ({"x.scale_weight": torch.tensor(float("nan"))}, "zero, negative or not finite"),
        ({"x.scale_weight": torch.tensor(1)}, "of dtype int64"),
        ({"x.scale_weight": torch.ones(7)}, r"has shape \[7\], its weight \[64, 64\]"),
        ({"x.scale_weight": torch.ones(64, 7)}, r"has shape \[64, 7\]"),
        ({"x.scale_weight": torch.ones(64, 0)}, r"has shape \[64, 0\]"),
        ({"x.scale_weight": None}, "without a scale, though others have one"),
        ({"x.weight": None}, "stands without its weight"),
        ({"x.weight_scale": torch.tensor(1.0)}, "stands beside scale_weight"),
        ({"x.weight": torch.ones(64, 64)}, r"x?weight is quantised in float32 with scales"),
        ({"x.weight": torch.ones(64, 64, dtype=torch.int8)}, "quantised in int8 with scales"),
        ({"x.comfy_quant": torch.tensor([123], dtype=torch.uint8)}, "no description of a layer"),
        (
            {"x.comfy_quant": torch.tensor([*b'{"format": "nvfp4"}'], dtype=torch.uint8)},
            "ComfyUI's 'nvfp4'",
        ),
    ],
)
def test_scales_that_do_not_fit_are_refused(tmp_path, weights, change, message):
    file, _ = scaled(weights, "scale_weight", per_tensor)
    for name, value in change.items():
        name = name.replace("x.", f"{linears(weights)[0]}.")
        file[name] = value
    save_file({k: v for k, v in file.items() if v is not None}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=message) as refused:
        read_checkpoint(tmp_path / "w.safetensors")
    assert linears(weights)[0] in str(refused.value)
    assert str(tmp_path / "w.safetensors") in str(refused.value)


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ("x.SCB", "bitsandbytes' 8-bit"),
        ("x.weight.absmax", "nf4"),
        ("x.weight.quant_state.bitsandbytes__nf4", "nf4"),
        ("x.wscales", "SVDQuant"),
        ("x.qzeros", "GPTQ or AWQ"),
        ("x.qweight", "GPTQ or AWQ"),
        ("x.weight_packed", "compressed-tensors"),
        ("x.weight_scale_2", "NVFP4"),
        ("x.weight._data", "optimum-quanto"),
        ("x._weight_qdata", "torchao"),
        ("x.weight:qdata", "torchao"),
        ("x.W_q", "HQQ"),
    ],
)
def test_other_quantisations_are_refused_by_name(tmp_path, weights, entry, named):
    layer = linears(weights)[0]
    file = {k: v for k, v in weights.items() if not k.startswith(layer)}
    file[entry.replace("x.", f"{layer}.")] = torch.zeros(4, dtype=torch.uint8)
    save_file(prefixed(file, "model."), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=f"is quantised in .*{named}.*unquantised checkpoint"):
        read_checkpoint(tmp_path / "w.safetensors")


# GGUF ----------------------------------------------------------------------------------------


def write_gguf(path, weights, kind, original_shape=False):
    """As the converters of ComfyUI-GGUF write a Wan model."""
    writer = gguf.GGUFWriter(path=None, arch="wan")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    meant = {}
    for name, value in weights.items():
        array, chosen = value.numpy(), gguf.GGMLQuantizationType.F32
        if name.rpartition(".")[0] in linears(weights) and name.endswith("weight"):
            chosen = gguf.GGMLQuantizationType[kind]
        if value.ndim == 5 and original_shape:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(value.shape))
            array = array.reshape(len(array), -1)
        stored = gguf.quants.quantize(array, chosen)
        writer.add_tensor(name, stored, raw_dtype=chosen)
        meant[name] = torch.from_numpy(gguf.quants.dequantize(stored, chosen)).view(value.shape)
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize("original_shape", [False, True])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16", "F16"])
def test_gguf_is_dequantised(tmp_path, weights, kind, original_shape):
    meant = write_gguf(tmp_path / "w.gguf", weights, kind, original_shape)
    assert_loads(tmp_path / "w.gguf", meant)
    assert f"{len(linears(weights))} {kind}" in read_checkpoint(tmp_path / "w.gguf").form


def test_gguf_needs_its_package(tmp_path, weights, monkeypatch):
    import sys

    write_gguf(tmp_path / "w.gguf", weights, "Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"forcing-kv\[gguf\]"):
        read_checkpoint(tmp_path / "w.gguf")


def test_gguf_of_a_wrong_shape_or_place(tmp_path, weights):
    path = tmp_path / "w.gguf"
    write_gguf(path, weights, "Q8_0", original_shape=True)
    content = path.read_bytes()
    key = b"comfy.gguf.orig_shape.patch_embedding.weight"
    place = content.index(key) + len(key) + 4 + 4 + 8
    cases = {
        "orig_shape.patch_embedding.weight is": (place, (65).to_bytes(4, "little")),
        "bytes follow its tensors": (len(content), bytes(32)),
    }
    for message, (at, new) in cases.items():
        path.write_bytes(content[:at] + new + content[at + len(new) :])
        with pytest.raises(InputError, match=message):
            read_checkpoint(path)
    path.write_bytes(content[:-4000])
    with pytest.raises(InputError, match="it is cut off"):
        read_checkpoint(path)


def test_the_format_is_in_the_manifest_and_on_the_console(tmp_path, weights, capsys):
    """Unquantised files leave no trace of the question in a manifest."""
    config = {"dim": 64, "ffn_dim": 96, "num_heads": 2, "num_layers": 1, "in_dim": 4,
              "text_len": 6, "text_dim": 32, "freq_dim": 32, "out_dim": 4}  # fmt: skip
    preset = tmp_path / "tiny.json"
    preset.write_text(json.dumps({"model": config, "latent_size": [8, 12]}))
    file, meant = scaled(weights, "scale_weight", per_tensor)
    for state, traced in ((file, True), (meant, False)):
        save_file(state, tmp_path / "w.safetensors")
        parts = {"model": str(preset), "checkpoint": tmp_path / "w.safetensors"}
        request = ExportRequest(**parts, dense_window=6)
        resolved = resolve(request)
        assert ("checkpoint_format" in resolved.labels.provenance) is traced
        found = resolved.load().state_dict()
        assert all(torch.equal(found[name], value) for name, value in meant.items())
        export(output=BundleOutput(out=tmp_path / "bundle", dry_run=True), request=request)
        said = capsys.readouterr().err
        assert "weights: w.safetensors: .safetensors, official names" in said
        assert ("a scale per tensor (scale_weight)" in said) is traced
