"""What is measured: each a way to run a workload, under a fixed name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from forcing_kv.runtime_trt.bundle.atomic.files import scratch_folder
from forcing_kv.runtime_trt.errors import unknown_name
from forcing_kv.runtime_trt.session import Session
from forcing_kv.tools.bench.workloads import PolicyName, Workload

AUTOTUNE = "max-autotune-no-cudagraphs"
"""Mode of `torch.compile`: it searches matrix products, and leaves capturing to us."""


class LoadClock:
    """Adds up what a subject needs before its first chunk, by part: weights, build, open."""

    def __init__(self) -> None:
        self.parts_ms: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the block's time to `part`."""
        start = perf_counter()
        yield
        _wait_for_device()
        self.parts_ms[part] = self.parts_ms.get(part, 0.0) + 1e3 * (perf_counter() - start)


def _wait_for_device() -> None:
    """What PyTorch has enqueued belongs to the part that enqueued it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


Open = Callable[[Workload, str, LoadClock], AbstractContextManager[Session]]
"""(workload, device, clock) -> an opened session."""


@dataclass(frozen=True)
class Subject:
    """One thing to measure."""

    name: str
    policy: PolicyName
    summary: str
    """How it runs, for tables."""
    open: Open
    devices: tuple[str, ...] = ("cpu", "cuda")
    fp8: bool = False
    """Whether linear layers run in FP8."""
    min_gate_chunks: int = 5
    """Chunks until the gate has seen everything that is measured: the first steady chunk of a
    compressed cache is chunk 3, a captured one is replayed from its second on."""
    is_port: bool = False
    """The plain port itself, which does the same in every chunk but the first: a long rollout in
    float32 would compare it with itself for longer, and take most of its time."""

    def gate_chunks(self, asked: int) -> int:
        """Length of the gate's rollout where `asked` are asked for."""
        return 2 if self.is_port else max(asked, self.min_gate_chunks)


def subject(name: str) -> Subject:
    """Look up a subject.

    Raises:
        InputError: there is none of this name.
    """
    if name not in SUBJECTS:
        raise unknown_name("subject", name, SUBJECTS)
    return SUBJECTS[name]


def bundle_subject(bundle: Path, backend: str, digest: str) -> Subject:
    """An exported bundle, the one of that digest, on one of the runtime's backends."""

    def open_it(_: Workload, __: str, clock: LoadClock) -> Session:
        with clock("open"):
            return Session.open(bundle, backend, digest=digest)

    return Subject(f"bundle-{backend}", "forcing-kv", f"{bundle.name} on {backend}", open_it)


def _torch(style: str, *, compiled: bool = False, graph: bool = False, qkv: bool = False) -> Open:
    @contextmanager
    def open_it(workload: Workload, device: str, clock: LoadClock) -> Iterator[Session]:
        from forcing_kv.export.model.fusion import FusionOptions
        from forcing_kv.tools.bench.pytorch.backend import TorchBackend
        from forcing_kv.tools.bench.pytorch.options import TorchOptions

        mode = (AUTOTUNE if device == "cuda" else "default") if compiled else None
        # PyTorch's own attention is what a CPU has; on CUDA one kernel of ours serves every chunk.
        steady = style == "operators" and device == "cpu" and not compiled
        fusion = FusionOptions(qkv=qkv)
        options = TorchOptions(style, mode, graph, fusion, steady)  # type: ignore[arg-type]
        with clock("weights"):
            model = workload.load(device)
        with clock("open"):
            backend = TorchBackend(model, workload.config, device, options)
        del model
        with Session(backend) as session:
            yield session

    return open_it


def _inductor(*, use_graphs: bool, autotune: bool = True) -> Open:
    @contextmanager
    def open_it(workload: Workload, device: str, clock: LoadClock) -> Iterator[Session]:
        from forcing_kv.export.inductor.compile import InductorOptions
        from forcing_kv.export.inductor.session import compile_model, open_compiled

        options = InductorOptions("cuda" if device == "cuda" else "cpu", autotune=autotune)
        config = workload.config
        with scratch_folder() as folder:
            with clock("weights"):
                model = workload.load(device)
            with clock("build"):
                compiled = compile_model(model, config, folder, options)
            del model
            with clock("open"):
                session = open_compiled(compiled, config, device, use_graphs=use_graphs)
            with session:
                yield session

    return open_it


