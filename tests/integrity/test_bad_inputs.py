"""Files that people give: whatever is in them, they are read or refused with one clear error.

A damaged file is a `ForcingKvError` that names it, in bounded time; no other exception comes out,
and nothing is left behind. Bundles have their own mutants, checkpoints theirs
(tests/export/checkpoint).
"""

import io
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from stand_ins import tiny_decoder_files

from forcing_kv.export.checkpoint.fp8_file import FP8_FORMAT, FP8_SCHEMA_VERSION, read_fp8
from forcing_kv.export.decoder.tae import TinyDecoder, tiny_decoder
from forcing_kv.export.decoder.vae_file import load_wan_vae
from forcing_kv.export.request.options import ModelOptions
from forcing_kv.export.request.presets import load_preset
from forcing_kv.export.request.request import resolve_model
from forcing_kv.export.verify.golden_case import GoldenCase
from forcing_kv.plugins.compile import tuning
from forcing_kv.runtime_trt.bundle.heads import read_heads
from forcing_kv.runtime_trt.bundle.prompt_file import read_prompts
from forcing_kv.runtime_trt.errors import ForcingKvError, InputError
from forcing_kv.runtime_trt.rollout.layout import ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.tools import cli
from forcing_kv.tools.bench.report.rows import Row, read_rows
from forcing_kv.tools.plan.request import PlanRequest, resolve
from forcing_kv.tools.run.encode_prompt import read_lines
from forcing_kv.tools.run.prompts import PromptSource

GOLDEN = Path(__file__).parents[1] / "golden"
LIMIT_S = 10
"""What a file may take at most; all take milliseconds."""

SHAPE = ModelShape(2, 32, 48, 2, in_channels=4, text_len=6, text_dim=8, freq_dim=16)
OFFICIAL = {
    "model_type": "t2v", "dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "in_dim": 4,
    "out_dim": 4, "text_len": 6, "text_dim": 8, "freq_dim": 16, "patch_size": [1, 2, 2],
    "eps": 1e-6, "qk_norm": True,
}  # fmt: skip
DIFFUSERS = {
    "_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 16,
    "ffn_dim": 48, "num_layers": 2, "in_channels": 4, "out_channels": 4, "text_dim": 8,
    "freq_dim": 16, "patch_size": [1, 2, 2], "eps": 1e-6, "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
}  # fmt: skip
LAYERS = [
    {"layer_idx": 0, "static_head": [0], "dynamic_head": [1]},
    {"layer_idx": 1, "static_head": [], "dynamic_head": [0, 1]},
]
HEADS = {
    "format": "forcing_kv.heads", "schema_version": 1, "num_layers": 2, "num_heads": 2,
    "layers": LAYERS, "scores": [[0.9, 0.1], [0.2, 0.3]], "model": {"sha256": "0" * 64},
}  # fmt: skip
FP8 = {
    "format": FP8_FORMAT, "schema_version": FP8_SCHEMA_VERSION,
    "model": {"sha256": "0" * 64, "shape": asdict(SHAPE)},
    "linears": {"blocks.0.ffn.0": {"amax": 3.5, "headroom": 2.0}},
}  # fmt: skip
PRESET = {
    "model": OFFICIAL, "policy": {"num_segments": 3}, "schedule": {"steps": [1000, 500]},
    "chunk_frames": 3, "latent_size": [4, 6], "weights": "ema", "lora_alpha": 2.0, "fps": 8,
}  # fmt: skip
ROW = {"schema": 1, **Row("chunk", "s", {"model": "m"}, {"device": "cpu"}).to_json()}
TACTIC = {
    "op": "FkQkNormRope", "gpu": "G", "dtype": "bfloat16", "sizes": {"N": 4}, "tactic": "t",
    "median_ms": 1.0, "others_ms": {"u": 2.0}, "date": "2026-11-01",
}  # fmt: skip
ENTRY = {"frame": 0, "prompt": "a digit 3 moving left .", "index": 0}
EMBEDS = np.linspace(-1, 1, 2 * 6 * 8, dtype=np.float32).reshape(2, 6, 8)


