"""The items of the benchmark suite, in order of value, each with a prediction of its time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.tools.bench.measure.options import END_TO_END_S, MIN_CHUNKS
from forcing_kv.tools.bench.subjects import SUBJECTS
from forcing_kv.tools.bench.workloads import (
    Case,
    Workload,
    case_flop,
    model_name,
    step_work,
    workload,
)

Kind = Literal["subject", "checks", "ops"]


@dataclass(frozen=True)
class SuiteItem:
    """One subject on one workload, or the operators on their own."""

    model: str
    size: str
    subject: str
    """One of `SUBJECTS`, or the kind where that is not `subject`."""
    device: str
    dtype: DType = "bfloat16"
    kind: Kind = "subject"
    """`checks` are the kernels' correctness; `ops` times their tactics, which later items take."""
    num_chunks: int = 50
    warmup_chunks: int = 12
    gate_chunks: int = 7
    same_dtype_gate: bool = False
    """Compare with the plain port in the same dtype; see `gate.check`."""
    growth_chunks: int = 0
    """Chunks to go on with after everything else, for growth of time and memory."""
    budget_s: float = 60.0
    """Longest time of measuring alone."""
    timeout_s: float = 560.0
    """Longest time of the item."""
    layers: int | None = None
    """Layers of the model; None for all."""
    case: Case | None = None
    """What is run at true shapes on a CPU, once."""
    round: int = 0
    """How often this was measured before."""

    @property
    def name(self) -> str:
        """How `--only` finds it."""
        if self.case is not None:
            return f"{self.size}/{self.dtype}/{self.case}/{self.subject}/{self.round}"
        return f"{self.size}/{self.subject}"

    @property
    def key(self) -> tuple[object, ...]:
        """What a row says of the item that it is of."""
        name = model_name(self.model, self.layers)
        return (
            self.subject, self.device, name, self.size, self.dtype, self.num_chunks, self.case,
            self.round,
        )  # fmt: skip

    @property
    def workload(self) -> Workload:
        """What it runs; that of compressed attention for the operators on their own."""
        if self.kind != "subject":
            return workload(self.model, self.size, "forcing-kv", self.dtype)
        subject = SUBJECTS[self.subject]
        return workload(
            self.model, self.size, subject.policy, self.dtype, fp8=subject.fp8, layers=self.layers
        )

    @property
    def small_workload(self) -> Workload:
        """The same at a size that takes no time, for gates."""
        return replace(self, size=_SMALL_SIZE).workload

    @property
    def predicted_case_s(self) -> float:
        """Seconds that a case may take on one core, the building in the first round included."""
        assert self.case is not None, "it has one"
        gflop = case_flop(self.workload.config, self.case) / 1e9
        seconds = _CPU_SETUP_S + gflop / _CPU_GFLOPS[self.dtype]
        return seconds + (_CPU_BUILD_S.get(self.subject, 0.0) if self.round == 0 else 0.0)


_SMALL_SIZE = "8x12"


_PRODUCT = "inductor-no-autotune"
"""The product in the form that is quick to build."""
_FIRST = ("eager-dense", "operators-graph", _PRODUCT)
"""The goals' baseline, our operators without a compiler (nothing in it can fail to compile), the
product."""
_LARGEST = (("1080p", "eager-dense"), ("1080p", "operators-graph"))
_LARGER = (("720p", "operators-graph"), ("720p", "eager-dense"))
_LARGER_LATER = (
    ("1080p", _PRODUCT), ("720p", _PRODUCT),
    ("1080p", "eager-forcing-kv"), ("720p", "eager-forcing-kv"),
)  # fmt: skip
_THEN = (
    "compile-forcing-kv-graph", "inductor-no-graph", "compile-dense-graph",
    "operators-compile-graph", "operators", "compile-forcing-kv", "compile-dense",
    "operators-compile", "eager-grouped",
)  # fmt: skip


_SUITE_MODELS = {"cuda": ("wan-1.3b",), "cpu": ("digits", "wan-1.3b")}


