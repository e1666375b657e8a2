"""What `fkv build` can be asked for, checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args

from cyclopts import Parameter

from forcing_kv.export.request.flags import Int, between, flags, panel
from forcing_kv.runtime_trt.errors import InputError

TensorRtBackend = Literal["tensorrt", "tensorrt-rtx"]
Frontend = Literal["onnx", "torch-tensorrt"]
PlanAttention = Literal["auto", "plugin", "native"]
Verbosity = Literal["detailed", "layer-names", "none"]

RTX_TARGETS = ("sm80", "sm86", "sm89", "sm120", "sm121")
"""Compute capabilities that TensorRT-RTX 1.7 builds our graphs for. Data-centre Hopper is not among
its own; for Turing (sm75) it has neither bfloat16 nor float32 products, and every bundle needs
one of them."""

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Python module of each builder."""


TENSORRT = panel("TensorRT")


@flags(TENSORRT)
@dataclass(frozen=True, kw_only=True)
class TensorRtOptions:
    """How engines of either TensorRT are built."""

    target: Annotated[
        str | None,
        Parameter(
            help=f"tensorrt-rtx: GPU to build for, {', '.join(RTX_TARGETS)}; needs no GPU here. "
            "Default: the GPU of this machine."
        ),
    ] = None
    frontend: Frontend = "onnx"
    """`onnx` parses the bundle's graphs; `torch-tensorrt` converts the exported programs."""
    version_compatible: bool = False
    """Run on later versions and on the lean runtime."""
    hardware_compatible: bool = False
    """Run on every GPU from Ampere on; kernels use 48 KiB of shared memory at most."""
    portable_kernels: bool = False
    """Give our plugins only kernels for every GPU from Ampere on, with 48 KiB of shared memory at
    most: should TensorRT refuse others."""
    refit: bool = False
    """Weights can be replaced (--refit-from), all of them or, if stripped, those left out."""
    strip_weights: bool = False
    """Leave the weights out and read them from the bundle on opening."""
    tf32: bool = False
    """Allow TF32 in float32 products; about 1e-3 instead of 1e-6 from the reference."""
    workspace_gb: float | None = None
    """Largest scratch of a kernel. Default: the builder's choice."""
    optimization_level: Annotated[Int | None, between(0, 5)] = None
    """0 (fast build) to 5 (thorough). Default: the builder's, 3."""
    profiling_verbosity: Verbosity = "detailed"
    """What an engine says about its layers."""


@dataclass(frozen=True)
class EngineOptions(TensorRtOptions):
    """Options of a TensorRT or TensorRT-RTX build.

    Raises:
        InputError: an option is unknown, or does not fit the backend.
    """

    backend: TensorRtBackend
    attention: PlanAttention = "auto"
    """What steady chunks attend with: `plugin`, our kernel, which serves every chunk; `native`,
    NVIDIA's fused layer in a second engine; `auto` keeps the faster of both, timed on the GPU.
    TensorRT-RTX, which has no plugins, has native alone."""

    def __post_init__(self) -> None:
        where = f"--backend {self.backend}"
        for name, allowed in (
            ("backend", get_args(TensorRtBackend)),
            ("frontend", get_args(Frontend)),
            ("profiling_verbosity", get_args(Verbosity)),
            ("attention", get_args(PlanAttention)),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}; allowed are {list(allowed)}")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise InputError(f"optimization level is {self.optimization_level}; allowed are 0 to 5")
        if self.workspace_gb is not None and self.workspace_gb <= 0:
            raise InputError(f"workspace is {self.workspace_gb} GB; it must be positive")
        if self.strip_weights and self.frontend == "torch-tensorrt":
            raise InputError(
                "--frontend torch-tensorrt gives weights names of its own, by which the bundle "
                "cannot supply them; leave out --strip-weights, or take --frontend onnx"
            )
        if self.frontend == "torch-tensorrt" and self.attention == "native":
            raise InputError(
                "--frontend torch-tensorrt has --attention plugin alone; take --frontend onnx"
            )
        if self.backend == "tensorrt-rtx":
            self._check_rtx(where)
        elif self.target is not None:
            raise InputError(
                f"{where} builds for the GPU of the machine it runs on and takes no --target; "
                "build on such a machine, or use --hardware-compatible"
            )

    def _check_rtx(self, where: str) -> None:
        if self.target is not None and self.target not in RTX_TARGETS:
            raise InputError(
                f"{where} cannot build for {self.target}; its targets are {list(RTX_TARGETS)} "
                "(for an H100 or H200, sm90, use --backend tensorrt)"
            )
        refused = {
            "--version-compatible": self.version_compatible,
            "--hardware-compatible (build once for each --target)": self.hardware_compatible,
            "--portable-kernels (it has no plugins)": self.portable_kernels,
            "--frontend torch-tensorrt": self.frontend != "onnx",
            "--attention plugin": self.attention == "plugin",
        }
        for option, given in refused.items():
            if given:
                raise InputError(f"{where} does not have {option}")

    def attentions(self, dtype: str) -> tuple[PlanAttention, ...]:
        """What steady chunks may attend with; the first is there in any case.

        Raises:
            InputError: native attention is asked for in float32, in which NVIDIA has none.
        """
        if self.backend == "tensorrt-rtx":
            return ("native",)
        fused = dtype != "float32" and self.frontend == "onnx"
        if self.attention == "native" and not fused:
            raise InputError(
                "TensorRT has no fused attention in float32; take --attention plugin, or export "
                "with --dtype bfloat16"
            )
        if self.attention == "auto":
            # Without their weights there is nothing to time.
            timed = fused and not self.strip_weights
            return ("plugin", "native") if timed else ("plugin",)
        return (self.attention,)

    @property
    def module(self) -> str:
        return MODULES[self.backend]

    @property
    def needs_gpu(self) -> bool:
        """Whether the build runs kernels: always for TensorRT; for RTX to refit or strip."""
        return self.target is None or self.refit or self.strip_weights

    def to_json(self) -> dict[str, Any]:
        """What differs from the defaults, as plain data for an engine record."""
        changed = {
            field.name: getattr(self, field.name)
            for field in (*fields(TensorRtOptions), *fields(EngineOptions))
            if field.name != "backend" and getattr(self, field.name) != field.default
        }
        return {"backend": self.backend, **changed}
