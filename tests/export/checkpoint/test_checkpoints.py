"""Every supported checkpoint layout, written exactly as its project writes it, loads the same."""

import json
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from stand_ins import diffusers_name, fsdp_names, prefixed, write_sharded

from forcing_kv.export.checkpoint.files import read_checkpoint
from forcing_kv.export.checkpoint.formats.safetensors import map_safetensors
from forcing_kv.export.checkpoint.load import CheckpointSource, load_model
from forcing_kv.export.checkpoint.names import official_from_diffusers
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.request.model_config import model_shape_from_official
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.layout import ModelShape

SHAPE = ModelShape(2, 24, 40, 2, in_channels=4, text_len=6, text_dim=8, freq_dim=16)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Random weights under the official names."""
    torch.manual_seed(0)
    shapes = {name: value.shape for name, value in CausalWanModel(SHAPE).state_dict().items()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def self_forcing(folder, weights):
    """self_forcing_dmd.pt: the averaged weights under FSDP names, others beside them."""
    other = {name: value + 1 for name, value in weights.items()}
    torch.save(
        {
            "generator": prefixed(other, "model."),
            "critic": prefixed(other, "model."),
            "generator_ema": fsdp_names(weights),
        },
        folder / "self_forcing_dmd.pt",
    )
    return folder / "self_forcing_dmd.pt"


def causal_forcing(folder, weights):
    """chunkwise/causal_forcing.pt: `generator` alone."""
    torch.save({"generator": prefixed(weights, "model.")}, folder / "causal_forcing.pt")
    return folder / "causal_forcing.pt"


def krea(folder, weights):
    """krea-realtime-video-14b.safetensors: one file, `model.` in front."""
    save_file(prefixed(weights, "model."), folder / "krea.safetensors")
    return folder / "krea.safetensors"


def raven(folder, weights):
    """raven_model.pt: bare official names."""
    torch.save(weights, folder / "raven_model.pt")
    return folder / "raven_model.pt"


def wan_original(folder, weights):
    """Wan2.1-T2V-1.3B: one file, official names."""
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def wan_original_sharded(folder, weights):
    """Wan2.1-T2V-14B: shards with an index."""
    return write_sharded(folder, weights, "diffusion_pytorch_model")


def wan_diffusers(folder, weights):
    """Wan2.1-T2V-14B-Diffusers: shards in `transformer`, diffusers names."""
    renamed = {diffusers_name(name): value for name, value in weights.items()}
    write_sharded(folder / "transformer", renamed, "diffusion_pytorch_model")
    return folder


def comfy(folder, weights):
    """Repackaged single files put the wrapper of another program in front."""
    save_file(prefixed(weights, "model.diffusion_model."), folder / "repackaged.safetensors")
    return folder / "repackaged.safetensors"


def compiled(folder, weights):
    torch.save({"model": prefixed(weights, "_orig_mod.")}, folder / "compiled.pt")
    return folder / "compiled.pt"


def legacy(folder, weights):
    """A .pth from before torch's zip format."""
    torch.save(weights, folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder / "old.pth"


WRITERS = [self_forcing, causal_forcing, krea, raven, wan_original, wan_original_sharded]
WRITERS += [wan_diffusers, comfy, compiled, legacy]


def assert_equal(model, weights):
    found = model.state_dict()
    assert set(found) == set(weights)
    for name, value in weights.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_layout_loads_exactly(write, tmp_path, weights):
    assert_equal(load_model(write(tmp_path, weights), SHAPE), weights)


def test_plain_weights_on_request_and_layouts_are_named(tmp_path, weights):
    file = self_forcing(tmp_path, weights)
    plain = load_model(CheckpointSource(file, weights="plain"), SHAPE)
    assert_equal(plain, {name: value + 1 for name, value in weights.items()})
    assert "generator_ema" in read_checkpoint(file).layout
    assert (
        "2 safetensors shards, diffusers names"
        in read_checkpoint(wan_diffusers(tmp_path, weights)).layout
    )


def test_target_dtype_keeps_the_float32_islands(tmp_path, weights):
    model = load_model(krea(tmp_path, weights), SHAPE, "bfloat16")
    assert model.dtype == torch.bfloat16
    islands = {n for n, v in model.state_dict().items() if v.dtype == torch.float32}
    assert {"time_embedding.0.weight", "head.modulation", "blocks.0.norm3.weight"} <= islands
    assert "head.head.weight" not in islands


def test_diffusers_names_map_both_ways(weights):
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel(
        num_attention_heads=SHAPE.num_heads, attention_head_dim=SHAPE.head_dim,
        in_channels=SHAPE.in_channels, out_channels=SHAPE.in_channels, text_dim=SHAPE.text_dim,
        freq_dim=SHAPE.freq_dim, ffn_dim=SHAPE.ffn_dim, num_layers=SHAPE.num_layers,
    )  # fmt: skip
    renamed = {diffusers_name(name): value.shape for name, value in weights.items()}
    assert renamed == {name: value.shape for name, value in theirs.state_dict().items()}
    assert {official_from_diffusers(name) for name in renamed} == set(weights)
    config = json.loads(theirs.to_json_string())
    shape = model_shape_from_official(config, "config.json")
    assert (shape.dim, shape.num_heads, shape.num_layers) == (24, 2, 2)


# Mistakes ------------------------------------------------------------------------------------


def test_missing_and_unknown_keys_name_the_nearest(tmp_path, weights):
    wrong = dict(weights)
    wrong["blocks.0.self_attn.query.weight"] = wrong.pop("blocks.0.self_attn.q.weight")
    wrong["head.head.bias"] = torch.zeros(3)
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(InputError) as caught:
        load_model(tmp_path / "wrong.safetensors", SHAPE)
    message = str(caught.value)
    assert "1 missing, 1 unknown, 1 mis-shaped" in message
    assert "nearest in the file: blocks.0.self_attn.query.weight" in message
    assert "head.head.bias has shape [3], needed [16]" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{", "cannot be read"),
        ("a.pt", b"not a zip at all", "cannot be read"),
        ("a.gguf", b"GGUF", "cannot be read"),
        ("a.onnx", b"", "type '.onnx'"),
        ("a.safetensors", b"", "cannot be read"),
        ("a.safetensors.index.json", b"{}", "not an index"),
        ("b.safetensors.index.json", b'{"weight_map": {"x": "no.safetensors"}}', "are missing"),
    ],
)
def test_broken_files_are_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path / name)


