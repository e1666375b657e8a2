"""The work of one chunk as a sequence of launches and copies over fixed addresses.

The same sequence is enqueued directly or captured once per variant and replayed. What changes from
chunk to chunk lies in device memory; what the sequence itself depends on is a `ChunkVariant`.
With local windows of at most F frames there are a handful: first chunk, warm-up, steady with and
without eviction, re-encodes. A dense ring of W > F frames writes other slots in every chunk and
comes back to the first pattern after at most W chunks, so it has at most W + W / F variants.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from forcing_kv.runtime_trt.backends.base import form_of
from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo
from forcing_kv.runtime_trt.cuda.buffers import BufferSpec, DeviceMemory, MemoryPlan
from forcing_kv.runtime_trt.cuda.engine import SCRATCH, GraphEngine
from forcing_kv.runtime_trt.cuda.row_moves import PitchedMove
from forcing_kv.runtime_trt.cuda.runtime import Cuda
from forcing_kv.runtime_trt.dtypes import DTYPES
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.moves import HeadRows, moves
from forcing_kv.runtime_trt.rollout.policy import HeadKind
from forcing_kv.runtime_trt.rollout.ports import (
    PARTS,
    POSITIONS,
    STEP_SCALARS,
    GraphLike,
    Part,
    kv_name,
    kv_names,
    ports_by_name,
    steady_name,
)
from forcing_kv.runtime_trt.rollout.timeline import ChunkPlan, GroupPlan, every_plan

Mark = Callable[[str], None]
"""Told the name of each part of a chunk when all of it is enqueued: steps, clean, evict, commit."""

NO_NOISE = "eps/none"
"""Re-noise of the last step and of the clean pass: zeros, times a noise level of zero."""

SLOTS = ("slot/0", "slot/1")
"""Where results wait for their copy to the host while the next chunk runs."""


@dataclass(frozen=True)
class ChunkVariant:
    """All that the enqueued sequence of a chunk depends on."""

    recache: bool
    """A re-encode after a prompt switch: the clean pass and the commit alone."""
    steady: bool
    """Whether the passes take their steady form."""
    evict: bool
    groups: tuple[tuple[HeadKind, GroupPlan], ...]
    """Commit of each kind of head that the model has, histories left out."""

    @classmethod
    def of(
        cls,
        plan: ChunkPlan,
        config: RolloutConfig,
        graphs: Collection[str],
        *,
        recache: bool = False,
    ) -> ChunkVariant:
        """Variant of a chunk on an engine that has `graphs`."""
        steady = form_of("step", plan, graphs) != "step"
        kinds = {group.kind for layout in config.layouts for group in layout.groups}
        groups = tuple(
            (kind, replace(group, history=()))
            for kind, group in plan.groups.items()
            if kind in kinds
        )
        return cls(recache, steady, plan.evict, groups)

    @property
    def name(self) -> str:
        """For people: what kind of chunk this is."""
        if self.recache:
            return "re-encode"
        form = "steady form" if self.steady else "general form"
        return f"{form}, {'with' if self.evict else 'without'} eviction"


def expected_variants(config: RolloutConfig, graphs: Collection[str]) -> Iterator[ChunkVariant]:
    """Variants that a video meets, prompt switches included; the earliest come first."""
    policy, frames = config.policy, config.chunk.num_frames
    seen: set[ChunkVariant] = set()
    for plan, recache in every_plan(policy, frames, switches=config.switchable):
        variant = ChunkVariant.of(plan, config, graphs, recache=recache)
        if variant not in seen:
            seen.add(variant)
            yield variant


@dataclass(frozen=True)
class RowCopy:
    """A strided copy between two buffers, all numbers in bytes."""

    target: str
    target_offset: int
    target_pitch: int
    source: str
    source_offset: int
    source_pitch: int
    width: int
    """Contiguous bytes of one head."""
    height: int
    """Heads."""


def commit_copies(variant: ChunkVariant, config: RolloutConfig) -> Iterator[RowCopy]:
    """The copies of a commit; none reads or writes where another writes."""
    row = config.model.head_dim * DTYPES[config.dtype].nbytes

    def end(rows: HeadRows, part: Part, layer: int) -> tuple[str, int, int]:
        """Buffer, offset and pitch."""
        name = kv_name(rows.family, part, layer)
        return name, (rows.first_row + rows.offset) * row, rows.pitch * row

    for move in moves(dict(variant.groups), config):
        for part in PARTS:
            target, source = (end(rows, part, move.layer) for rows in (move.target, move.source))
            yield RowCopy(*target, *source, move.num_rows * row, move.num_heads)


def upload_names(config: RolloutConfig) -> tuple[str, ...]:
    """Buffers that one pinned copy fills for every chunk."""
    eps = [f"eps/{i}" for i in range(max(1, config.schedule.num_steps - 1))]
    return ("noise", *eps, *POSITIONS)


def result_names(config: RolloutConfig) -> tuple[str, ...]:
    """Buffers that one copy brings back after every chunk."""
    selected = ("scores", "kept") if config.evicted_layers else ()
    return (x0_name(config.schedule.num_steps - 1), *selected)


def x0_name(step: int) -> str:
    """Buffer that holds x0 of a denoise step until the next chunk; n is the clean pass."""
    return f"x0/{step}"


def step_name(scalar: str, step: int) -> str:
    """Buffer that holds one of `STEP_SCALARS` of a denoise step; n is the clean pass."""
    return f"{scalar}/{step}"


def scalar_names(graphs: Mapping[str, GraphLike]) -> tuple[str, ...]:
    """Those of `STEP_SCALARS` that the step graph takes."""
    inputs = {port.name for port in graphs["step"].inputs}
    return tuple(name for name in STEP_SCALARS if name in inputs)


def plan_memory(
    config: RolloutConfig,
    graphs: Mapping[str, GraphLike],
    scratch: Mapping[str, int],
    *,
    placed: bool = False,
) -> MemoryPlan:
    """Lay out every buffer of a session.

    What an eviction hands to the commit lies in the scratch, behind the eviction's own: no other
    graph runs in between.

    Args:
        scratch: bytes that each graph needs.
        placed: whether the engine has memory of its own for it.
    """
    known = {
        name: BufferSpec(name, tuple(port.shape), port.dtype)
        for name, port in ports_by_name(graphs).items()
    }
    steps = config.schedule.num_steps
    aliases = {
        **dict.fromkeys(("noise", "x/0", "x/1"), "x"),
        **{name: "eps" for name in (*upload_names(config), NO_NOISE) if name.startswith("eps/")},
        **{x0_name(i): "x0" for i in range(steps + 1)},
    }
    for name in scalar_names(graphs):
        aliases |= {step_name(name, i): name for i in range(steps + 1)}
    specs = {name: replace(known[like], name=name) for name, like in aliases.items()}
    replaced = {"x", "eps", "x0", "x_next", *STEP_SCALARS}
    specs |= {name: spec for name, spec in known.items() if name not in replaced}
    ordered = (*upload_names(config), *result_names(config))
    first = [specs.pop(name) for name in ordered]
    result = sum(spec.padded_nbytes for spec in first[len(upload_names(config)) :])
    extra = [BufferSpec(name, (result,), "uint8") for name in SLOTS]
    evicted = [specs.pop(name) for name in kv_names("dyn", config.evicted_layers)]
    guests = [] if placed else evicted
    start = BufferSpec(SCRATCH, (scratch.get("evict", 0),), "uint8").padded_nbytes
    end = start + sum(spec.padded_nbytes for spec in guests)
    if size := max(end, *scratch.values(), 0):
        extra.append(BufferSpec(SCRATCH, (size,), "uint8"))
    plan = MemoryPlan.of([*first, *extra, *specs.values()])
    return plan.with_guests(SCRATCH, start, guests) if guests else plan


class ChunkProgram:
    """Enqueues prompt, denoise steps, clean pass, eviction and commit.

    The clean pass is the step graph with other scalars, or a graph of its own where there is one.
    """

    def __init__(
        self,
        cuda: Cuda,
        engine: GraphEngine,
        config: RolloutConfig,
        graphs: Mapping[str, GraphInfo],
        memory: DeviceMemory,
    ) -> None:
        self._cuda, self._engine, self._config, self._memory = cuda, engine, config, memory
        offsets = memory.plan.offsets
        self._bindings = {
            name: {
                info.name: memory.address(info.name)
                for info in (*graph.inputs, *graph.outputs)
                if info.name in offsets
            }
            for name, graph in graphs.items()
        }
        self._tensors = {
            name: {info.name for info in (*graph.inputs, *graph.outputs)}
            for name, graph in graphs.items()
        }
        self._selected: dict[str, int] = {}
        if SCRATCH in offsets:
            for bindings in self._bindings.values():
                bindings[SCRATCH] = memory.address(SCRATCH)

    def prompt(self, stream: int) -> None:
        """Cross-attention K and V of `prompt_embeds`."""
        self._engine.enqueue("prompt", self._bindings["prompt"], stream)

    def step(
        self, stream: int, index: int, x: str, eps: str, x_next: str, *, steady: bool = False
    ) -> str:
        """One forward with the scalars of denoise step `index`, or of the clean pass.

        Returns:
            Name of the buffer that receives x0.
        """
        x0 = x0_name(index)
        names = {"x": x, "eps": eps, "x0": x0, "x_next": x_next}
        self._pass(steady_name("step") if steady else "step", stream, index, names)
        return x0

    def clean(self, stream: int, x: str, *, steady: bool = False) -> None:
        """The pass at t = 0 that encodes the final latents in buffer `x`."""
        index = self._config.schedule.num_steps
        if "clean" in self._bindings:
            self._pass(steady_name("clean") if steady else "clean", stream, index, {"x": x})
        else:
            self.step(stream, index, x, NO_NOISE, "x/0", steady=steady)

    def _pass(self, graph: str, stream: int, index: int, names: Mapping[str, str]) -> None:
        wanted = {**{name: step_name(name, index) for name in STEP_SCALARS}, **names}
        tensors = self._tensors[graph]
        own = {key: self._memory.address(name) for key, name in wanted.items() if key in tensors}
        self._engine.enqueue(graph, self._bindings[graph] | own, stream)

    def evict(self, stream: int) -> None:
        """Scores, kept segments and dynamic rows from the last pass."""
        self._engine.enqueue("evict", self._bindings["evict"], stream)
        self._selected = dict(self._engine.placed or {})

    def address(self, name: str) -> int:
        """Where a buffer lies; the rows of an eviction until the next launch of any graph."""
        return self._selected[name] if name in self._selected else self._memory.address(name)

    def commit(self, stream: int, variant: ChunkVariant) -> None:
        """Copy what the next chunk sees into the pools."""
        address = self.address
        moves = [
            PitchedMove(
                address(copy.source) + copy.source_offset,
                address(copy.target) + copy.target_offset,
                copy.source_pitch,
                copy.target_pitch,
                copy.width,
                copy.height,
            )
            for copy in commit_copies(variant, self._config)
        ]
        if moves:
            self._cuda.move_rows(moves, stream)

    def chunk(self, stream: int, variant: ChunkVariant, mark: Mark) -> None:
        """Everything between the upload of a chunk's inputs and the copy of its results."""
        clean_input, num_steps = "noise", self._config.schedule.num_steps
        if not variant.recache:
            x = "noise"
            for i in range(num_steps):
                eps = NO_NOISE if i + 1 == num_steps else f"eps/{i}"
                x_next = f"x/{i % 2}"
                clean_input = self.step(stream, i, x, eps, x_next, steady=variant.steady)
                x = x_next
            mark("steps")
        self.clean(stream, clean_input, steady=variant.steady)
        mark("clean")
        if variant.evict:
            self.evict(stream)
        mark("evict")
        self.commit(stream, variant)
        mark("commit")
