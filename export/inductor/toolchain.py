"""What AOTInductor's C++ is compiled and linked against on CUDA, found where PyTorch may miss it.

PyTorch takes the folder above the first `nvcc` on the path for the toolkit, which a wrapper script
or a link defeats, and links with `-lcuda`, though a driver installs `libcuda.so.1` alone, often
outside of the linker's path.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from forcing_kv.runtime_trt.bundle.atomic.files import scratch_folder
from forcing_kv.runtime_trt.errors import BackendUnavailableError

DRIVER_LIBRARY = "libcuda.so"


def find_headers() -> Path:
    """The folder that holds `cuda.h`.

    Raises:
        BackendUnavailableError: there is none; names the places that were looked at.
    """
    looked = list(dict.fromkeys(_toolkits()))
    for toolkit in looked:
        if (toolkit / "include/cuda.h").is_file():
            return toolkit / "include"
    raise BackendUnavailableError(
        "compiling for CUDA needs the toolkit's header cuda.h, which is not in the folder include "
        f"of {', '.join(map(str, looked))}; set CUDA_HOME to the toolkit"
    )


def _toolkits() -> Iterator[Path]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    if nvcc := shutil.which("nvcc"):
        yield Path(nvcc).resolve().parents[1]
    yield Path("/usr/local/cuda")
    # PyTorch's wheels for CUDA bring the headers as a package.
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(folder).glob("cu[0-9]*"), reverse=True)


@contextmanager
def cuda_toolchain() -> Iterator[None]:
    """Let the C++ compiler find CUDA's headers and the driver's library while in the block.

    Raises:
        BackendUnavailableError: one of them is not there.
    """
    with ExitStack() as stack:
        link = stack.enter_context(scratch_folder())
        (link / DRIVER_LIBRARY).symlink_to(_driver_library())
        for name, folder in (("CPATH", find_headers()), ("LIBRARY_PATH", link)):
            stack.callback(_restore, name, os.environ.get(name))
            os.environ[name] = os.pathsep.join(filter(None, (str(folder), os.environ.get(name))))
        yield


def _driver_library() -> Path:
    """The driver's library, found as Triton finds it."""
    from triton.backends.nvidia.driver import libcuda_dirs

    try:
        folders = [Path(folder) for folder in libcuda_dirs()]
    except (AssertionError, OSError) as error:
        raise BackendUnavailableError(
            f"compiling for CUDA needs the driver's library: {error}"
        ) from error
    names = (DRIVER_LIBRARY, f"{DRIVER_LIBRARY}.1")
    found = [folder / name for folder in folders for name in names if (folder / name).is_file()]
    if not found:
        raise BackendUnavailableError(
            f"compiling for CUDA needs the driver's {DRIVER_LIBRARY}.1, which is not in "
            f"{', '.join(map(str, folders))}; set TRITON_LIBCUDA_PATH to its folder"
        )
    return found[0]


def _restore(name: str, value: str | None) -> None:
    if value is None:
        del os.environ[name]
    else:
        os.environ[name] = value
