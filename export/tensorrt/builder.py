"""One ONNX graph to one TensorRT or TensorRT-RTX plan, through Polygraphy."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forcing_kv.export.tensorrt.options import EngineOptions
from forcing_kv.export.tensorrt.plugins import check_plugin_layers
from forcing_kv.export.tensorrt.stripped import mark_stripped
from forcing_kv.runtime_trt.bundle.constants import ConstantEntry
from forcing_kv.runtime_trt.errors import ForcingKvError, require
from forcing_kv.runtime_trt.tensorrt.engine import listener

if TYPE_CHECKING:
    from collections.abc import Iterator

Progress = Callable[[str, float], None]
"""(what the builder does, how much of it is done, 0 to 1)."""

FUSED_ATTENTION = "_gemm_mha"
"""Start of the name of every fused attention kernel."""


@dataclass(frozen=True)
class LayerInfo:
    """One layer of a built engine, as the builder reports it."""

    name: str
    kind: str
    """`kgen` is a generated kernel, `gemm` a matrix product, `PluginV3` one of our operators."""
    tactic: str
    source: str
    """ONNX nodes that it comes from, where the verbosity tells."""
    fp8: bool = False
    """Whether it is a matrix product of FP8 tensors."""


@dataclass
class BuildLog:
    """What the builder said."""

    problems: list[str] = field(default_factory=list)
    """Errors and warnings, in order."""
    layers: list[LayerInfo] = field(default_factory=list)
    nbytes: dict[str, int] = field(default_factory=dict)
    """Activation and Weights memory."""
    num_attention: int = 0
    """Attentions of the network, fused or not."""
    interrupted: bool = False
    """Ctrl-C was pressed; the builder stops after its next step."""

    def read(self, message: str, problem: bool) -> None:
        """Take note of one message."""
        if problem:
            self.problems.append(message)
        for line in message.splitlines() if "LayerType: " in message else ():
            if found := _LAYER.match(line):
                fp8 = found["kind"] == "gemm" and "Datatype: FP8" in line
                texts = {key: found[key] or "" for key in _LAYER_KEYS}
                self.layers.append(LayerInfo(**texts, fp8=fp8))
        if found := _MEMORY.match(message):
            self.nbytes[found[1].lower()] = int(found[2])

    @property
    def num_fp8_products(self) -> int:
        """Layers that are a matrix product in FP8; q, k and v are one."""
        return sum(layer.fp8 for layer in self.layers)

    @property
    def num_fused_attention(self) -> int:
        """Layers that are a fused attention kernel."""
        return sum(layer.tactic.startswith(FUSED_ATTENTION) for layer in self.layers)


_LAYER_KEYS = ("name", "kind", "tactic", "source")
_LAYER = re.compile(
    r"\s*Name: (?P<name>[^,]*), LayerType: (?P<kind>[^,]*),"
    r"(?:.*TacticName: (?P<tactic>[^,]*))?(?:.*Metadata: (?P<source>.*))?"
)
_MEMORY = re.compile(r"Total (Activation|Weights) Memory: (\d+) bytes")


@dataclass(frozen=True)
class BuiltPlan:
    """A serialized engine and what the builder said of it."""

    plan: bytes
    log: BuildLog
    stripped: Mapping[str, ConstantEntry] = field(default_factory=dict)
    """Weights that the engine leaves out, by its names; see `mark_stripped`."""


def build_plan(
    path: Path,
    options: EngineOptions,
    timing_cache: Path | None = None,
    progress: Progress = lambda _, __: None,
) -> BuiltPlan:
    """Build an engine; strongly typed, on one stream, without allocations at run time.

    Args:
        path: ONNX file; every custom node has a registered plugin, or is inlined.
        timing_cache: file that keeps measured tactics, read and added to.
        progress: told of the builder's phases.

    Raises:
        MissingDependencyError: the builder or Polygraphy is not installed.
        ForcingKvError: the graph does not parse, one of our nodes is no plugin, or the builder
            gives up; with its own words.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    log = BuildLog()
    with _interruptible(log):
        return _build(path, options, timing_cache, progress, log)


def _build(
    path: Path,
    options: EngineOptions,
    timing_cache: Path | None,
    progress: Progress,
    log: BuildLog,
) -> BuiltPlan:
    trt = require(options.module)
    logger = listener(trt, log.read)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise ForcingKvError(f"{path.name}: {options.backend} cannot parse it: {'; '.join(errors)}")
    log.num_attention = _allow_unfused_attention(trt, network)
    num_plugins = check_plugin_layers(trt, network, path)
    stripped = mark_stripped(network, path) if options.strip_weights else {}
    with _polygraphy(options) as polygraphy:

        def configure(builder: Any, network: Any) -> Any:
            monitor = _progress_monitor(trt, progress, log)
            config = _create_config(polygraphy, trt, options, timing_cache, monitor)
            return _set_flags(trt, config(builder, network), options)

        try:
            cache = None if timing_cache is None else str(timing_cache)
            plan = polygraphy.EngineBytesFromNetwork(
                (builder, network, parser), configure, save_timing_cache=cache
            )()
        except Exception as error:
            said = "; ".join(log.problems[-3:]) or str(error)
            raise ForcingKvError(
                f"{path.name}: {options.backend} could not build it for "
                f"{options.target or 'this GPU'}: {said}{_remedy(num_plugins, options)}"
            ) from error
    return BuiltPlan(bytes(plan), log, stripped)


