"""Kept kernels are read only where nobody else could have put them, and only whole."""

import hashlib
import os
from types import SimpleNamespace

import pytest

from forcing_kv.runtime_trt.tensorrt.jit_cache import CACHE_VARIABLE, JitCache, cache_folder

RTX = SimpleNamespace(IRuntimeCache=object)


class Runtime:
    """TensorRT-RTX's cache: what it was given, then what it has compiled."""

    def __init__(self, compiled=b"kernels"):
        self.given, self.compiled = None, compiled

    def create_runtime_cache(self):
        return self

    def set_runtime_cache(self, cache):
        assert cache is self

    def deserialize(self, content):
        self.given = content
        return True

    def serialize(self):
        return self.compiled


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(files=(("a.plan", "0"),)):
    """What an opening with this engine is given."""
    cache, runtime = JitCache(RTX, dict(files)), Runtime()
    cache.attach(runtime)
    return runtime.given


@pytest.fixture
def kept(folder):
    """The file that one opening has left."""
    cache = JitCache(RTX, {"a.plan": "0"})
    cache.attach(Runtime())
    cache.save()
    (file,) = folder.iterdir()
    return file


def test_what_is_kept_comes_back_to_the_same_engine_alone(kept, folder):
    assert opened() == b"kernels"
    assert opened([("a.plan", "1")]) is None
    assert oct(folder.stat().st_mode & 0o777) == "0o700"
    assert oct(kept.stat().st_mode & 0o777) == "0o600"
    other = JitCache(RTX, {"a.plan": "1"})
    kept.rename(other.path)
    assert opened([("a.plan", "1")]) is None


def test_it_is_written_only_if_something_was_compiled(kept):
    before = kept.stat().st_ino
    cache = JitCache(RTX, {"a.plan": "0"})
    cache.attach(Runtime())
    cache.save()
    assert kept.stat().st_ino == before
    cache._cache.compiled = b"KERNELS"  # Of the same length.
    cache.save()
    assert opened() == b"KERNELS"


def test_a_cache_that_gives_nothing_is_not_kept(folder, caplog):
    cache = JitCache(RTX, {"a.plan": "0"})
    cache.attach(Runtime(compiled=None))
    cache.save()
    assert not folder.exists()
    assert "compiled kernels are not kept: TensorRT-RTX gives none" in caplog.text


@pytest.mark.parametrize("content", [b"", b"short", b"\0" * 32 + b"kernels"])
def test_a_damaged_entry_is_not_used(kept, caplog, content):
    kept.write_bytes(content)
    assert opened() is None
    assert "is damaged; it is renewed" in caplog.text


def test_an_entry_with_a_plain_hash_is_not_used(kept):
    """The hash is of the key too, so that an entry cannot be another's."""
    kept.write_bytes(hashlib.sha256(b"kernels").digest() + b"kernels")
    assert opened() is None


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702])
def test_a_folder_that_others_may_write_is_not_used(kept, folder, caplog, mode):
    folder.chmod(mode)
    assert opened() is None
    assert "must belong to this user, be writable by nobody else" in caplog.text
    kept.unlink()
    cache = JitCache(RTX, {"a.plan": "0"})
    cache.attach(Runtime())
    cache.save()
    assert list(folder.iterdir()) == []
    assert "compiled kernels are not kept" in caplog.text


def test_a_file_that_others_may_write_is_not_used(kept, caplog):
    kept.chmod(0o620)
    assert opened() is None
    assert "mode -rw--w----" in caplog.text


def test_another_s_folder_is_not_used(kept, monkeypatch, caplog):
    monkeypatch.setattr(os, "geteuid", lambda: kept.stat().st_uid + 1)
    assert opened() is None
    assert "must belong to this user" in caplog.text


def test_a_link_is_no_folder(kept, folder, tmp_path, caplog):
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    assert opened() is None
    assert "be no link" in caplog.text


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_not_waited_for(kept, caplog, kind):
    kept.unlink()
    os.mkfifo(kept) if kind == "pipe" else kept.mkdir()
    assert opened() is None
    assert "kept kernels are not used" in caplog.text


def test_the_platform_s_folder(monkeypatch, tmp_path):
    pytest.importorskip("platformdirs")
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    for given, wanted in (
        (str(tmp_path), tmp_path / "forcing_kv"),
        ("", tmp_path / ".cache/forcing_kv"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache_folder() == wanted


def test_tensorrt_has_no_such_cache(folder):
    cache = JitCache(SimpleNamespace(), {})
    cache.save()
    assert not cache.available
    assert not folder.exists()
