"""Names, nesting, folders and shards: what is taken of a file is clear, and said."""

import json

import pytest
import torch
from safetensors.torch import save_file
from stand_ins import fsdp_names, prefixed, write_sharded

from forcing_kv.export.checkpoint.files import checkpoint_sha256, read_checkpoint, weight_files
from forcing_kv.export.checkpoint.load import load_model
from forcing_kv.export.checkpoint.names import strip_wrappers
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.request.options import ExportRequest
from forcing_kv.export.request.request import resolve
from forcing_kv.runtime_trt.bundle.hashes import sha256_of
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import ModelShape

PLAIN = {"blocks.0.ffn.0.weight": torch.zeros(2, 3), "head.head.bias": torch.zeros(2)}
AVERAGED = {name: value + 1 for name, value in PLAIN.items()}


def assert_read(path, wanted, weights="auto"):
    read = read_checkpoint(path, weights)
    assert set(read.tensors) == set(wanted)
    assert all(torch.equal(read.tensors[name], value) for name, value in wanted.items())
    return read.layout


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".PT"])
def test_suffixes_of_torch_save(tmp_path, suffix):
    torch.save(PLAIN, tmp_path / f"w{suffix}")
    assert_read(tmp_path / f"w{suffix}", PLAIN)


@pytest.mark.parametrize(
    "prefix",
    [
        *("model.", "module.", "_fsdp_wrapped_module.", "_orig_mod.", "diffusion_model."),
        *(
            "_checkpoint_wrapped_module.",
            "pipe.dit.",
            "model.diffusion_model.",
            "base_model.model.",
        ),
        *("module._orig_mod.", "online_model.", "generator.model._fsdp_wrapped_module."),
    ],
)
def test_what_wrappers_leave_in_names(prefix):
    assert strip_wrappers(f"{prefix}blocks.0.ffn.0.weight") == "blocks.0.ffn.0.weight"


@pytest.mark.parametrize("entry", ["generator_ema", "ema", "model_ema", "ema_model"])
@pytest.mark.parametrize("plain", ["generator", "model", "state_dict", "module"])
def test_averaged_weights_beside_plain_ones(tmp_path, entry, plain):
    content = {plain: prefixed(PLAIN, "model."), entry: fsdp_names(AVERAGED), "step": 3}
    torch.save(content, tmp_path / "w.pt")
    for weights in ("auto", "ema"):
        layout = assert_read(tmp_path / "w.pt", AVERAGED, weights)
        assert f"entry {entry} (not {plain})" in layout
    assert f"entry {plain} (not {entry})" in assert_read(tmp_path / "w.pt", PLAIN, "plain")


@pytest.mark.parametrize(
    "prefix", ["ema_model.", "model_ema.", "generator_ema.model.", "model.ema."]
)
def test_averaged_weights_in_one_flat_file(tmp_path, prefix):
    save_file(prefixed(PLAIN, "model.") | prefixed(AVERAGED, prefix), tmp_path / "both.safetensors")
    for weights in ("auto", "ema"):
        layout = assert_read(tmp_path / "both.safetensors", AVERAGED, weights)
        assert "averaged weights (not plain ones)" in layout
    assert_read(tmp_path / "both.safetensors", PLAIN, "plain")
    save_file(prefixed(AVERAGED, prefix), tmp_path / "one.safetensors")
    assert "averaged weights" in assert_read(tmp_path / "one.safetensors", AVERAGED)


def test_what_was_asked_for_is_not_there(tmp_path):
    torch.save({"generator_ema": PLAIN}, tmp_path / "ema.pt")
    save_file(prefixed(PLAIN, "ema_model."), tmp_path / "ema.safetensors")
    for name in ("ema.pt", "ema.safetensors"):
        with pytest.raises(InputError, match="holds averaged weights alone; use --weights ema"):
            read_checkpoint(tmp_path / name, "plain")
    torch.save({"state_dict": PLAIN, "ema": {"decay": 0.99}}, tmp_path / "plain.pt")
    assert "entry state_dict" in assert_read(tmp_path / "plain.pt", PLAIN)
    with pytest.raises(InputError, match="holds no averaged weights"):
        read_checkpoint(tmp_path / "plain.pt", "ema")