def _allow_unfused_attention(trt: Any, network: Any) -> int:
    """Let the builder split an attention that it has no fused kernel for; count all attentions.

    Those are the standard operator's and those spelt out around a softmax (the text's, and the
    portable bodies'), which the builder may fuse as well.

    Without it the build fails: TensorRT-RTX 1.7.1 has none for a single head of few tokens. The
    record tells how many were fused.
    """
    count = 0
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        count += layer.type in (trt.LayerType.ATTENTION_INPUT, trt.LayerType.SOFTMAX)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # It comes as the base class.
            layer.attention.decomposable = True
    return count


def _remedy(num_plugins: int, options: EngineOptions) -> str:
    """What else to try where a builder may have refused the kernels of our plugins."""
    if num_plugins == 0 or options.portable_kernels or options.hardware_compatible:
        return ""
    return "; if it refuses a plugin or its kernel, build with --portable-kernels"


def _create_config(
    polygraphy: Any, trt: Any, options: EngineOptions, timing_cache: Path | None, monitor: Any
) -> Any:
    """Polygraphy's configuration for our options."""
    verbosity = {"detailed": "DETAILED", "layer-names": "LAYER_NAMES_ONLY", "none": "NONE"}[
        options.profiling_verbosity
    ]
    settings: dict[str, Any] = {
        "profiling_verbosity": getattr(trt.ProfilingVerbosity, verbosity),
        "progress_monitor": monitor,
        "builder_optimization_level": options.optimization_level,
        "refittable": options.refit and not options.strip_weights,
        "strip_plan": options.strip_weights,
        # A capture records one stream; work on auxiliary streams would be lost.
        "max_aux_streams": 0,
    }
    if options.workspace_gb is not None:
        nbytes = int(options.workspace_gb * 2**30)
        settings["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: nbytes}
    if options.backend == "tensorrt-rtx":
        number = int((options.target or "sm0").removeprefix("sm"))
        rtx = require("polygraphy.backend.tensorrt_rtx", extra="rtx")
        target = {"compute_capabilities": [divmod(number, 10)]} if number else {"use_gpu": True}
        return rtx.CreateConfigRTX(**settings, **target)
    if options.hardware_compatible:
        level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        settings["hardware_compatibility_level"] = level
    if timing_cache is not None and timing_cache.is_file():
        settings["load_timing_cache"] = str(timing_cache)
    return polygraphy.CreateConfig(**settings, version_compatible=options.version_compatible)


def _set_flags(trt: Any, config: Any, options: EngineOptions) -> Any:
    """Flags that Polygraphy does not set, or not for both builders."""
    # Allocations while an engine runs can break a capture (TensorRT-RTX says so).
    user_allocation = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if user_allocation is not None:
        config.set_flag(user_allocation)
    if options.strip_weights:
        # The weights that are marked and no others, so that the bundle can give every one back.
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    if options.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    return config


@contextmanager
def _interruptible(log: BuildLog) -> Iterator[None]:
    """Note Ctrl-C, or another signal that ends us, while the builder runs, and obey after it.

    An exception in one of the builder's callbacks would be lost, and the build go on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python tells the main thread alone.
        return

    noted: list[int] = []

    def note(number: int, _: object) -> None:
        noted.append(number)
        log.interrupted = True

    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.getsignal(each) for each in ending}
    heard = {each: handler for each, handler in before.items() if callable(handler)}
    for each in heard:
        signal.signal(each, note)
    try:
        yield
    except ForcingKvError:
        if not log.interrupted:
            raise
    finally:
        for each, handler in heard.items():
            signal.signal(each, handler)
    if noted:
        heard[signal.Signals(noted[0])](noted[0], None)


def _progress_monitor(trt: Any, progress: Progress, log: BuildLog) -> Any:
    """A monitor that reports nested phases as one fraction, and stops an interrupted build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int, int]] = {}

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            self.phases[name] = (parent, num_steps, 0)

        def phase_finish(self, name: str) -> None:
            self.phases.pop(name, None)

        def step_complete(self, name: str, step: int) -> bool:
            parent, num_steps, _ = self.phases.get(name, (None, 1, 0))
            self.phases[name] = (parent, num_steps, step + 1)
            progress(name, self.fraction())
            return not log.interrupted

        def fraction(self) -> float:
            # A child's steps are parts of its parent's current step.
            done, share = 0.0, 1.0
            for _, num_steps, steps in list(self.phases.values()):
                done += share * min(steps, num_steps) / num_steps
                share /= num_steps
            return min(done, 1.0)

    return Monitor()


@contextmanager
def _polygraphy(options: EngineOptions) -> Iterator[Any]:
    """Polygraphy's TensorRT loaders for one of the two builders, quiet.

    Raises:
        ForcingKvError: this process has used them for the other builder.
    """
    extra = "rtx" if options.backend == "tensorrt-rtx" else "trt"
    settings = require("polygraphy.config", extra=extra)
    rtx = options.backend == "tensorrt-rtx"
    if "polygraphy.backend.trt" in sys.modules and rtx != settings.USE_TENSORRT_RTX:
        raise ForcingKvError(
            "Polygraphy works with either TensorRT or TensorRT-RTX in one process; build for "
            f"{options.backend} in another"
        )
    settings.USE_TENSORRT_RTX = rtx
    loaders = require("polygraphy.backend.trt", extra=extra)
    logger = require("polygraphy.logger", extra=extra).G_LOGGER
    # Not even its last words: the builder's own are told.
    with logger.verbosity(logger.CRITICAL + 1):
        yield loaders