@contextmanager
def _onnxruntime(workload: Workload, device: str, clock: LoadClock) -> Iterator[Session]:
    from forcing_kv.export.bundle.write import BundleLabels, export_bundle

    with scratch_folder() as folder:
        bundle = folder / "bundle"
        labels = BundleLabels(workload.model)
        with clock("weights"):
            model = workload.load(device)
        with clock("build"):
            export_bundle(model, workload.config, bundle, labels, consume=True)
        del model
        with clock("open"):
            session = Session.open(bundle, "onnxruntime", num_threads=1)
        with session:
            yield session


_ALL = (
    Subject(
        "eager-dense",
        "dense",
        "eager PyTorch, dense window, SDPA",
        _torch("dense"),
        is_port=True,
    ),
    Subject(
        "eager-forcing-kv",
        "forcing-kv",
        "eager PyTorch, compressed, as the research code does it",
        _torch("reference"),
    ),
    Subject(
        "eager-grouped",
        "forcing-kv",
        "eager PyTorch, compressed, heads sorted, no host reads",
        _torch("grouped"),
    ),
    Subject(
        "compile-dense",
        "dense",
        "torch.compile of eager-dense", _torch("dense", compiled=True),
        min_gate_chunks=8,
    ),
    Subject(
        "compile-dense-graph",
        "dense",
        "torch.compile of eager-dense, CUDA graph",
        _torch("dense", compiled=True, graph=True),
        ("cuda",),
        min_gate_chunks=9,
    ),
    Subject(
        "compile-forcing-kv",
        "forcing-kv",
        "torch.compile of eager-grouped",
        _torch("grouped", compiled=True),
    ),
    Subject(
        "compile-forcing-kv-graph",
        "forcing-kv",
        "torch.compile of eager-grouped, CUDA graph",
        _torch("grouped", compiled=True, graph=True),
        ("cuda",),
    ),
    Subject(
        "operators", "forcing-kv", "our operators, eager around them", _torch("operators")
    ),
    Subject(
        "operators-graph",
        "forcing-kv",
        "our operators, eager around them, CUDA graph",
        _torch("operators", graph=True),
        ("cuda",),
    ),
    Subject(
        "operators-compile",
        "forcing-kv",
        "torch.compile around our operators",
        _torch("operators", compiled=True, qkv=True),
    ),
    Subject(
        "operators-compile-graph",
        "forcing-kv",
        "torch.compile around our operators, CUDA graph",
        _torch("operators", compiled=True, graph=True, qkv=True),
        ("cuda",),
    ),
    Subject(
        "inductor-no-graph",
        "forcing-kv",
        "Inductor package, call by call",
        _inductor(use_graphs=False),
        ("cuda",),
    ),
    Subject(
        "inductor", "forcing-kv", "Inductor package, one CUDA graph a chunk where there is CUDA",
        _inductor(use_graphs=True),
    ),
    Subject(
        "inductor-no-autotune",
        "forcing-kv",
        "Inductor package without a search for matrix products: quick to build",
        _inductor(use_graphs=True, autotune=False),
        ("cuda",),
    ),
    Subject(
        "inductor-fp8",
        "forcing-kv",
        "Inductor package, linear layers in FP8, no search for matrix products",
        _inductor(use_graphs=True, autotune=False),
        fp8=True,
    ),
    Subject("onnxruntime", "forcing-kv", "ONNX Runtime", _onnxruntime, ("cpu",)),
    Subject("onnxruntime-dense", "dense", "ONNX Runtime, dense window", _onnxruntime, ("cpu",)),
)  # fmt: skip

SUBJECTS = {each.name: each for each in _ALL}
"""Every subject by name; `eager-*` and `compile-*` are the baselines."""