def suite_items(device: str, model: str) -> tuple[SuiteItem, ...]:
    """Every item, what matters most first.

    Raises:
        InputError: the suite has no such model on the device.
    """
    models = _SUITE_MODELS.get(device, ())
    if model not in models:
        raise InputError(
            f"the suite measures {' or '.join(models) or 'nothing'} on --device {device}, not "
            f"{model}; `fkv bench chunk` measures any model on its own"
        )
    if device == "cpu":
        assert model == "digits", "true shapes have items of their own"
        return _small_items(model)

    def at_480p(subject: str) -> SuiteItem:
        return SuiteItem("wan-1.3b", "480p", subject, device)

    def larger(size: str, subject: str) -> SuiteItem:
        # A dense chunk takes seconds there: few chunks, after the six that fill the window, and a
        # gate as short as the subject allows, without a float32 rollout, which would take minutes.
        return SuiteItem(
            "wan-1.3b", size, subject, device, num_chunks=10, warmup_chunks=6, gate_chunks=2,
            same_dtype_gate=True, budget_s=30.0,
        )  # fmt: skip

    first = {subject: at_480p(subject) for subject in _FIRST}
    first[_PRODUCT] = replace(first[_PRODUCT], growth_chunks=500)
    return (
        replace(at_480p("checks"), kind="checks", budget_s=45.0, timeout_s=120.0),
        replace(at_480p("ops"), kind="ops", timeout_s=240.0),
        *first.values(),
        *(larger(*pair) for pair in _LARGEST),
        at_480p("eager-forcing-kv"),
        *(larger(*pair) for pair in _LARGER),
        at_480p("inductor-fp8"),
        at_480p("inductor"),
        *(larger(*pair) for pair in _LARGER_LATER),
        *(at_480p(subject) for subject in _THEN),
        *(replace(larger(size, "ops"), kind="ops", timeout_s=240.0) for size in ("720p", "1080p")),
    )


def _small_items(model: str) -> tuple[SuiteItem, ...]:
    names = ("eager-dense", "eager-forcing-kv", "operators", "onnxruntime", "onnxruntime-dense",
             "inductor")  # fmt: skip
    return tuple(
        SuiteItem(model, "native", name, "cpu", dtype="float32", budget_s=20.0, timeout_s=560.0)
        for name in names
    )


# Nothing here is measured: rates that the styles may reach (TFLOP/s) and times of building (s), to
# order the items and to see what fits into a budget.
_RATES = {"eager-dense": 330, "eager": 240, "compile-dense": 400, "compile": 330, "operators": 430,
          "inductor": 550, "inductor-fp8": 700}  # fmt: skip
_FLOAT32_RATE = 35
_PORT_RATE = 300
_SETUP_S = 20.0
_FILLING = 0.65
"""Work of a chunk while the window fills, over that of a steady one."""
_CPU_GFLOPS = {"float32": 85, "bfloat16": 120, "float16": 85}
_CPU_SETUP_S = 25.0
_CPU_BUILD_S = {"inductor": 160.0, "onnxruntime": 40.0}
_BUILD_S = {
    "inductor": 280,
    "inductor-no-graph": 280,
    "inductor-no-autotune": 130,
    "inductor-fp8": 140,
    "compile": 150,
}


def predict(items: Sequence[SuiteItem]) -> Iterator[tuple[SuiteItem, float]]:
    """Items with the seconds that each may take on an H200, references made by the first of them.

    A guess from the roofline and assumed rates; at true shapes the seconds on one core of a CPU, 0
    for other items on a CPU.
    """
    made: set[tuple[object, ...]] = set()
    for item in items:
        if item.case is not None:
            yield item, item.predicted_case_s
            continue
        if item.device == "cpu":
            yield item, 0.0
            continue
        seconds = _SETUP_S
        if item.kind != "subject":
            yield item, seconds + (item.budget_s if item.kind == "checks" else 60.0)
            continue
        config, subject = item.workload.config, SUBJECTS[item.subject]
        tflop = (config.schedule.num_steps + 1) * step_work(config).total_flop / 1e12
        chunk_s = tflop / _longest(_RATES, item.subject)
        gate_chunks = subject.gate_chunks(item.gate_chunks)
        rates = (_PORT_RATE,) if item.same_dtype_gate else (_PORT_RATE, _FLOAT32_RATE)
        rollouts_s = sum(_FILLING * gate_chunks * tflop / rate for rate in rates)
        reference = (item.size, subject.policy, subject.fp8, gate_chunks)
        if reference not in made:
            made.add(reference)
            seconds += rollouts_s
        if subject.policy == "forcing-kv":
            # A subject whose rounding keeps other segments is compared along its own choice.
            seconds += rollouts_s
        seconds += _longest(_BUILD_S, item.subject, 0.0)
        seconds += _FILLING * (gate_chunks + item.warmup_chunks) * chunk_s
        seconds += max(min(item.num_chunks * chunk_s, item.budget_s), MIN_CHUNKS * chunk_s)
        seconds += min(20 * chunk_s, END_TO_END_S) + item.growth_chunks * chunk_s
        yield item, seconds


def _longest(table: Mapping[str, float], name: str, default: float | None = None) -> float:
    """The entry with the longest key that `name` begins with."""
    keys = [key for key in table if name.startswith(key)]
    if not keys and default is not None:
        return default
    return table[max(keys, key=len)]