def test_two_tensors_of_one_name(tmp_path):
    save_file(PLAIN | prefixed(AVERAGED, "model."), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"0\.weight and model\.blocks.* are both blocks"):
        read_checkpoint(tmp_path / "w.safetensors")
    diffusers = {"condition_embedder.time_proj.weight": torch.zeros(2)}
    save_file(diffusers | {"time_projection.1.weight": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"are both time_projection\.1\.weight"):
        read_checkpoint(tmp_path / "w.safetensors")


def test_values_that_are_no_tensors(tmp_path):
    torch.save({**PLAIN, "epoch": 3, "args": {"lr": 1.0}}, tmp_path / "w.pt")
    assert_read(tmp_path / "w.pt", PLAIN)
    for value, kind in (([1.0], "a list"), ({"a": 1}, "a dict"), (torch.half, "the name torch")):
        torch.save({"model": {**PLAIN, "blocks.1.ffn.0.weight": value}}, tmp_path / "w.pt")
        with pytest.raises(
            InputError, match=rf"blocks\.1\.ffn\.0\.weight is {kind}.*, not a tensor"
        ):
            read_checkpoint(tmp_path / "w.pt")
    torch.save([PLAIN], tmp_path / "w.pt")
    with pytest.raises(InputError, match="holds a list, not named tensors"):
        read_checkpoint(tmp_path / "w.pt")
    torch.save({"blocks": {"0": PLAIN}}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"holds no tensors \(entries: \['blocks'\]\)"):
        read_checkpoint(tmp_path / "w.pt")


# Shards and folders ----------------------------------------------------------------------------


def write_shards(folder, suffix=".safetensors", stem="model"):
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, (name, value) in enumerate(sorted(PLAIN.items()), 1):
        files.append(folder / f"{stem}-{number:05d}-of-{len(PLAIN):05d}{suffix}")
        (save_file if suffix == ".safetensors" else torch.save)({name: value}, files[-1])
    return files


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_with_an_index_or_without(tmp_path, suffix):
    first, second = write_shards(tmp_path, suffix)
    for path in (tmp_path, first, second):
        assert f"2 {suffix[1:]} shards" in assert_read(path, PLAIN)
        assert weight_files(path) == [first, second]
    hashed = checkpoint_sha256(tmp_path)
    assert hashed != sha256_of(first)
    shard_of = dict(zip(sorted(PLAIN), (first.name, second.name), strict=True))
    index = tmp_path / f"model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    for path in (tmp_path, first, index):
        assert_read(path, PLAIN)
        assert checkpoint_sha256(path) == hashed
    index.unlink()
    second.unlink()
    with pytest.raises(InputError, match=r"1 of 2 shards are missing.*00002-of-00002"):
        read_checkpoint(first)


def test_the_one_checkpoint_of_a_folder(tmp_path):
    torch.save(PLAIN, tmp_path / "w.pt")
    assert_read(tmp_path, PLAIN)
    save_file(AVERAGED, tmp_path / "w.safetensors")
    assert_read(tmp_path, AVERAGED)
    save_file(AVERAGED, tmp_path / "other.safetensors")
    (tmp_path / "w.pt").unlink()
    with pytest.raises(InputError, match=r"holds \['other.safetensors', 'w.safetensors'\]; name"):
        read_checkpoint(tmp_path)


INDEXES = {
    "null": "null",
    "a list": "[1, 2]",
    "a number": "4" * 4000,
    "depth": "[" * 100_000,
    "no JSON": "{",
    "bytes": "\x00\ud800",
    "no map": "{}",
    "a map of null": '{"weight_map": null}',
    "an empty map": '{"weight_map": {}}',
    "a list as the map": '{"weight_map": ["a"]}',
    "a number as a file": '{"weight_map": {"a": 1}}',
    "a key twice": '{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}',
    "a folder above": '{"weight_map": {"a": "../a.safetensors"}}',
    "an absolute path": '{"weight_map": {"a": "/etc/a.safetensors"}}',
    "a subfolder": '{"weight_map": {"a": "b/a.safetensors"}}',
    "another type": '{"weight_map": {"a": "passwd"}}',
    "no name": '{"weight_map": {"a": ""}}',
    "absent": '{"weight_map": {"a": "a.safetensors"}}',
}


@pytest.mark.parametrize("case", INDEXES)
def test_indexes_that_are_wrong(tmp_path, case):
    index = tmp_path / "w.safetensors.index.json"
    index.write_bytes(INDEXES[case].encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=r"w\.safetensors\.index\.json: "):
        read_checkpoint(index)


def test_indexes_and_shards_that_disagree(tmp_path):
    index = write_sharded(tmp_path, PLAIN, "w")
    content = json.loads(index.read_text())
    first, second = sorted(PLAIN)
    shards = content["weight_map"]

    def refused(weight_map, message):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match=message):
            read_checkpoint(index)

    swapped = {first: shards[second], second: shards[first]}
    refused(swapped, rf"00001.*holds {first}, which is in w-00002-of-00002\.safetensors")
    refused({first: shards[first], "x": shards[second]}, f"holds {second}, which is in no shard")
    refused({**shards, "x": shards[first]}, r"1 tensors are in no shard, such as \['x'\]")
    index.unlink()
    save_file(PLAIN, tmp_path / shards[second])
    with pytest.raises(InputError, match=rf"{first} is in w-00001-of-00002\.safetensors too"):
        read_checkpoint(tmp_path)


