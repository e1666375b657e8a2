"""Compiles a deployment's graphs with AOTInductor into one package with one set of weights.

The package (`.pt2`) holds machine code alone. The weights stay outside and are handed over when it
is loaded, so that every graph and every session reads the same copy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram

from forcing_kv.export.inductor.toolchain import cuda_toolchain
from forcing_kv.export.model.capture import GraphSource
from forcing_kv.export.model.fp8 import compiler_body as fp8_body
from forcing_kv.export.model.fusion import FUSED, FusionOptions, SteadyAttention
from forcing_kv.plugins.bind.compiler_bodies import Bodies, aten_bodies, cuda_bodies
from forcing_kv.plugins.compile.tuning import measured_best
from forcing_kv.plugins.registry import STEADY_ATTENTION
from forcing_kv.plugins.steady_attention.cuda_body import KERNELS
from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo, TensorInfo
from forcing_kv.runtime_trt.bundle.hashes import sha256_of
from forcing_kv.runtime_trt.dtypes import dtype_name
from forcing_kv.runtime_trt.errors import BackendUnavailableError, InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig

_log = logging.getLogger(__name__)

PACKAGE_FILE = "package.pt2"

NO_CUDA = (
    "an Inductor engine for CUDA is compiled on the machine that will run it, and PyTorch finds no "
    "CUDA device here; build there, or give --device cpu"
)

_SHARED_WEIGHTS = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
}
_CUDA = {
    # The only index is the denoise step's, in every norm: the check would cost registers there.
    "assert_indirect_indexing": False,
    # A captured chunk runs the C++ around the launches once. Optimised, a pass of 30 layers takes
    # 16 s to compile instead of 8.
    "aot_inductor.compile_wrapper_opt_level": "O0",
}
_AUTOTUNE = {
    "max_autotune": True,
    "max_autotune_gemm_backends": "ATEN,TRITON",
    # Epilogues (bias, GELU, gates) join the matrix products that the search picks.
    "epilogue_fusion": True,
}


@dataclass(frozen=True)
class InductorOptions:
    """How a package is compiled."""

    device: Literal["cpu", "cuda"] = "cuda"
    fusion: FusionOptions = FUSED
    """Fusions of the graphs; see there."""
    autotune: bool = True
    """Measure matrix-product kernels on the device and keep the fastest; CUDA alone."""
    tactics: Mapping[str, str] = field(default_factory=dict)
    """Tactic of an operator's Triton kernel by the operator's torch name; CUDA alone. Others take
    the measured one, or the device's default."""

    def bodies(self) -> Bodies:
        cpu = self.device == "cpu"
        own = aten_bodies() if cpu else cuda_bodies(self.tactics, self.fusion.attention)
        return own | fp8_body(self.device)

    def inductor_settings(self) -> dict[str, Any]:
        """Settings of PyTorch's compiler."""
        if self.device == "cpu":
            return dict(_SHARED_WEIGHTS)
        return _SHARED_WEIGHTS | _CUDA | (_AUTOTUNE if self.autotune else {})


def choose_attention(
    wanted: Literal["auto", "cudnn", "flash", "triton"], device: str, config: RolloutConfig
) -> SteadyAttention:
    """What steady chunks of a package attend with.

    Args:
        wanted: a kernel, or `auto` for the fastest that was measured on this GPU; where none was,
            cuDNN on Hopper and data-centre Blackwell, and Triton elsewhere.
        device: cpu or cuda, the one of this machine.

    Raises:
        InputError: there is no such kernel on this device, or it refuses the model's shapes.
        BackendUnavailableError: there is no CUDA device to choose for.
    """
    if device == "cpu":
        if wanted != "auto":
            raise InputError(f"--attention {wanted} is a kernel for CUDA; leave it out on a CPU")
        return "torch"
    if config.dtype == "float32":
        if wanted in KERNELS:
            raise InputError(
                f"--attention {wanted} has no float32; take triton, or export with --dtype bfloat16"
            )
        return "triton"
    if wanted == "triton":
        return wanted
    if not torch.cuda.is_available():
        raise BackendUnavailableError(NO_CUDA)
    chosen = _fastest_attention(config) if wanted == "auto" else wanted
    refusal = None if chosen == "triton" else refused_attention(chosen, config, device)
    if refusal is None:
        return chosen
    if wanted != "auto":
        raise InputError(
            f"--attention {wanted} refuses this model on this GPU: {refusal}; take triton, or "
            "leave the option out"
        )
    _log.warning("steady chunks attend with triton: %s refuses the model: %s", chosen, refusal)
    return "triton"


