"""A bundle that is replaced while it is opened: all of one or all of the other, never of both."""

import itertools
import os
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from manifests import edit

from forcing_kv.runtime_trt.bundle import manifest as manifests
from forcing_kv.runtime_trt.bundle.hashes import HashedFiles, sha256_of
from forcing_kv.runtime_trt.bundle.manifest import Bundle, load_whole, read_manifest
from forcing_kv.runtime_trt.decoder import VideoDecoder
from forcing_kv.runtime_trt.errors import BundleError
from forcing_kv.runtime_trt.session import Session


@pytest.fixture
def two(tiny_bundle, tmp_path):
    """Two bundles of the same shapes and other weights and schedule."""
    pair = [Path(shutil.copytree(tiny_bundle, tmp_path / name)) for name in "ab"]
    weights = pair[1] / "graphs" / "weights.bin"
    content = bytearray(weights.read_bytes())
    content[:4] = b"\0\0\0\0"
    weights.write_bytes(content)

    def change(data):
        data["weights_sha256"] = sha256_of(weights)
        data["config"]["schedule"]["steps"] = [900.0, 400.0]

    edit(pair[1], change)
    return pair


def kind_of(session):
    """`a` or `b` by the schedule, and whether the weights are of the same."""
    return "a" if session.config.schedule.steps[0] == 1000 else "b"


def video(session, prompts=None):
    import numpy as np

    model = session.config.model
    session.set_prompt(np.ones((model.text_len, model.text_dim), np.float32))
    return session.generate_chunk(seed=1).latents.tobytes()


@contextmanager
def replacing(step):
    """Calls `step` again and again, in a thread."""
    stop = threading.Event()

    def work():
        while not stop.is_set():
            step()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def by_rename(place, pair):
    """Folders take turns at one name, as `fkv export --force` has them."""
    aside = place.with_name("aside")

    def step(turn=itertools.cycle(pair)):
        other = next(turn)
        if not other.exists():
            return
        place.rename(aside)
        other.rename(place)
        aside.rename(other)

    return step


def by_link(place, pair):
    """A link leads to one and to the other."""

    def step(turn=itertools.cycle(pair)):
        link = place.with_name("link")
        link.symlink_to(next(turn))
        link.replace(place)

    return step


def by_copy(place, pair):
    """Files are copied one by one over those that are there."""

    def step(turn=itertools.cycle(pair)):
        source = next(turn)
        for file in ("graphs/weights.bin", "manifest.json"):
            shutil.copy(source / file, place / file)

    return step


@pytest.mark.parametrize("how", [by_rename, by_link, by_copy])
def test_a_session_is_of_one_bundle(two, tmp_path, how):
    wanted = {}
    for name, bundle in zip("ab", two, strict=True):
        with Session.open(bundle, "onnxruntime", num_threads=1) as session:
            wanted[name] = video(session)
    assert wanted["a"] != wanted["b"]
    place = tmp_path / "place"
    if how is by_link:
        place.symlink_to(two[0])
    else:
        shutil.copytree(two[0], place)
    opened, refused = [], []
    with replacing(how(place, two)):
        for _ in range(12):
            try:
                with Session.open(place, "onnxruntime", num_threads=1) as session:
                    opened.append(video(session) == wanted[kind_of(session)])
            except BundleError as error:
                refused.append(str(error))
    assert all(opened)
    assert len(opened) + len(refused) == 12
    assert all(str(place) in message for message in refused)


def swap_after(monkeypatch, count, step):
    """Calls `step` once, after the `count`-th file of a bundle has been compared."""
    compare, calls = HashedFiles._compare, itertools.count(1)

    def compared(self, name, found):
        compare(self, name, found)
        if next(calls) == count:
            step()

    monkeypatch.setattr(HashedFiles, "_compare", compared)


@pytest.mark.parametrize("count", range(1, 6))
def test_a_folder_that_is_exchanged_at_any_moment(two, tmp_path, monkeypatch, count):
    """It is opened as it was: its files are found below the folder that was opened."""
    place, aside = tmp_path / "place", tmp_path / "aside"
    shutil.copytree(two[0], place)

    def exchange():
        place.rename(aside)
        two[1].rename(place)

    swap_after(monkeypatch, count, exchange)
    with Session.open(place, "onnxruntime", num_threads=1) as session:
        assert kind_of(session) == "a"
    assert read_manifest(place).config.schedule.steps[0] == 900


@pytest.mark.parametrize("count", range(1, 6))
def test_a_folder_that_is_exchanged_and_removed(two, tmp_path, monkeypatch, count):
    """The one that has taken its place is opened, or the one that was, if all of it was read."""
    place, aside = tmp_path / "place", tmp_path / "aside"
    shutil.copytree(two[0], place)

    def exchange():
        place.rename(aside)
        two[1].rename(place)
        shutil.rmtree(aside)

    swap_after(monkeypatch, count, exchange)
    with Session.open(place, "onnxruntime", num_threads=1) as session:
        assert video(session)
        assert read_manifest(place).config.schedule.steps[0] == 900


def test_a_file_that_is_written_to_while_it_is_loaded(copied_bundle):
    weights = copied_bundle / "graphs" / "weights.bin"

    class Loaded:
        closed = False

        def close(self):
            Loaded.closed = True

    def load(bundle):
        bundle.check_graphs()
        status = weights.stat()
        with weights.open("r+b") as file:
            file.write(b"\1")
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # As if nothing had been.
        return Loaded()

    with pytest.raises(BundleError, match=r"weights\.bin: written to while it was loaded"):
        load_whole(copied_bundle, None, load)
    assert Loaded.closed


def test_a_bundle_that_changes_for_ever_is_given_up(copied_bundle, monkeypatch):
    attempts = []

    def load(bundle):
        attempts.append(bundle.manifest.digest)
        edit(copied_bundle, lambda data: data.update(name=f"{len(attempts)}"))
        raise BundleError(f"{copied_bundle}/x: missing")

    with pytest.raises(BundleError, match="x: missing"):
        load_whole(copied_bundle, None, load)
    assert len(set(attempts)) == manifests._ATTEMPTS


def test_files_are_closed(copied_bundle):
    def num_open():
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    with Session.open(copied_bundle, "onnxruntime", num_threads=1):
        before = num_open()
    for _ in range(3):
        with Session.open(copied_bundle, "onnxruntime", num_threads=1):
            assert num_open() <= before
    (copied_bundle / "graphs" / "evict.onnx").write_bytes(b"")
    for _ in range(3):
        with pytest.raises(BundleError):
            Session.open(copied_bundle)
        assert num_open() <= before


def test_a_decoder_of_a_bundle_that_has_been_replaced(whole_bundle, tmp_path):
    bundle = Path(shutil.copytree(whole_bundle, tmp_path / "bundle"))
    manifest = read_manifest(bundle)
    edit(bundle, lambda data: data["decoders"]["tae"].update(num_trimmed_frames=1))
    with pytest.raises(BundleError, match=rf"is sha256:.*, but {manifest.digest} is asked for"):
        VideoDecoder.open(bundle, manifest, "tae")
    with Bundle(bundle) as opened, pytest.raises(BundleError, match="is asked for"):
        VideoDecoder.open(bundle, opened.manifest, "tae", digest=manifest.digest)
