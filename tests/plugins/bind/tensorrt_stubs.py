"""TensorRT's Python package on a machine without libnvinfer, for the code in `tensorrt.plugin`.

The extension module of `tensorrt` wants three libraries. Tiny ones, compiled here, carry their
names; the two entry points that plugin registration needs are forwarded to the lean runtime, which
is on PyPI, and the others give nothing. So NVIDIA's own decorators check our registrations and the
real registry holds them; `Builder`, `OnnxParser` and `Runtime` do not work.

Needs, installed with `pip install --no-deps`: tensorrt-cu13-bindings, tensorrt-cu13,
tensorrt-lean-cu13-libs, all of one version 11.x; and a C compiler.

Usage: python tensorrt_stubs.py says what is missing, and fails, or nothing.
"""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

LEAN = "libnvinfer_lean.so.11"
PACKAGES = ("tensorrt", "tensorrt_bindings", "tensorrt_lean_libs")
FORWARDED = ("getPluginRegistry", "getInferLibVersion")
ABSENT = {
    "libnvinfer.so.11": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
    ),
    "libnvonnxparser.so.11": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
    "libnvinfer_plugin.so.11": ("initLibNvInferPlugins",),
}


def missing() -> str | None:
    """What is missing here, None if nothing is."""
    if shutil.which("cc") is None:
        return "a C compiler (cc)"
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        return f"the Python modules {', '.join(absent)} (tensorrt-cu13 and its lean libraries)"
    return None


def source_of(library: str) -> str:
    """C source of a stub library."""
    lines = ["#include <dlfcn.h>", "#include <stdlib.h>"]
    lines += [f"void *{name}(void) {{ return 0; }}" for name in ABSENT[library]]
    if library == "libnvinfer.so.11":
        lines += [
            f"""
            void *{name}(void) {{
                void *lean = dlopen("{LEAN}", RTLD_NOW | RTLD_NOLOAD);
                void *(*function)(void) = lean ? dlsym(lean, "{name}") : 0;
                if (!function) abort();
                return function();
            }}"""
            for name in FORWARDED
        ]
    return "\n".join(lines)


def load(folder: Path) -> list[ctypes.CDLL]:
    """Compile and load the stubs; after this `import tensorrt` works in this process."""
    spec = importlib.util.find_spec("tensorrt_lean_libs")
    assert spec is not None
    assert spec.submodule_search_locations
    lean = Path(spec.submodule_search_locations[0]) / LEAN
    loaded = [ctypes.CDLL(str(lean), mode=ctypes.RTLD_LOCAL)]
    for library in ABSENT:
        target = folder / library
        command = ["cc", "-xc", "-", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", target]
        subprocess.run(command, input=source_of(library).encode(), check=True)
        loaded.append(ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL))
    return loaded


if __name__ == "__main__":
    sys.exit(missing())