@dataclass(frozen=True)
class Kind:
    """One kind of file: its name, a good one, and who reads it."""

    name: str
    content: Any
    """What JSON can hold, or bytes."""
    read: Callable[[Path], object]
    lines: bool = False
    """Whether it is JSON lines."""

    @property
    def is_json(self) -> bool:
        return not isinstance(self.content, bytes)

    def encoded(self) -> bytes:
        return json.dumps(self.content).encode() if self.is_json else self.content


def array_bytes(array, *, zipped=False):
    file = io.BytesIO()
    np.savez(file, one=array, two=EMBEDS) if zipped else np.save(file, array, allow_pickle=True)
    return file.getvalue()


def read_config(path):
    return resolve_model(ModelOptions(checkpoint=GOLDEN / "weights.safetensors", config=path))


def read_script(path):
    return PromptSource(script=path).videos(SimpleNamespace(text_encoder="digits"))


def beside_links(read, where, path):
    """Read a folder in which `path` stands for one file and links for the others."""
    folder = path.parent / "case" / where.parent.name
    folder.mkdir(parents=True, exist_ok=True)
    for file in (*where.parent.iterdir(), where.parent.parent / "inputs.npz"):
        link = (folder if file.parent == where.parent else folder.parent) / file.name
        link.unlink(missing_ok=True)
        if file.exists():
            link.symlink_to(path.absolute() if file == where else file)
    return read(folder)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, Kind]:
    """Every kind of file by name, but for diffusers' own: importing that takes long."""
    case, tae = GOLDEN / "fkv_temporal3_nodynamic", tmp_path_factory.mktemp("tae") / "t.pth"
    torch.save(TinyDecoder(4, (8, 6, 4, 4)).state_dict(), tae)
    found = [
        Kind("preset.json", PRESET, lambda path: load_preset(str(path))),
        Kind("config.json", OFFICIAL, read_config),
        Kind("diffusers.json", DIFFUSERS, read_config),
        Kind("heads.json", HEADS, partial(read_heads, model=SHAPE)),
        Kind("published.json", {"layers": LAYERS}, read_heads),
        Kind("keyed.json", {"layers": {"0": LAYERS[0], "1": LAYERS[1]}}, read_heads),
        Kind("fp8.json", FP8, partial(read_fp8, model=SHAPE)),
        Kind("policy.json", asdict(CachePolicy()), lambda p: resolve(PlanRequest()).config(str(p))),
        Kind("tactics.json", [TACTIC], tuning.read_table),
        Kind("rows.jsonl", ROW, lambda path: list(read_rows(path)), lines=True),
        Kind("script.jsonl", ENTRY, read_script, lines=True),
        Kind("prompts.txt", b"one prompt\nanother\n", read_lines),
        Kind("p.safetensors", save({"prompt_embeds": EMBEDS}), read_prompts),
        Kind("p.npy", array_bytes(EMBEDS), read_prompts),
        Kind("p.npz", array_bytes(EMBEDS, zipped=True), read_prompts),
        Kind("taew2_1.pth", tae.read_bytes(), partial(tiny_decoder, latent_size=(2, 2))),
    ]
    found += in_folder(GoldenCase.load, {"case.json": case / "config.json"})
    found += in_folder(GoldenCase.load, {"golden.npz": case / "golden.npz"})
    return {kind.name: kind for kind in found}


@pytest.fixture(scope="module")
def all_kinds(kinds, tmp_path_factory) -> dict[str, Kind]:
    vae, _ = tiny_decoder_files(tmp_path_factory.mktemp("decoders"), 4)
    weights = vae / "diffusion_pytorch_model.safetensors"
    files = {"vae.json": vae / "config.json", "vae.safetensors": weights}
    return kinds | {kind.name: kind for kind in in_folder(load_wan_vae, files)}


def in_folder(read: Callable[[Path], object], files: dict[str, Path]) -> list[Kind]:
    """Kinds of files that are read with others beside them."""
    found = []
    for name, file in files.items():
        content = json.loads(file.read_text()) if file.suffix == ".json" else file.read_bytes()
        found.append(Kind(name, content, partial(beside_links, read, file)))
    return found


VALUES = (
    None, True, [], {}, [[]], "", "x" * 5000, "\u001b[31m", "\ud800", -1, 0, 1, 2.5, 1e308, 10**18,
    [None], [1] * 1000, {"a": {"b": []}},
)  # fmt: skip
RAW = {
    "9" * 4000: "4,000 digits",
    "-1e999": "an infinity",
    "NaN": "NaN",
    "[" * 1000 + "]" * 1000: "1,000 levels",
    '{"a":1,"a":2}': "a key twice",
}
"""Values that no JSON of this project may hold."""
MARK = "\u0001mark\u0001"

