"""What every test may use: capability markers, blocked imports, and the hypothesis profile."""

import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("forcing_kv", deadline=None, print_blob=True)
settings.load_profile("forcing_kv")

# Output is compared as plain text, also where the environment asks for colours.
for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"):
    os.environ.pop(name, None)

HEAVY_MODULES = (
    "PIL",
    "av",
    "cuda",
    "diffusers",
    "ftfy",
    "matplotlib",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "polygraphy",
    "safetensors",
    "scipy",
    "sentencepiece",
    "sklearn",
    "tensorrt",
    "tensorrt_rtx",
    "torch",
    "transformers",
    "triton",
)
"""Everything that the core install does not bring."""

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


@cache
def missing_gpu() -> str | None:
    """Returns what stops this machine from running CUDA, None if nothing does."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "an NVIDIA driver (libcuda.so.1)"
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "an NVIDIA GPU (the driver reports none)"
    return None


@cache
def missing_tensorrt() -> str | None:
    """Returns what stops this machine from running TensorRT, None if nothing does."""
    if importlib.util.find_spec("tensorrt") is None:
        return "the Python package tensorrt"
    return missing_gpu()


@pytest.fixture(autouse=True)
def _capabilities(request: pytest.FixtureRequest) -> None:
    """Skips a test whose marker names what this machine lacks."""
    for marker, missing in (("gpu", missing_gpu), ("trt", missing_tensorrt)):
        if request.node.get_closest_marker(marker) and (what := missing()):
            pytest.skip(f"needs {what}")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def run_blocked(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python code in a fresh process, in an empty folder, with modules made unimportable."""

    def run(code: str, blocked: Sequence[str] = HEAVY_MODULES) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", BLOCKER.format(blocked=set(blocked)) + code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    return run
