"""A process that is killed, wherever, leaves the old thing whole or the new thing whole.

Every call of the system that a writer makes is one at which a copy of this process is killed
(SIGKILL) or told to end (SIGTERM). The next run leaves nothing of the killed one.
"""

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch

from forcing_kv.export.bundle.edit import changed_bundle, discard_engines, free_name
from forcing_kv.export.bundle.write import write_manifest
from forcing_kv.export.decoder import add
from forcing_kv.export.tensorrt.build import write_record
from forcing_kv.runtime_trt.bundle.atomic import places
from forcing_kv.runtime_trt.bundle.atomic.files import (
    filled_folder,
    partial_file,
    replaced_file,
    replaced_folder,
    scratch_folder,
    write_file,
)
from forcing_kv.runtime_trt.bundle.atomic.locks import claimed
from forcing_kv.runtime_trt.bundle.engines import EngineRecord
from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo, TensorInfo
from forcing_kv.runtime_trt.bundle.hashes import sha256_of
from forcing_kv.runtime_trt.bundle.manifest import (
    WEIGHT_FILE,
    Bundle,
    Manifest,
)
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.ports import ports
from forcing_kv.runtime_trt.rollout.schedule import Schedule
from forcing_kv.tools.ending import ended_by_signals

CALLS = ("open", "os.", "shutil.", "fcntl.", "ctypes.dlsym")
"""Events of Python's audit that are steps of a writer; each comes before the call itself."""


