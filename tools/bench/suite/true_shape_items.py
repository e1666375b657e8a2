"""The items of the table at true shapes: rounds of subjects, what matters most first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.tools.bench.suite.items import SuiteItem
from forcing_kv.tools.bench.workloads import CLIP_CHUNKS, Case, workload

SIZES = ("480p", "720p", "1080p")
SUBJECTS = ("eager-dense", "eager-forcing-kv", "inductor", "onnxruntime", "operators")
_NO_BFLOAT16 = ("onnxruntime",)
_CLIP_SUBJECTS = ("eager-dense", "eager-forcing-kv", "inductor", "onnxruntime")
_STEP_TOKENS = 5000
"""Tokens a frame from which on a whole chunk takes too long: single denoise steps there."""


def true_shape_items(
    layers: int,
    rounds: int,
    sizes: Sequence[str] = SIZES,
    dtypes: Sequence[DType] = ("float32", "bfloat16"),
) -> tuple[SuiteItem, ...]:
    """Every measurement, each an item: the first size in all its rounds, then round by round.

    Args:
        layers: of the model.
        rounds: how often each subject is measured.
        sizes: the first one is measured in steady chunks and as a clip from its first chunk on.
        dtypes: float32 comes first where it is among them.

    Raises:
        InputError: a size or a number of layers that the model cannot run.
    """
    first, *larger = sizes
    ordered = sorted(dtypes, key=lambda dtype: dtype != "float32")
    groups = {size: _case_of(size, layers) for size in sizes}
    items: list[SuiteItem] = []
    for dtype in ordered:
        items += _rounds(range(rounds), [(first, dtype, groups[first])], layers)
    rest: list[tuple[str, DType, Case]] = []
    if "float32" in ordered:
        rest.append((first, "float32", "clip"))
    rest += [(size, dtype, groups[size]) for dtype in ordered for size in larger]
    items += _rounds(range(rounds), rest, layers)
    return tuple(items)


def _case_of(size: str, layers: int) -> Case:
    chunk = workload("wan-1.3b", size, "forcing-kv", "float32", layers=layers).config.chunk
    return "steady-step" if chunk.tokens_per_frame > _STEP_TOKENS else "steady-chunk"


def _rounds(
    rounds: Iterable[int], groups: Sequence[tuple[str, DType, Case]], layers: int
) -> Iterator[SuiteItem]:
    for index in rounds:
        for size, dtype, case in groups:
            yield from _round(index, size, dtype, case, layers)


def _round(index: int, size: str, dtype: DType, case: Case, layers: int) -> Iterator[SuiteItem]:
    asked = _CLIP_SUBJECTS if case == "clip" else SUBJECTS
    names = [name for name in asked if dtype != "bfloat16" or name not in _NO_BFLOAT16]
    # Every other round backwards: a machine that grows slower hits all alike.
    for name in names if index % 2 == 0 else reversed(names):
        item = SuiteItem(
            "wan-1.3b", size, name, "cpu", dtype,
            num_chunks=CLIP_CHUNKS if case == "clip" else 1,
            layers=layers, case=case, round=index,
        )  # fmt: skip
        yield replace(item, timeout_s=item.predicted_case_s * _PATIENCE)


_PATIENCE = 10.0
"""An item is stopped after so many times the predicted time: others may use the core too."""
