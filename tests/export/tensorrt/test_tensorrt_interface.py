"""Every name of TensorRT's that we use, looked up in the real Python packages.

None of this needs a GPU, nor a builder: `tensorrt` imports over stub libraries (see
tests/plugins/bind/tensorrt_stubs.py), and the lean runtime and TensorRT-RTX are on PyPI whole.
"""

import ast
import importlib.util
import re
import sys

import pytest

from forcing_kv.export.tensorrt.options import EngineOptions
from forcing_kv.runtime_trt.dtypes import BY_TENSORRT

BUILDER_FILES = (
    "export/tensorrt/builder.py",
    "export/tensorrt/plugins.py",
    "export/tensorrt/stripped.py",
    "export/tensorrt/refit.py",
)
RUNTIME_FILES = (
    "runtime_trt/tensorrt/engine.py",
    "runtime_trt/tensorrt/jit_cache.py",
    "runtime_trt/tensorrt/refit.py",
)
NAME = re.compile(r"(?:self\.(?:_plans\.)?)?trt\.([A-Z][\w.]*)")
"""A class of the module's, or a member of one, as the sources write it."""

RTX_ALONE = {"CudaGraphStrategy", "CudaGraphStrategy.DISABLED"}
"""Names behind a check that only TensorRT-RTX passes."""

RUNTIME_MEMBERS = {
    "Runtime": ("deserialize_cuda_engine", "engine_host_code_allowed"),
    "ICudaEngine": (
        "create_execution_context", "device_memory_size_v2", "get_tensor_dtype", "get_tensor_mode",
        "get_tensor_name", "get_tensor_shape", "num_aux_streams", "num_io_tensors",
    ),
    "IExecutionContext": ("execute_async_v3", "set_device_memory", "set_tensor_address"),
    "Refitter": ("get_missing_weights", "refit_cuda_engine", "set_named_weights"),
}  # fmt: skip
"""Members of objects by class; each is checked to occur in the sources."""
RTX_RUNTIME_MEMBERS = {
    "ICudaEngine": ("create_runtime_config",),
    "IExecutionContext": ("is_stream_capturable",),
    "IRuntimeCache": ("deserialize", "serialize"),
    "IRuntimeConfig": (
        "create_runtime_cache", "cuda_graph_strategy", "set_execution_context_allocation_strategy",
        "set_runtime_cache",
    ),
}  # fmt: skip
BUILDER_MEMBERS = {
    "Builder": ("create_network",),
    "IBuilderConfig": ("clear_flag", "set_flag"),
    "ICudaEngine": ("create_serialization_config", "serialize_with_config"),
    "IAttention": ("decomposable",),
    "IAttentionInputLayer": ("attention",),
    "INetworkDefinition": ("get_layer", "mark_weights_refittable", "num_layers"),
    "ISerializationConfig": ("set_flag",),
    "IProgressMonitor": ("phase_finish", "phase_start", "step_complete"),
    "OnnxParser": ("get_error", "num_errors", "parse_from_file"),
    "Refitter": ("get_all_weights",),
}


@pytest.fixture(scope="module")
def tensorrt(repository, tmp_path_factory):
    """The module `tensorrt`, real or on stub libraries."""
    path = repository / "tests/plugins/bind/tensorrt_stubs.py"
    spec = importlib.util.spec_from_file_location("tensorrt_stubs", path)
    stubs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stubs)
    if "tensorrt" not in sys.modules and importlib.util.find_spec("tensorrt_libs") is None:
        if (reason := stubs.missing()) is not None:
            pytest.skip(f"needs {reason}")
        stubs.load(tmp_path_factory.mktemp("stubs"))
    return pytest.importorskip("tensorrt", reason="needs the Python package tensorrt")


@pytest.fixture
def trt(request):
    """A module by name: tensorrt, tensorrt_lean or tensorrt_rtx."""
    if request.param == "tensorrt":
        return request.getfixturevalue("tensorrt")
    return pytest.importorskip(request.param, reason=f"needs the Python package {request.param}")


