"""What every test may use: capability markers, blocked imports, and the hypothesis profile.

It also says how the tests run in parallel (pyproject.toml asks for `-n auto --dist loadfile`): a
file's tests share fixtures, so a file stays with one worker; bundles are shared between files and
workers (doubles/shared_exports.py).
"""

import ctypes
import gc
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

IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IN_WORKER:
    # Workers that have a thread for every core each would wait for one another.
    os.environ |= dict.fromkeys(("MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")

# Looking for cycles among all that PyTorch and ONNX made took an eighth of the processor time.
gc.set_threshold(50_000, 10, 10)

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


TEST_CACHE = "FORCING_KV_TEST_CACHE"
"""Environment variable: where shared bundles lie. Set it to keep them from one run to the next."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Workers pay where folders of tests run. Each imports torch, so a file is quicker without.

    None is one a core. Tests that need a GPU, or are slow for what they fill or compile, have the
    machine to themselves: give `-n` to run those, or the others beside a GPU, in parallel too.
    """
    in_parts = not all(Path(argument).is_dir() for argument in config.args)
    chosen = config.option.markexpr != "not slow" or config.option.keyword
    return 0 if in_parts or chosen or missing_gpu() is None else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first, so that no worker is left alone with it."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session", autouse=True)
def _shared_bundles(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Names the folder of shared bundles: one for all workers of a run."""
    base = tmp_path_factory.getbasetemp()
    own = (base.parent if IN_WORKER else base) / "bundles"
    os.environ[TEST_CACHE] = str(Path(os.environ.get(TEST_CACHE, own)).resolve())


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