def end_at(step, number, work):
    """Run `work` in a copy of this process that gets a signal before a step; its exit code."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 99
    try:
        steps = itertools.count()

        def hook(event, _):
            if event.startswith(CALLS) and next(steps) == step:
                os.kill(os.getpid(), number)

        with ended_by_signals():
            sys.addaudithook(hook)
            work()
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def listed(folder):
    return {path.name for path in folder.iterdir()}


def content(path):
    """Everything in a file or folder; None where there is nothing."""
    if path.is_dir():
        return {name: content(path / name) for name in listed(path)}
    return path.read_text() if path.exists() else None


def write_new_file(target):
    write_file(target, b"new")


def write_large_file(target):
    with claimed(target), partial_file(target) as part:
        part.write(b"part")
        with replaced_file(target) as file:
            file.write(b"n")
            file.flush()
            file.write(b"ew")


def fill(folder):
    (folder / "a").write_text("new a")
    (folder / "b").mkdir()
    (folder / "b" / "c").write_text("new c")


def write_folder(target):
    with claimed(target, wait=True), replaced_folder(target) as folder:
        fill(folder)


def write_entries(target):
    with claimed(target), filled_folder(target, force=True) as folder:
        fill(folder)


NEW = {"a": "new a", "b": {"c": "new c"}}
OLD = {"a": "old a", "d": "old d"}
WRITERS = [
    (write_new_file, None, "new"),
    (write_new_file, "old", "new"),
    (write_large_file, "old", "new"),
    (write_folder, None, NEW),
    (write_folder, OLD, NEW),
    (write_entries, None, NEW),
]


def put(path, made):
    if isinstance(made, dict):
        path.mkdir()
        for name, each in made.items():
            put(path / name, each)
    elif made is not None:
        path.write_text(made)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize(("write", "old", "new"), WRITERS)
def test_a_killed_writer_leaves_the_old_or_the_new(tmp_path, number, write, old, new):
    for step in itertools.count():
        folder = tmp_path / str(step)
        folder.mkdir()
        put(folder / "users", "a user's file")
        put(folder / ".thing.0123456789abcdef", "another's hidden file")
        put(folder / "thing", old)
        code = end_at(step, number, lambda: write(folder / "thing"))  # noqa: B023
        assert content(folder / "thing") in (old, new), step
        kept = {".thing.0123456789abcdef", "users"}
        if number == signal.SIGTERM:
            assert code in (0, 143), step
            assert listed(folder) <= {*kept, "thing"}, step
        if code == 0:
            break
        assert code in (-number, 128 + number), step
        write(folder / "thing")
        assert content(folder / "thing") == new, step
        assert listed(folder) == {*kept, "thing"}, step
        shutil.rmtree(folder)
    assert step > 5


def test_without_an_exchange_the_old_one_is_put_back(tmp_path, monkeypatch):
    """Two renames, where the system has no other way: the next run of anything mends it."""
    monkeypatch.setattr(places, "_rename", lambda *_: False)
    missing = 0
    for step in itertools.count():
        folder = tmp_path / str(step)
        folder.mkdir()
        put(folder / "thing", OLD)
        code = end_at(step, signal.SIGKILL, lambda: write_folder(folder / "thing"))  # noqa: B023
        missing += not (folder / "thing").exists()
        write_file(folder / "other", b"")
        assert content(folder / "thing") in (OLD, NEW), step
        if code == 0:
            break
        assert listed(folder) == {"other", "thing"}, step
    assert missing > 0, "the case was not met"


def test_a_living_writer_is_not_taken_for_litter(tmp_path):
    target = tmp_path / "thing"
    with replaced_folder(target) as folder, partial_file(target) as part:
        fill(folder)
        other = target.with_name("other")
        assert end_at(-1, signal.SIGKILL, lambda: write_file(other, b"")) == 0
        part.write(b"still there")
        part.flush()
        assert Path(part.name).read_text() == "still there"
    assert content(target) == NEW


def test_what_a_killed_process_left_of_a_private_folder_goes_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def work():
        with scratch_folder() as folder:
            fill(folder)
            os.kill(os.getpid(), signal.SIGKILL)

    assert end_at(-1, signal.SIGKILL, work) == -signal.SIGKILL
    assert len(listed(tmp_path)) == 1
    with scratch_folder() as folder:
        assert listed(tmp_path) == {folder.name}
        assert folder.stat().st_mode & 0o777 == 0o700
    assert listed(tmp_path) == set()


def test_only_dead_files_of_ours_are_litter(tmp_path):
    mark = "0123456789abcdef"
    others = [
        f".thing.{mark}", f"thing.fkv-{mark}", f".thing.fkv-{mark}x", f".thing.fkv-{mark}.bak",
        ".thing.fkv-0123", f".fkv-{mark}",
    ]  # fmt: skip
    for name in others:
        (tmp_path / name).write_text("a user's")
    (tmp_path / f".link.fkv-{mark}").symlink_to(tmp_path / others[0])
    os.mkfifo(tmp_path / f".pipe.fkv-{mark}")
    (tmp_path / f".dead.fkv-{mark}").write_text("ours")
    write_file(tmp_path / "thing", b"new")
    kept = {*others, "thing", f".link.fkv-{mark}", f".pipe.fkv-{mark}"}
    assert listed(tmp_path) == kept


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory):
    """A bundle that is whole, of graphs that nothing can run."""
    model = ModelShape(
        2, dim=24, ffn_dim=16, num_heads=3, in_channels=2, text_len=3, text_dim=5, freq_dim=8
    )
    config = RolloutConfig(
        model, ChunkShape(3, 4, 6), CachePolicy(), HeadPartition(3, ((0,), (1,))),
        Schedule((1000, 500)),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("bundles") / "small"
    (folder / "graphs").mkdir(parents=True)
    (folder / WEIGHT_FILE).write_text("weights")
    graphs = {}
    for name, found in ports(config).items():
        file = f"graphs/{name}.onnx"
        (folder / file).write_text(name)
        inputs, outputs = (
            tuple(TensorInfo(p.name, tuple(p.shape), p.dtype) for p in each)
            for each in (found.inputs, found.outputs)
        )
        graphs[name] = GraphInfo(file, sha256_of(folder / file), inputs, outputs)
    write_manifest(Manifest("small", config, graphs, sha256_of(folder / WEIGHT_FILE), 7), folder)
    return folder


@pytest.fixture
def fake_graphs(monkeypatch):
    """Decoders whose files are small texts, exported in no time."""

    def write(source, stem, manifest, work, report):
        (work / "graphs" / f"{stem}.bin").write_text(f"weights of {source.source}")
        file = f"graphs/{stem}_decode.onnx"
        (work / file).write_text(f"graph of {source.source}")
        shape = manifest.config.latent_shape[1:]
        latents = TensorInfo("latents", (1, *shape), "float32")
        frames = TensorInfo("frames", (4, 3, 8, 8), "float32")
        return {"decode": GraphInfo(file, sha256_of(work / file), (latents,), (frames,))}

    monkeypatch.setattr(add, "_write_graphs", write)


def decoder(text, kind="tae"):
    channels, path = 2, Path(text)
    return add.DecoderSource(kind, torch.nn.Identity(), (), torch.float32, channels, path=path)


def add_engine(bundle, text):
    """As the builders do, without building."""
    name = "engines/tensorrt-sm89"
    with changed_bundle(bundle) as manifest:
        discard_engines(bundle, manifest, name)
        relative = free_name(name, [record.folder for record in manifest.engines])
        with replaced_folder(bundle / relative) as folder:
            (folder / "step.plan").write_text(text)
            files = {f"{relative}/step.plan": sha256_of(folder / "step.plan")}
        write_record(
            bundle,
            EngineRecord(
                folder=relative, build_seconds=1.0, files=files, graphs={}, backend="tensorrt",
                environment={"sm": "89"}, options={},
            ),
            manifest,
        )  # fmt: skip


def parts(bundle):
    """What a bundle holds, every file of it checked."""
    with Bundle(bundle) as opened:
        manifest = opened.manifest
        for part in (manifest, *manifest.decoders.values(), *manifest.engines):
            opened.check(part.hashes)
    found = {kind: info.source for kind, info in manifest.decoders.items()}
    for record in manifest.engines:
        ((file, _),) = record.files.items()
        found["engine"] = (bundle / file).read_text()
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_killed_change_of_a_bundle_leaves_the_old_or_the_new(
    tmp_path, number, small_bundle, fake_graphs
):
    def change(bundle, text):
        add.add_decoder(bundle, decoder(text), force=True)
        add_engine(bundle, text)

    before = Path(shutil.copytree(small_bundle, tmp_path / "before"))
    change(before, "old")
    twice = Path(shutil.copytree(before, tmp_path / "twice"))
    change(twice, "new")
    first, stride = (0, 7) if number == signal.SIGKILL else (1, 13)
    for step in itertools.count(first, stride):
        bundle = Path(shutil.copytree(before, tmp_path / str(step)))
        code = end_at(step, number, lambda: change(bundle, "new"))  # noqa: B023
        whole = [{"tae": "old"}, {"tae": "new"}], [{"engine": "old"}, {"engine": "new"}]
        assert parts(bundle) in [one | other for one in whole[0] for other in whole[1]], step
        if code == 0:
            break
        change(bundle, "new")
        change(bundle, "new")  # Back under the names of the first.
        assert parts(bundle) == {"tae": "new", "engine": "new"}, step
        assert len(names(bundle)) == len(names(twice)), step
        assert not [name for name in names(bundle) if ".fkv-" in name], step
        shutil.rmtree(bundle)
    assert step > 30


def test_two_changes_at_once_are_both_kept(tmp_path, small_bundle, fake_graphs):
    bundle = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    go, copies = os.pipe(), []
    for kind in ("tae", "vae"):
        copies.append(os.fork())
        if not copies[-1]:
            with contextlib.suppress(BaseException):
                os.read(go[0], 1)
                add.add_decoder(bundle, decoder(kind, kind))
                os._exit(0)
            os._exit(1)
    with changed_bundle(bundle):
        os.write(go[1], b"22")
        time.sleep(0.2)
        assert parts(bundle) == {}
        add.add_decoder(bundle, decoder("mine", "other"))  # Whoever has the lock goes on.
        assert parts(bundle) == {"other": "mine"}
    assert [os.waitpid(process, 0)[1] for process in copies] == [0, 0]
    assert parts(bundle) == {"other": "mine", "tae": "tae", "vae": "vae"}


COMMANDS = {
    "run": ("run", "BUNDLE", "--prompt", "a digit 3 moving left .", "--out", "v.mp4", "--force"),
    "encode-prompt": (
        "encode-prompt", "a digit 3 moving left .", "--out", "p.safetensors", "--force",
    ),
    "export": ("export", "--out", "b", "--force"),
    "calibrate": ("calibrate", "heads", "--out", "c", "--num-chunks", "3", "--seeds", "0",
                  "--force"),
}  # fmt: skip
KILLS = 25


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_real_commands_are_killed_at_any_time(tmp_path, name):
    """Prints how many were killed, what they left, and that the next run cleans it."""
    fkv = str(Path(sys.executable).with_name("fkv"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    if name == "run":
        subprocess.run([fkv, "export", "--out", "bundle"], cwd=tmp_path, check=True)
    words = [fkv, *(str(tmp_path / "bundle") if w == "BUNDLE" else w for w in COMMANDS[name])]
    work = tmp_path / "work"
    work.mkdir()
    start = time.monotonic()
    subprocess.run(words, cwd=work, env=environment, check=True)
    whole_s, draw, counts = time.monotonic() - start, random.Random(0), Counter()
    expected, before = names(work), set()
    for _ in range(KILLS):
        number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        process = subprocess.Popen(words, cwd=work, env=environment, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.3, 1.1) * whole_s)
        process.send_signal(number)
        code = process.wait()
        counts[f"{number.name}: {code}"] += 1
        assert [name for name in names(work) if ".fkv-" not in name] == expected
        left = {name for name in (*names(work), *names(tmp_path / "tmp")) if ".fkv-" in name}
        counts[f"{number.name}: something left"] += bool(left - before)
        assert number == signal.SIGKILL or left <= before
        before = left
    subprocess.run(words, cwd=work, env=environment, check=True)
    assert names(work) == expected
    assert [name for name in names(tmp_path / "tmp") if ".fkv-" in name] == []
    print(f"\n{name}: {KILLS} kills, {dict(sorted(counts.items()))}; nothing after the next run")