def test_mapped_safetensors_are_what_the_library_reads(tmp_path):
    """Every dtype, empty and scalar tensors, and one not at a multiple of its size."""
    path = tmp_path / "a.safetensors"
    content = torch.arange(24).reshape(2, 3, 4)
    dtypes = {
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
        *(torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
        torch.bool,
    }
    tensors = {str(dtype): content.to(dtype) for dtype in dtypes}
    save_file(tensors | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}, path)
    found, wanted = map_safetensors(path), load_file(path)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].float(), value.float()), name
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
    }
    text = json.dumps(header).encode()
    body = struct.pack("<Q", len(text)) + text + b"\x07" + struct.pack("<f", 1.5)
    path.write_bytes(body)
    assert {name: float(value) for name, value in map_safetensors(path).items()} == {
        "a": 7,
        "b": 1.5,
    }
    save_file({}, path)
    assert map_safetensors(path) == {}
    path.write_bytes(body.replace(b"F32", b"F99"))
    with pytest.raises(InputError, match=r"cannot be read|dtype"):
        read_checkpoint(path)


@pytest.mark.parametrize("write", [krea, raven])
def test_truncated_file(tmp_path, weights, write):
    file = write(tmp_path, weights)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(InputError, match="download it again"):
        load_model(file, SHAPE)