# Models that do not fit ------------------------------------------------------------------------


def test_the_preset_that_fits_is_named(tmp_path):
    """A file of 14B given as 1.3B, and the other way round."""
    for dim, layers, asked, fits in (
        (5120, 40, "self-forcing-1.3b", "krea-14b or wan-14b"),
        (1536, 30, "krea-14b", "self-forcing-1.3b or longlive-1.3b"),
    ):
        names = [f"blocks.{layer}.modulation" for layer in range(layers)]
        state = {name: torch.zeros(1) for name in names} | {"patch_embedding.bias": torch.ones(dim)}
        torch.save({"generator_ema": state}, tmp_path / "w.pt")
        options = {"model": asked, "checkpoint": tmp_path / "w.pt", "dense_window": 6}
        found = rf"width {dim} with {layers} layers.*; it fits --model {fits}"
        with pytest.raises(InputError, match=found):
            resolve(ExportRequest(**options)).load()


def test_transposed_integer_and_complex_tensors_are_named(tmp_path):
    shape = ModelShape(1, 24, 40, 2, in_channels=4, text_len=6, text_dim=8, freq_dim=16)
    weights = {k: torch.ones(v.shape) for k, v in CausalWanModel(shape).state_dict().items()}
    name = "blocks.0.ffn.0.weight"
    save_file(weights | {name: weights[name].T.contiguous()}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"has shape \[24, 40\], needed \[40, 24\]; it is transp"):
        load_model(tmp_path / "w.safetensors", shape)
    for dtype in (torch.int32, torch.bool, torch.complex64):
        torch.save(weights | {name: weights[name].to(dtype)}, tmp_path / "w.pt")
        named = rf"1 of \d+ tensors .* such as {name} \({str(dtype)[6:]}\); wanted are .*float32"
        with pytest.raises(InputError, match=named):
            load_model(tmp_path / "w.pt", shape)
    mixed = weights | {name: weights[name].half(), "head.head.bias": torch.ones(16).double()}
    save_file(mixed, tmp_path / "w.safetensors")
    found = load_model(tmp_path / "w.safetensors", shape).state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights.items())