ARRAYS = (
    EMBEDS[:0], EMBEDS[0, 0], np.asarray(1.0), EMBEDS.astype(int), EMBEDS * np.nan, EMBEDS * np.inf,
    EMBEDS.astype(np.float64) * 1e300, EMBEDS.astype(complex), EMBEDS.astype(str),
    np.array([{}, []], object), EMBEDS[:, :, :0], np.zeros((1, 1, 6, 8), np.float32),
)  # fmt: skip
SAME_ARRAYS = (np.asfortranarray(EMBEDS), EMBEDS.astype(">f4"), EMBEDS.astype(">f8"), EMBEDS[::-1])
BYTES = ("empty", "truncated", "flipped", "random", "longer", "utf-16", "zeros", "lines")
PLACES = ("folder", "pipe", "missing", "link to itself", "/dev/zero")
CHANGES = ("value", "raw value", "removed", "unknown key")


def holders(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a JSON value: its list or object, and its key."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from holders(value[key])


def changed_json(draw, content, change):
    """The text of a JSON file with one entry changed."""
    content = json.loads(json.dumps(content))
    box = [content]
    holder, key = draw(st.sampled_from(list(holders(box))[:400]))
    if change == "removed" and holder is not box:
        holder.pop(key)
    elif change == "unknown key":
        target = holder[key] if isinstance(holder[key], dict) else content
        if isinstance(target, dict):
            target["surprise"] = 1
    elif change == "raw value":
        holder[key] = MARK
        return json.dumps(box[0]).replace(json.dumps(MARK), draw(st.sampled_from(sorted(RAW))))
    else:
        holder[key] = draw(st.sampled_from(VALUES))
    return json.dumps(box[0])


def changed_bytes(draw, content: bytes, change: str) -> bytes:
    place = draw(st.integers(0, max(0, len(content) - 1)))
    noise = draw(st.binary(min_size=1, max_size=40))
    return {
        "empty": b"",
        "truncated": content[:place],
        "flipped": content[:place] + noise + content[place + len(noise) :],
        "random": noise,
        "longer": content + noise,
        "utf-16": content.decode("latin-1").encode("utf-16"),
        "zeros": bytes(len(content)),
        "lines": b"\n" * 100,
    }[change]


def put(path: Path, change: str) -> None:
    """Something at `path` that is no file."""
    if change == "folder":
        path.mkdir()
    elif change == "pipe":
        os.mkfifo(path)
    elif change == "link to itself":
        path.symlink_to(path)
    elif change == "/dev/zero":
        path.symlink_to(change)


def damage(draw, kind: Kind, path: Path) -> tuple[str, bool]:
    """Put a damaged file at `path`.

    Returns:
        What is wrong with it, and whether it must be refused.
    """
    own = CHANGES if kind.is_json else ("array",) if kind.name.startswith("p.np") else ()
    change = draw(st.sampled_from((*BYTES, *PLACES, *own)))
    if change in PLACES:
        put(path, change)
        return change, change != "missing" or kind.name != "rows.jsonl"
    if change == "array":
        array = draw(st.sampled_from((*ARRAYS, *SAME_ARRAYS)))
        path.write_bytes(array_bytes(array, zipped=path.suffix == ".npz"))
        return change, not any(array is same for same in SAME_ARRAYS)
    if change in BYTES:
        path.write_bytes(changed_bytes(draw, kind.encoded(), change))
        # An empty file of rows holds none; a flip, a cut or more may leave what can be read.
        whole = change in ("empty", "zeros", "utf-16", "lines") and kind.name != "rows.jsonl"
        return change, whole and not (kind.name == "prompts.txt" and change in ("zeros", "utf-16"))
    path.write_text(changed_json(draw, kind.content, change), encoding="utf-8")
    return change, change == "raw value"


@contextmanager
def bounded() -> Iterator[None]:
    """Ends what hangs, as reading a pipe does."""

    def stop(*_):
        raise TimeoutError(f"took more than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "case" not in path.parts}


def outcome(work: Callable[[], object]) -> str | None:
    """The message of the error by which `work` is refused; None where it goes through."""
    try:
        with bounded():
            work()
    except ForcingKvError as error:
        return str(error)
    return None


class Tally:
    """Counts what became of damaged files."""

    def __init__(self, kinds: dict[str, Kind]) -> None:
        self.kinds = kinds
        self.refused: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self.slowest_s = 0.0

    def check(self, draw, folder: Path) -> None:
        """Damage a file of some kind and hold what this page promises."""
        kind = self.kinds[draw(st.sampled_from(sorted(self.kinds)))]
        path = folder / kind.name
        change, must_fail = damage(draw, kind, path)
        before, start = entries(folder), time.perf_counter()
        told = outcome(partial(kind.read, path))
        what = f"{kind.name}, {change}: {told}"
        if told is None:
            assert not must_fail, what
            self.accepted[kind.name] += 1
        else:
            assert str(folder) in told, what
            assert len(told) < 2000, what
            self.refused[kind.name] += 1
        assert entries(folder) == before
        self.slowest_s = max(self.slowest_s, time.perf_counter() - start)


def test_good_files_are_read(kinds, tmp_path):
    for kind in kinds.values():
        (tmp_path / kind.name).write_bytes(kind.encoded())
        kind.read(tmp_path / kind.name)


def run(kinds, tmp_path_factory, examples: int) -> Tally:
    tally = Tally(kinds)

    @seed(2026)
    @settings(
        max_examples=examples, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def holds(data):
        tally.check(data.draw, tmp_path_factory.mktemp("bad"))

    holds()
    return tally


def test_a_bad_file_is_one_clear_error(kinds, tmp_path_factory):
    tally = run(kinds, tmp_path_factory, 300)
    assert sum(tally.refused.values()) > sum(tally.accepted.values())


@pytest.mark.slow
def test_many_bad_files_are_each_one_clear_error(all_kinds, tmp_path_factory, capsys):
    tally = run(all_kinds, tmp_path_factory, 10_000)
    with capsys.disabled():
        for name in sorted(all_kinds):
            refused, accepted = tally.refused[name], tally.accepted[name]
            sys.stdout.write(f"\n{name:18} {refused:6} refused {accepted:6} read")
        total = sum(tally.refused.values()) + sum(tally.accepted.values())
        sys.stdout.write(f"\n{total} bad files, the slowest took {tally.slowest_s:.2f} s\n")


@pytest.mark.parametrize(
    ("words", "name", "content"),
    [
        (("plan", "--model"), "preset.json", b"[" * 1000 + b"]" * 1000),
        (("plan", "--heads"), "heads.json", b"9" * 4000),
        (("plan", "--policy"), "policy.json", b"\xff\xfe"),
        (("bench", "report", "--out", "report"), "rows.jsonl", b"[1]"),
        (("export", "--checkpoint", "w.safetensors", "--out", "b", "--config"), "c.json", b"[1]"),
        (("verify", "--golden"), "case", None),
        (("calibrate", "heads", "--checkpoint", "w.safetensors", "--out", "o", "--model",
          "preset.json", "--prompt-embeds"), "zero.npy", array_bytes(EMBEDS[:0])),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)  # fmt: skip
def test_a_command_ends_with_exit_code_2_and_leaves_nothing(
    tmp_path, monkeypatch, capfd, words, name, content
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.safetensors").symlink_to(GOLDEN / "weights.safetensors")
    if name != "preset.json":
        (tmp_path / "preset.json").write_text(json.dumps(PRESET))
    (tmp_path / name).mkdir() if content is None else (tmp_path / name).write_bytes(content)
    before = entries(tmp_path)
    with bounded(), pytest.raises(SystemExit) as stopped:
        cli.main([*words, name])
    told = capfd.readouterr().err
    assert stopped.value.code == 2, told
    assert f"Error: {name}" in told
    assert "Traceback" not in told
    assert entries(tmp_path) == before


def test_compressed_arrays_expand_so_far_and_no_further(tmp_path):
    prompts = np.zeros((40_000, 8, 64), np.float32)
    np.savez_compressed(tmp_path / "p.npz", prompt_embeds=prompts)
    with pytest.raises(InputError, match=r"p\.npz: .*compressed bytes expand more than 200 times"):
        read_prompts(tmp_path / "p.npz")
