"""`fkv selftest`: a verdict with figures on whether a backend works on this machine."""

from __future__ import annotations

import platform
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, cast

from forcing_kv.export.request.flags import Json, flags
from forcing_kv.runtime_trt.bundle.atomic.files import scratch_folder
from forcing_kv.runtime_trt.bundle.atomic.locks import claimed
from forcing_kv.runtime_trt.console import ExitCode, print_json, project_version, talk
from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.runtime_trt.errors import ForcingKvError, InputError
from forcing_kv.tools.bench.report.environment import installed_versions

if TYPE_CHECKING:
    from forcing_kv.runtime_trt.backends.base import Backend
    from forcing_kv.runtime_trt.rollout.layout import ModelShape

PACKAGES = (
    "tensorrt", "tensorrt-lean", "tensorrt-rtx", "cuda-bindings", "polygraphy", "triton", "torch",
    "onnx", "onnxruntime", "numpy",
)  # fmt: skip
NUM_CHUNKS = 6
BackendName = Literal["tensorrt", "tensorrt-rtx", "inductor", "onnxruntime"]


@dataclass
class Stage:
    """One step of the self-test."""

    name: str
    passed: bool
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


@flags()
@dataclass(frozen=True, kw_only=True)
class SelftestOptions:
    """What is tested.

    Raises:
        InputError: the backend does not run there.
    """

    backend: BackendName = "tensorrt"
    """What runs the model."""
    dtype: DType = "float16"
    """What it computes in."""
    fp8: bool = False
    """Linear layers in FP8."""
    device: Literal["cuda", "cpu"] = "cuda"
    """inductor: the one of this machine."""

    def __post_init__(self) -> None:
        if self.device == "cpu" and self.backend.startswith("tensorrt"):
            raise InputError(
                f"--backend {self.backend} runs on a GPU alone; leave out --device cpu"
            )

    @property
    def used_device(self) -> str:
        """Where it runs: ONNX Runtime on the CPU, the others where they are told."""
        return "cpu" if self.backend == "onnxruntime" else self.device


def selftest(
    *,
    options: SelftestOptions = SelftestOptions(),
    keep: Path | None = None,
    force: bool = False,
    as_json: Json = False,
) -> ExitCode:
    """Export, build, run and verify a small random model; prints a report to paste in an issue.

    Args:
        options: what is tested.
        keep: Keep the bundle in this directory.
        force: Replace a bundle that is there.
        as_json: Print the report as JSON.
    """
    with ExitStack() as stack:
        if keep is not None:
            from forcing_kv.export.bundle.write import check_target

            stack.enter_context(claimed(keep))
            check_target(keep, force=force)
        stages = run_stages(keep or stack.enter_context(scratch_folder()) / "bundle", options)
    passed = all(stage.passed for stage in stages)
    report = {
        **asdict(options), "device": options.used_device, "passed": passed,
        "stages": [asdict(stage) for stage in stages],
    }  # fmt: skip
    if as_json:
        print_json(report)
    else:
        print(render(report, stages))
    return ExitCode.GOOD if passed else ExitCode.CHECK_FAILED


def run_stages(bundle: Path, options: SelftestOptions) -> list[Stage]:
    """Run every stage up to the first that fails."""
    stages: list[Stage] = []
    opened: dict[bool, Any] = {}
    # Without CUDA graphs the two are the same code, and must still give the same video.
    backend, graphs = options.backend, options.used_device == "cuda"
    first, second = ("captured", "enqueued") if graphs else ("first", "second")
    plan: tuple[tuple[str, Callable[[], dict[str, Any]]], ...] = (
        ("environment", environment),
        ("export", lambda: export_random_model(bundle, options.dtype, fp8=options.fp8)),
        ("build", lambda: build_engine(bundle, backend, options.device)),
        (f"open, {first}", lambda: open_bundle(bundle, backend, True, opened)),
        (f"verify, {first}", lambda: verify(bundle, opened[True])),
        (f"open, {second}", lambda: open_bundle(bundle, backend, False, opened)),
        (f"{first} equals {second}", lambda: compare(opened[True], opened[False])),
    )
    try:
        for name, work in plan:
            talk(f"selftest: {name}")
            start = perf_counter()
            try:
                figures, error = work(), None
            except (ForcingKvError, ImportError) as caught:
                figures, error = {}, str(caught)
            except Exception as caught:
                # The report is what the maintainers see, so it holds what they need.
                figures, error = {}, "".join(traceback.format_exception(caught)).rstrip()
            passed = error is None and figures.get("passed", True)
            seconds = round(perf_counter() - start, 2)
            stages.append(Stage(name, bool(passed), seconds, figures, error))
            if not passed:
                break
    finally:
        for each in opened.values():
            each.close()
    return stages


def environment() -> dict[str, Any]:
    """Versions, GPU and driver; a machine without a GPU is described, not refused."""
    found: dict[str, Any] = {"forcing-kv": project_version(), "python": platform.python_version()}
    found |= installed_versions(PACKAGES)
    try:
        from forcing_kv.runtime_trt.cuda.runtime import Cuda

        cuda = Cuda()
        found |= {"gpu": cuda.device.name, "sm": cuda.device.sm, "cuda": cuda.device.driver,
                  "free_gb": round(cuda.free_nbytes() / 1e9, 1)}  # fmt: skip
    except ForcingKvError as error:
        found["gpu"] = f"none: {error}"
    return found