def names_in(repository, files):
    """Dotted names of the module's that the sources mention, such as BuilderFlag.TF32."""
    found = set()
    for file in files:
        for node in ast.walk(ast.parse((repository / file).read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if match := NAME.fullmatch(text):
                found.add(match[1])
    return found


def absent(trt, names):
    """Names that the module does not have."""
    missing = []
    for name in sorted(names):
        holder = trt
        for part in name.split("."):
            holder = getattr(holder, part, None)
        if holder is None:
            missing.append(name)
    return missing


def dotted(members):
    return {f"{holder}.{name}" for holder, names in members.items() for name in names}


def test_the_lists_above_are_of_the_sources(repository):
    for files, lists in (
        (RUNTIME_FILES, (RUNTIME_MEMBERS, RTX_RUNTIME_MEMBERS)),
        (BUILDER_FILES, (BUILDER_MEMBERS,)),
    ):
        text = "".join((repository / file).read_text() for file in files)
        unused = [name for each in lists for names in each.values() for name in names]
        assert not [name for name in unused if name not in text]
    assert {"Runtime", "Refitter", "TensorIOMode.INPUT"} <= names_in(repository, RUNTIME_FILES)
    assert {"Builder", "BuilderFlag.TF32"} <= names_in(repository, BUILDER_FILES)


@pytest.mark.parametrize("trt", ["tensorrt", "tensorrt_lean", "tensorrt_rtx"], indirect=True)
def test_the_runtime_has_what_we_use(trt, repository):
    names = names_in(repository, RUNTIME_FILES) | dotted(RUNTIME_MEMBERS)
    names |= {f"DataType.{name}" for name in BY_TENSORRT}
    names |= {f"ILogger.Severity.{name}" for name in ("INTERNAL_ERROR", "ERROR", "WARNING")}
    if trt.__name__ == "tensorrt_rtx":
        names |= dotted(RTX_RUNTIME_MEMBERS)
    else:
        names -= RTX_ALONE
        # What the code takes for the mark of TensorRT-RTX.
        assert not hasattr(trt, "IRuntimeCache")
    assert not absent(trt, names)
    assert "size" in trt.IExecutionContext.set_device_memory.__doc__
    assert "strategy" in trt.ICudaEngine.create_execution_context.__doc__


@pytest.mark.parametrize("trt", ["tensorrt", "tensorrt_rtx"], indirect=True)
def test_the_builder_has_what_we_use(trt, repository):
    names = names_in(repository, BUILDER_FILES) | dotted(BUILDER_MEMBERS)
    if trt.__name__ == "tensorrt_rtx":
        names -= {"HardwareCompatibilityLevel.AMPERE_PLUS"}  # Refused by EngineOptions.
        names |= {"BuilderFlag.REQUIRE_USER_ALLOCATION", "ComputeCapability.SM89"}
    # What Polygraphy sets for our options.
    names |= {f"BuilderFlag.{flag}" for flag in ("REFIT", "STRIP_PLAN", "VERSION_COMPATIBLE")}
    names |= {f"ProfilingVerbosity.{level}" for level in ("DETAILED", "LAYER_NAMES_ONLY", "NONE")}
    names |= {
        f"IBuilderConfig.{name}"
        for name in (
            "builder_optimization_level", "hardware_compatibility_level", "max_aux_streams",
            "profiling_verbosity", "progress_monitor", "set_memory_pool_limit", "set_timing_cache",
        )
    }  # fmt: skip
    assert not absent(trt, names)


@pytest.mark.parametrize("trt", ["tensorrt_rtx"], indirect=True)
def test_the_targets_are_those_of_the_package(trt):
    from forcing_kv.export.tensorrt.options import RTX_TARGETS

    known = {f"sm{name[2:]}" for name in trt.ComputeCapability.__members__ if name[2:].isdigit()}
    assert set(RTX_TARGETS) <= known
    for target in RTX_TARGETS:
        assert EngineOptions("tensorrt-rtx", target=target).module == trt.__name__
