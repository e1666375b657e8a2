"""The C++ compiler is pointed to CUDA's headers and to the driver's library, and back."""

import os

import pytest

from forcing_kv.export.inductor import toolchain
from forcing_kv.runtime_trt.errors import BackendUnavailableError


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    for name in ("CUDA_PATH", "CPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "missing"))
    monkeypatch.setenv("LIBRARY_PATH", "/before")
    (tmp_path / "cuda-13/include").mkdir(parents=True)
    (tmp_path / "cuda-13/include/cuda.h").touch()
    (tmp_path / "cuda-13/bin").mkdir()
    (tmp_path / "cuda-13/bin/nvcc").touch(mode=0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").symlink_to(tmp_path / "cuda-13/bin/nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    library = tmp_path / "driver/libcuda.so.1"
    library.parent.mkdir()
    library.touch()
    monkeypatch.setattr(toolchain, "_driver_library", lambda: library)
    return tmp_path


def test_compiler_finds_headers_and_driver_in_the_block_alone(toolkit):
    with toolchain.cuda_toolchain():
        assert os.environ["CPATH"] == str(toolkit / "cuda-13/include")
        link, before = os.environ["LIBRARY_PATH"].split(os.pathsep)
        assert before == "/before"
        linked = f"{link}/libcuda.so"
        assert os.path.realpath(linked) == str(toolkit / "driver/libcuda.so.1")
    assert "CPATH" not in os.environ
    assert os.environ["LIBRARY_PATH"] == "/before"
    assert not os.path.lexists(linked)


def test_missing_headers_are_named(toolkit, monkeypatch):
    monkeypatch.setattr(toolchain, "_toolkits", lambda: iter([toolkit / "missing"]))
    with pytest.raises(BackendUnavailableError, match=r"cuda\.h.*missing; set CUDA_HOME"):
        toolchain.find_headers()