def export_random_model(bundle: Path, dtype: str, *, fp8: bool) -> dict[str, Any]:
    """A small model with all kinds of layers: mixed, all static, all dynamic."""
    import torch

    from forcing_kv.export.bundle.write import BundleLabels, export_bundle
    from forcing_kv.export.model.denoiser import CausalWanModel
    from forcing_kv.runtime_trt.dtypes import DType
    from forcing_kv.runtime_trt.rollout.config import RolloutConfig
    from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
    from forcing_kv.runtime_trt.rollout.policy import CachePolicy

    shape = ModelShape(4, dim=256, ffn_dim=512, num_heads=4, text_len=32, text_dim=64, freq_dim=64)
    partition = HeadPartition(4, ((0, 1), (2,), (0, 1, 2, 3), ()))
    config = RolloutConfig(
        shape, ChunkShape(3, 16, 24), CachePolicy(), partition, dtype=cast(DType, dtype)
    )
    torch.manual_seed(0)
    model = CausalWanModel(shape).requires_grad_(False)
    for parameter in model.parameters():
        # Biases of zeros and norms of ones would hide a backend that leaves them out.
        parameter.add_(0.02 * torch.randn_like(parameter))
    scales = None
    if fp8:
        from forcing_kv.calibration.fp8.recorder import scales_of_one_chunk

        scales = scales_of_one_chunk(model, replace(config, dtype="float32"), _prompt(shape))
    manifest = export_bundle(
        model, config, bundle, BundleLabels("selftest"), fp8=scales, consume=True, force=True
    )
    return {"weights_mb": round(manifest.weights_nbytes / 1e6, 1), "graphs": len(manifest.graphs)}


def build_engine(bundle: Path, backend: str, device: str) -> dict[str, Any]:
    """Build for this machine; backends without engines need nothing."""
    if backend == "onnxruntime":
        return {}
    if backend == "inductor":
        from forcing_kv.export.inductor.build import build_inductor
        from forcing_kv.export.inductor.compile import InductorOptions

        compiled = InductorOptions(cast(Literal["cpu", "cuda"], device))
        return {"build_seconds": build_inductor(bundle, compiled).build_seconds}
    from forcing_kv.export.tensorrt.build import run_build
    from forcing_kv.export.tensorrt.options import EngineOptions, TensorRtBackend
    from forcing_kv.export.tensorrt.plan import plan_build, target_device

    options = EngineOptions(cast(TensorRtBackend, backend))
    record, layers = run_build(plan_build(bundle, options, device=target_device(options)))
    kinds = sorted({layer.kind for found in layers.values() for layer in found})
    return {
        "details": record.to_json()["details"],
        "environment": record.environment,
        "layer_kinds": kinds,
    }


def open_bundle(
    bundle: Path, backend: str, use_graphs: bool, opened: dict[bool, Backend]
) -> dict[str, Any]:
    """Open and generate a video; times by part, memory, nodes of the captured graphs."""
    from forcing_kv.runtime_trt.open import open_backend
    from forcing_kv.runtime_trt.session import Session

    start = perf_counter()
    found = opened[use_graphs] = open_backend(bundle, backend, use_graphs=use_graphs)
    session = Session(found)
    session.set_prompt(_prompt(found.config.model))
    session.generate_chunk()
    first = perf_counter() - start
    chunks = [session.generate_chunk().timings_ms for _ in range(NUM_CHUNKS)]
    graphs = getattr(found, "captured_graphs", {})
    return {
        "load_ms": {part: round(ms, 1) for part, ms in getattr(found, "load_ms", {}).items()},
        "open_to_first_chunk_s": round(first, 3),
        "chunk_ms_median": round(median(sum(parts.values()) for parts in chunks), 3),
        "graph_nodes": [dict(graph.nodes) for graph in graphs.values()],
    }


def _prompt(model: ModelShape) -> Any:
    from forcing_kv.runtime_trt.rollout.noise import draw_noise

    return draw_noise(1, 0, 0, (model.text_len, model.text_dim))


def verify(bundle: Path, backend: Backend) -> dict[str, Any]:
    """Against eager PyTorch: the worst tensor, the rollout, the kept segments."""
    from forcing_kv.export.verify.bundle import verify_bundle

    report = verify_bundle(bundle, backend)
    return {
        "passed": report.passed,
        "worst": report.worst.line(),
        "worst_share_of_allowed": round(report.worst.ratio, 3),
        "rollout_errors": [float(f"{check.error:.3g}") for check in report.rollout],
        "kept_equal": report.kept_equal,
        "notes": report.notes,
    }


def compare(captured: Backend, enqueued: Backend) -> dict[str, Any]:
    """Replay and plain launches of the same chunks, with a prompt switch and a reset between."""
    import numpy as np

    from forcing_kv.runtime_trt.session import Session

    sessions = [Session(captured), Session(enqueued)]
    worst, prompt = 0.0, _prompt(captured.config.model)
    for seed in (5, 6):
        for session in sessions:
            session.reset()
            session.set_prompt(prompt)
        for chunk in range(NUM_CHUNKS):
            if chunk == 4:
                for session in sessions:
                    session.switch_prompt(-prompt)
            left, right = (session.generate_chunk(seed=seed).latents for session in sessions)
            worst = max(worst, float(np.abs(left - right).max()))
    return {"passed": worst == 0.0, "largest_difference": worst}


def render(report: dict[str, Any], stages: list[Stage]) -> str:
    """The report as text to paste."""
    verdict = "PASS" if report["passed"] else "FAIL"
    precision = report["dtype"] + (" with FP8" if report["fp8"] else "")
    what = f"--backend {report['backend']} ({precision}, {report['device']})"
    lines = [f"### fkv selftest {what}: {verdict}", ""]
    for stage in stages:
        mark = "ok" if stage.passed else "FAILED"
        lines.append(f"- **{stage.name}**: {mark}, {stage.seconds} s")
        if stage.error is not None:
            lines.append("  - " + stage.error.replace("\n", "\n    "))
        lines += [f"  - {key}: {value}" for key, value in stage.figures.items() if key != "passed"]
    return "\n".join(lines)