def refused_attention(kernel: str, config: RolloutConfig, device: str) -> str | None:
    """Why a dense kernel does not take a steady chunk, in PyTorch's words; None if it does.

    It is called, for what it takes depends on the GPU, its driver and cuDNN, and a package that
    holds it would say so at its first chunk only.
    """
    num_new, group = config.chunk.num_tokens, config.layouts[-1].groups[-1]
    shape = (1, group.num_heads, num_new + group.steady_rows, config.model.head_dim)
    keys = torch.zeros(shape, dtype=getattr(torch, config.dtype), device=device)
    try:
        KERNELS[kernel](keys[:, :, :num_new], keys, keys).sum().item()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return str(error).strip().partition("\n")[0]
    return None


def _fastest_attention(config: RolloutConfig) -> SteadyAttention:
    """What was measured to be fastest on this GPU, or a default."""
    layer = config.layouts[-1]
    sizes = {
        "H": config.model.num_heads,
        "N": config.chunk.num_tokens,
        "D": config.model.head_dim,
        "R": layer.num_rows,
    }
    names = (*KERNELS, "triton")
    gpu = torch.cuda.get_device_name()
    measured = measured_best(STEADY_ATTENTION, names, gpu, config.dtype, sizes)
    if measured is not None:
        return cast(SteadyAttention, measured)
    return "cudnn" if torch.cuda.get_device_capability()[0] in (9, 10) else "triton"


@dataclass(frozen=True)
class CompiledPackage:
    """What compiling gave."""

    path: Path
    graphs: dict[str, GraphInfo]
    """Inputs and outputs of each graph; their file is the package."""
    constants: dict[str, Tensor]
    """Everything that the graphs must be given when loaded, by name."""


def compile_sources(
    sources: Iterable[GraphSource],
    folder: Path,
    options: InductorOptions,
    report: Callable[[str], None] = lambda _: None,
) -> CompiledPackage:
    """Compile graphs and write their package.

    Args:
        sources: the graphs, weights on the target device; constants of one name are one tensor.
        folder: existing directory that receives the package.
        report: told the name of each graph when it begins.

    Returns:
        The package. Its constants share memory with the graphs' modules.
    """
    from torch._inductor.package.package import package_aoti
    from torch.export.pt2_archive._package import load_pt2

    files: dict[str, Any] = {}
    constants: dict[str, Tensor] = {}
    ports: dict[str, tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]] = {}
    for source in sources:
        report(source.name)
        with torch.no_grad():
            program = source.capture().run_decompositions(options.bodies())
            files[source.name] = _compile(program, source.arguments, options)
        ports[source.name] = _inputs_and_outputs(source, program)
        held = {**program.state_dict, **program.constants}
        constants |= {name: value for name, value in held.items() if isinstance(value, Tensor)}
    report("package")
    path = folder / PACKAGE_FILE
    package_aoti(str(path), files)
    sha256 = sha256_of(path)
    graphs = {name: GraphInfo(PACKAGE_FILE, sha256, *pair) for name, pair in ports.items()}
    loaded = load_pt2(str(path), run_single_threaded=True).aoti_runners
    needed = {
        name: constants[name] for graph in graphs for name in loaded[graph].get_constant_fqns()
    }
    return CompiledPackage(path, graphs, needed)


def _compile(program: ExportedProgram, arguments: tuple[Any, ...], options: InductorOptions) -> Any:
    """Compile one graph; returns the compiler's files."""
    from torch._inductor import aot_compile

    module = program.module(check_guards=False)
    with cuda_toolchain() if options.device == "cuda" else nullcontext():
        return aot_compile(module, arguments, options=options.inductor_settings())


def _inputs_and_outputs(
    source: GraphSource, program: ExportedProgram
) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    (outputs,) = program.graph.output_node().args
    shapes = [node.meta["val"] for node in cast(Any, outputs)]
    inputs = torch.utils._pytree.tree_leaves(source.arguments)
    return (
        tuple(map(tensor_info, source.input_names, inputs)),
        tuple(map(tensor_info, source.output_names, shapes)),
    )


def tensor_info(name: str, tensor: Tensor) -> TensorInfo:
    """What a manifest says of a graph's input or output."""
    return TensorInfo(name, tuple(tensor.shape), dtype_name(tensor.dtype))
