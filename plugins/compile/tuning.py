"""Measured tactics: which one is fastest for a problem on a GPU, kept with its measurement.

The table is data, written by `fkv bench ops --update-table` on the GPU in question and committed.
TensorRT does not read it: it times the tactics itself when it builds.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from math import log
from pathlib import Path

from forcing_kv.plugins.compile.launch import Problem, Tactic, default_tactic
from forcing_kv.plugins.op_spec import OpSpec
from forcing_kv.runtime_trt.bundle.atomic.files import write_file
from forcing_kv.runtime_trt.bundle.atomic.locks import claimed
from forcing_kv.runtime_trt.bundle.schema import load_as, read_json

TABLE = Path(__file__).with_name("tuned_tactics.json")


@dataclass(frozen=True)
class TunedTactic:
    """The fastest tactic of one problem on one GPU."""

    op: str
    """Operator, by its ONNX name."""
    gpu: str
    """Name of the GPU, as its driver has it."""
    dtype: str
    sizes: Mapping[str, int]
    """Size of every named axis."""
    tactic: str
    median_ms: float
    """Its time, with a cold L2 cache."""
    others_ms: Mapping[str, float]
    """Times of the other tactics."""
    date: str

    @property
    def times_ms(self) -> Mapping[str, float]:
        return {self.tactic: self.median_ms, **self.others_ms}

    @property
    def key(self) -> tuple[object, ...]:
        """What was measured."""
        return (self.op, self.gpu, self.dtype, *sorted(self.sizes.items()))


def read_table(path: Path = TABLE) -> dict[tuple[object, ...], TunedTactic]:
    """Read a table.

    Raises:
        InputError: an entry has unknown or missing fields.
    """
    content = read_json(path, "table of tactics", "measure one with `fkv bench ops`")
    return {entry.key: entry for entry in load_as(tuple[TunedTactic, ...], content, str(path))}


def update_table(entries: Iterable[TunedTactic], path: Path = TABLE) -> None:
    """Add entries to a table; an entry replaces the one for the same problem and GPU.

    The file is made if there is none.
    """
    with claimed(path, wait=True):  # What another process adds meanwhile is not lost.
        before = read_table(path) if path.is_file() else {}
        table = before | {entry.key: entry for entry in entries}
        lines = [json.dumps(asdict(table[key])) for key in sorted(table, key=str)]
        text = "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"
        write_file(path, text.encode())


@cache
def _committed_table() -> dict[tuple[object, ...], TunedTactic]:
    return read_table()


_added: dict[tuple[object, ...], TunedTactic] = {}

CHOSEN: dict[str, set[str]] = {}
"""What `best_tactic` has chosen in this process, by operator: for records of a measurement."""


def add_table(path: Path) -> None:
    """Let `best_tactic` know a further table for the life of this process.

    Its entries go before those of the committed table.

    Raises:
        InputError: an entry has unknown or missing fields.
    """
    _added.update(read_table(path))


def best_tactic(
    spec: OpSpec, tactics: Sequence[Tactic], problem: Problem, gpu: str, device_sm: int
) -> Tactic:
    """The fastest tactic on the most similar problem measured, or the default one where none was.

    A model has more problems than anybody measures (every split of a layer's heads is one), and
    what is fastest changes with the shapes slowly.

    Args:
        tactics: those of its kernel's tactics that may be taken.
        device_sm: its compute capability, 90 for 9.0.
    """
    named = {tactic.name: tactic for tactic in tactics}
    fastest = measured_best(spec, named, gpu, problem.dtype, problem.sizes)
    chosen = default_tactic(tactics, device_sm) if fastest is None else named[fastest]
    CHOSEN.setdefault(spec.name, set()).add(chosen.name)
    return chosen


def measured_best(
    spec: OpSpec, names: Collection[str], gpu: str, dtype: str, sizes: Mapping[str, int]
) -> str | None:
    """The fastest of some tactics on the most similar problem measured; None if none was.

    Args:
        names: tactics that may be taken.
        gpu: name of the GPU, as its driver has it.
        sizes: size of every named axis of the operator.
    """
    measured = [
        entry
        for entry in {**_committed_table(), **_added}.values()
        if (entry.op, entry.gpu, entry.dtype) == (spec.name, gpu, dtype)
        and any(name in entry.times_ms for name in names)
    ]
    if not measured:
        return None
    times_ms = min(measured, key=lambda entry: _distance(entry.sizes, sizes)).times_ms
    return min((name for name in names if name in times_ms), key=times_ms.__getitem__)


def _distance(sizes: Mapping[str, int], others: Mapping[str, int]) -> float:
    """How far two problems of an operator lie apart; 0 for the same."""
    return sum(abs(log(max(1, size) / max(1, others[axis]))) for axis, size in sizes.items())