def test_code_is_never_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"generator": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="more than tensors") as refused:
        read_checkpoint(tmp_path / "evil.pt")
    assert "trust" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "model"),
    [
        ("token_embedding.weight", "UMT5"),
        ("decoder.conv1.weight", "auto-encoder"),
        ("img_emb.proj.0.weight", "image-to-video"),
    ],
)
def test_other_models_are_named(tmp_path, key, model):
    save_file({key: torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=model):
        load_model(tmp_path / "other.safetensors", SHAPE)


def test_another_size_and_quantised_weights_are_named(tmp_path, weights):
    large = ModelShape(2, 48, 40, 2, in_channels=4, text_len=6, text_dim=8, freq_dim=16)
    file = krea(tmp_path, weights)
    with pytest.raises(InputError, match="width 24 with 2 layers, needed 48 with 2"):
        load_model(file, large)
    save_file({k: v.to(torch.int8) for k, v in weights.items()}, tmp_path / "q.safetensors")
    with pytest.raises(InputError, match="quantised"):
        load_model(tmp_path / "q.safetensors", SHAPE)
    with pytest.raises(InputError, match="no averaged weights"):
        load_model(CheckpointSource(file, weights="ema"), SHAPE)


def test_folder_without_one_weight_file(tmp_path):
    with pytest.raises(InputError, match="name the file"):
        read_checkpoint(tmp_path)


# Memory and numerical truth ------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_loading_never_needs_the_model_twice(tmp_path, suffix):
    """A float32 file loaded as bfloat16: half the file in memory at the peak, not 1.5 files."""
    shape = ModelShape(8, 384, 1536, 4, text_len=8, text_dim=64, freq_dim=16)
    for name, size in (("small", SHAPE), ("model", shape)):
        with torch.device("meta"):
            model = CausalWanModel(size)
        weights = {k: torch.zeros(v.shape) for k, v in model.state_dict().items()}
        file = tmp_path / f"{name}{suffix}"
        (torch.save if suffix == ".pt" else save_file)(weights, file)
    code = f"""
import threading, time
from pathlib import Path
from forcing_kv.export.checkpoint.load import load_model
from forcing_kv.runtime_trt.rollout.layout import ModelShape

def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])

load_model(Path({str(tmp_path / f"small{suffix}")!r}), {SHAPE!r}, "bfloat16")
before, peak, running = anonymous(), 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
model = load_model(Path({str(file)!r}), {shape!r}, "bfloat16")
running = False
thread.join()
print(max(peak, anonymous()) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 0.75 * file.stat().st_size


def test_golden_case_with_official_files(tmp_path, repository):
    """Weights of the official code, rewritten as its trainers write them, give its latents."""
    from forcing_kv.export.verify.eager import eager_session
    from forcing_kv.export.verify.golden import GoldenCase, verify_golden

    golden = repository / "tests" / "golden"
    case = GoldenCase.load(golden / "fkv_selfforcing")
    official = load_file(golden / "weights.safetensors")
    model = case.load_model(self_forcing(tmp_path, official))
    with eager_session(model, case.config) as session:
        checks = verify_golden(case, session)
        assert all(next(checks).passed for _ in range(2))


def test_denoiser_equals_diffusers_on_one_chunk():
    """The first chunk attends to itself alone, as the bidirectional model does."""
    import numpy as np
    from diffusers import WanTransformer3DModel

    from forcing_kv.export.model.graphs import PromptGraph, StepGraph
    from forcing_kv.runtime_trt.rollout.config import RolloutConfig
    from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition
    from forcing_kv.runtime_trt.rollout.policy import CachePolicy
    from forcing_kv.runtime_trt.rollout.schedule import rope_table, time_sinusoid

    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        num_attention_heads=SHAPE.num_heads, attention_head_dim=SHAPE.head_dim,
        in_channels=SHAPE.in_channels, out_channels=SHAPE.in_channels, text_dim=SHAPE.text_dim,
        freq_dim=SHAPE.freq_dim, ffn_dim=SHAPE.ffn_dim, num_layers=SHAPE.num_layers,
    ).eval()  # fmt: skip
    state = {official_from_diffusers(k): v for k, v in theirs.state_dict().items()}
    ours = CausalWanModel(SHAPE)
    ours.load_state_dict(state)
    ours.requires_grad_(False)
    chunk, partition = ChunkShape(3, 8, 12), HeadPartition.uniform(2, 2, static=True)
    config = RolloutConfig(SHAPE, chunk, CachePolicy.dense(3, 3), partition)
    x, prompt = torch.randn(3, 4, 8, 12), torch.randn(6, 8)
    cos, sin = rope_table(range(3), SHAPE.rope_pairs[0])
    small = [time_sinusoid(937.5, 16), np.ones(1, np.float32), np.zeros(1, np.float32), cos, sin]
    arrays = [torch.from_numpy(array) for array in small]
    lengths = [torch.zeros(2, 2, dtype=torch.int32), torch.tensor([72], dtype=torch.int32)]
    pools = [torch.zeros(1, SHAPE.head_dim) for _ in range(2)]
    with torch.no_grad():
        cross = PromptGraph(ours)(prompt)
        x0, *_ = StepGraph(ours, config)(
            x, torch.zeros_like(x), *arrays, *lengths, pools, pools, *cross
        )
        wanted = theirs(
            x.transpose(0, 1)[None], torch.tensor([937.5]), prompt[None], return_dict=False
        )[0]
    torch.testing.assert_close(x - x0, wanted[0].transpose(0, 1), rtol=0, atol=1e-5)
