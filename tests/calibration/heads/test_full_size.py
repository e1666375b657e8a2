"""Full-size models are profiled on a CPU within 24 GB: weights stay mapped to their file."""

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from forcing_kv.export.checkpoint.load import load_model
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.request.presets import PRESETS
from forcing_kv.export.verify.eager import EagerBackend
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.schedule import Schedule

LIMIT_NBYTES = 24e9


def mapped_ranges(path: Path) -> list[tuple[int, int]]:
    """Address ranges of this process that are mapped to a file."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [words[0].split("-") for words in lines if words[-1] == str(path)]
    return [(int(start, 16), int(end, 16)) for start, end in spans]


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_stay_mapped_to_their_file(tmp_path, suffix):
    """All but Wan's float32 islands, and the heads that the partition moves."""
    shape = ModelShape(2, 64, 128, 2, in_channels=4, text_len=4, text_dim=16, freq_dim=16)
    weights = CausalWanModel(shape).to(torch.bfloat16).state_dict()
    path = tmp_path / f"model.{suffix}"
    save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
    model = load_model(path, shape, "bfloat16")
    config = RolloutConfig(
        shape, ChunkShape(3, 4, 4), CachePolicy(num_dynamic_frames=0), HeadPartition(2, ((), (1,))),
        Schedule((1000.0,)), "bfloat16",
    )  # fmt: skip
    engine = EagerBackend(model, config)
    spans = mapped_ranges(path)
    moved = {f"blocks.1.self_attn.{name}" for name in ("q", "k", "v", "o")}
    for name, value in engine.model.named_parameters():
        mapped = any(start <= value.data_ptr() < end for start, end in spans)
        changed = name.rpartition(".")[0] in moved and name != "blocks.1.self_attn.o.bias"
        assert mapped == (not model.is_island(name) and not changed), name
    torch.testing.assert_close(model.state_dict(), weights, check_dtype=False, rtol=0, atol=0)


def write_checkpoint(path: Path, shape: ModelShape, *, zeros: bool = False) -> int:
    """A bfloat16 checkpoint in the official layout, written without holding it in memory.

    Args:
        path: `.safetensors` file to write.
        shape: the model.
        zeros: leave the weights out, as a hole that reads as zeros and takes no space on the disk.

    Returns:
        Bytes of the file.
    """
    with torch.device("meta"):
        sizes = {name: value.shape for name, value in CausalWanModel(shape).state_dict().items()}
    header, offset = {}, 0
    for name, size in sizes.items():
        end = offset + 2 * size.numel()
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for size in () if zeros else sizes.values():
            drawn = torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02)
            file.write(memoryview(drawn.view(torch.int16).numpy()).cast("B"))
        file.truncate(8 + len(text) + offset)
    return 8 + len(text) + offset


def profile(folder: Path, model: str, *options: str) -> dict[str, int]:
    """Run `fkv calibrate heads` on `wan.safetensors`; returns its peak bytes by kind."""
    np.save(folder / "prompt.npy", np.full((512, 4096), 0.1, np.float32))
    command = [
        sys.executable, "-m", "forcing_kv.tools.cli", "calibrate", "heads", "--model", model,
        "--checkpoint", folder / "wan.safetensors", "--prompt-embeds", folder / "prompt.npy",
        "--seeds", "0", "--denoise-steps", "1000", "--dtype", "bfloat16", "--out", folder / "heads",
        *options,
    ]  # fmt: skip
    peaks = {"RssAnon": 0, "VmHWM": 0}
    start = time.perf_counter()
    with subprocess.Popen([str(word) for word in command]) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines())
            for name in peaks.keys() & fields.keys():
                peaks[name] = max(peaks[name], 1024 * int(fields[name].split()[0]))
            time.sleep(0.2)
    assert process.returncode == 0
    assert json.loads((folder / "heads" / "heads.json").read_text())["num_heads"]
    seconds = time.perf_counter() - start
    print(f"{model}: {seconds:.0f} s, " + ", ".join(f"{k} {v / 1e9:.1f}" for k, v in peaks.items()))
    return peaks


@pytest.mark.slow
def test_wan_1_3b_is_profiled_at_480p(tmp_path):
    """Two chunks, one denoise step and the clean pass; the pools are those of seven chunks."""
    write_checkpoint(tmp_path / "wan.safetensors", PRESETS["wan-1.3b"].model)
    peaks = profile(tmp_path, "wan-1.3b", "--num-chunks", "2", "--window-frames", "21")
    assert peaks["VmHWM"] < LIMIT_NBYTES


@pytest.mark.slow
def test_wan_14b_is_profiled_without_holding_its_weights(tmp_path):
    """A tiny resolution: what does not shrink with it is the weights."""
    nbytes = write_checkpoint(tmp_path / "wan.safetensors", PRESETS["krea-14b"].model, zeros=True)
    peaks = profile(tmp_path, "krea-14b", "--num-chunks", "2", "--latent-size", "4x4")
    assert nbytes > LIMIT_NBYTES
    assert peaks["RssAnon"] < 0.15 * nbytes
