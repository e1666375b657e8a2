"""Inputs and outputs of every exported graph: names, shapes, dtypes and their order.

Tracing, the manifest's check, the backends, the memory plan and verification read them here, and
nothing else makes or takes apart the name of a tensor that exists once a layer.

    prompt_embeds            [text rows, text dim] float32
    x, eps                   [F, C, h, w] float32: noisy latents, noise of the next step's input
    x0, x_next               [F, C, h, w] float32: a step's estimate, the next step's input
    time_sinusoid            [1, freq_dim] float32
    step_index               [1] int32: what a graph with time tables takes instead
    sigma, next_sigma        [1] float32: noise levels of x and of x_next
    rope_cos, rope_sin       [F, temporal pairs] float32
    hist_len                 [L, H] int32: valid history rows of every head
    new_len                  [1] int32: valid rows of the chunk
    text_bias                [text rows] float32: added to the scores of folded text
    hist_k.l, hist_v.l       [R, D]: packed pool of layer l
    cross_k.l, cross_v.l     [H, text rows, D]: keys and values of the text
    new_k.l, new_v.l         [W, D]: keys and values of the chunk that a commit may copy
    dyn_k.l, dyn_v.l         [G, B * T, D]: segments that an eviction selected
    scores, kept             [F, P] float32, [B * P] int32: segment similarities, kept segments

Keys and values are in the compute dtype, heads in exported order. Legend beside that of `layout`: C
latent channels, h and w latent rows and columns, L layers; of a layer R pool rows, W rows of the
frames of the chunk that each head may keep, head by head, G dynamic heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from forcing_kv.runtime_trt.rollout.config import RolloutConfig

Family = Literal["hist", "cross", "new", "dyn"]
"""What keys and values are of: the past, the text, the chunk, the eviction."""

Part = Literal["k", "v"]
PARTS: tuple[Part, Part] = ("k", "v")
"""Keys and values."""

STEP_SCALARS = ("time_sinusoid", "step_index", "sigma", "next_sigma")
"""Inputs that differ from step to step and never change; a graph takes those that it needs."""

LENGTHS = ("hist_len", "new_len")
"""Inputs that say how much a chunk sees; the steady form has them baked in."""

POSITIONS = ("rope_cos", "rope_sin", *LENGTHS)
"""Inputs that say where a chunk lies in the video and what it sees."""

_INTEGERS = ("step_index", "hist_len", "new_len", "kept")
_SEPARATOR = "."
_T = TypeVar("_T")


def port_name(stem: str, index: int | None) -> str:
    """Name of a tensor, or of one of several that share a stem: `hist_k.3`."""
    return stem if index is None else f"{stem}{_SEPARATOR}{index}"


def split_name(name: str) -> tuple[str, int | None]:
    """Stem and index of a name that `port_name` made."""
    stem, _, index = name.rpartition(_SEPARATOR)
    return (stem, int(index)) if stem and index.isdecimal() else (name, None)


def steady_name(graph: str) -> str:
    """Name of a graph's steady form, for chunks whose `ChunkPlan.steady` is true."""
    return f"{graph}_steady"


def kv_name(family: Family, part: Part, layer: int) -> str:
    """Name of the keys, or of the values, of one layer."""
    return port_name(f"{family}_{part}", layer)


def kv_names(family: Family, layers: Iterable[int]) -> tuple[str, ...]:
    """Names of the keys, then of the values, of `layers`."""
    layers = tuple(layers)
    return tuple(kv_name(family, part, layer) for part in PARTS for layer in layers)


@dataclass(frozen=True)
class Port:
    """One input or output of a graph."""

    name: str
    """Unique among the tensors of a deployment; graphs that share it share the tensor."""
    shape: tuple[int, ...]
    dtype: str
    family: Family | None = None
    """Of keys and values, which exist once a layer."""


Argument = Port | tuple[Port, ...]
"""What stands in one place of a graph's signature: a tensor, or a list of one a layer."""


@dataclass(frozen=True)
class GraphPorts:
    """Inputs and outputs of one graph."""

    arguments: tuple[Argument, ...]
    results: tuple[Argument, ...]

    @property
    def inputs(self) -> tuple[Port, ...]:
        return _flat(self.arguments)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return _flat(self.results)

    def bind(self, tensors: Mapping[str, _T]) -> tuple[_T | list[_T], ...]:
        """Arguments of a call, from every input by name."""
        return tuple(
            tensors[argument.name]
            if isinstance(argument, Port)
            else [tensors[port.name] for port in argument]
            for argument in self.arguments
        )


def _flat(arguments: tuple[Argument, ...]) -> tuple[Port, ...]:
    lists = ((each,) if isinstance(each, Port) else each for each in arguments)
    return tuple(port for ports_ in lists for port in ports_)


class PortLike(Protocol):
    """A port, or what a manifest says of one."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


class GraphLike(Protocol):
    """Ports of a graph, or what a manifest says of them."""

    @property
    def inputs(self) -> Sequence[PortLike]: ...
    @property
    def outputs(self) -> Sequence[PortLike]: ...


def ports_by_name(graphs: Mapping[str, GraphLike]) -> dict[str, PortLike]:
    """Every input and output of several graphs, once each."""
    return {
        port.name: port for graph in graphs.values() for port in (*graph.inputs, *graph.outputs)
    }


def ports(
    config: RolloutConfig,
    *,
    time_tables: bool = False,
    clean_graph: bool = False,
    text_rows: int | None = None,
    steady: bool = True,
) -> dict[str, GraphPorts]:
    """Ports of the graphs of a deployment: prompt, step, and as asked for clean and evict.

    Passes over a chunk (step and clean) have two forms: the general one for every chunk, and the
    steady one, which knows how much a steady chunk sees.

    A bundle holds the plain graphs; what a compiler may ask for instead is in
    `export.model.fusion.FusionOptions`.

    Args:
        time_tables: a step is told by its index instead of its sinusoid.
        clean_graph: the clean pass has a graph of its own, and `step` returns latents alone.
        text_rows: rows of folded text, which come with a bias; None for every row of the prompt.
        steady: whether the passes over a chunk have their steady form too.
    """
    known = _Ports(config, text_rows or config.model.text_len)
    layers = range(config.model.num_layers)
    single, pair = known.single, known.pair
    time = "step_index" if time_tables else "time_sinusoid"
    text = () if text_rows is None else ("text_bias",)
    new = pair("new", layers)

    def passes(
        graph: str, own: tuple[Argument, ...], read: Sequence[int], results: tuple[Argument, ...]
    ) -> None:
        """Both forms of a pass that attends in the layers `read`."""
        kv: tuple[Argument, ...] = (*pair("hist", read), *pair("cross", read), *single(*text))
        found[graph] = GraphPorts((*own, *single(*POSITIONS), *kv), results)
        if steady:
            known_lengths = [name for name in POSITIONS if name not in LENGTHS]
            found[steady_name(graph)] = GraphPorts((*own, *single(*known_lengths), *kv), results)

    noise = single("x", "eps", time, "sigma", "next_sigma")
    latents = single("x0", "x_next")
    results: tuple[Argument, ...] = latents if clean_graph else (*latents, *new)
    found = {"prompt": GraphPorts(single("prompt_embeds"), pair("cross", layers))}
    passes("step", noise, layers, results)
    if clean_graph:
        # Cut after the last layer's keys and values, so that layer attends to nothing.
        passes("clean", single("x", time), layers[:-1], new)
    if chosen := config.evicted_layers:
        found["evict"] = GraphPorts(
            (*pair("hist", chosen), *pair("new", chosen)),
            (*pair("dyn", chosen), *single("scores", "kept")),
        )
    return found


def pool_ports(config: RolloutConfig) -> tuple[Port, ...]:
    """Pools of every layer: keys, then values."""
    layers = range(config.model.num_layers)
    return _flat(_Ports(config, config.model.text_len).pair("hist", layers))


class _Ports:
    """Ports of one configuration with `num_text_rows` rows of text."""

    def __init__(self, config: RolloutConfig, num_text_rows: int) -> None:
        self._config, self._num_text_rows = config, num_text_rows
        model, policy, frames = config.model, config.policy, config.chunk.num_frames
        temporal = (frames, model.rope_pairs[0])
        self._shapes: dict[str, tuple[int, ...]] = {
            "prompt_embeds": (num_text_rows, model.text_dim),
            **dict.fromkeys(("x", "eps", "x0", "x_next"), config.latent_shape),
            "time_sinusoid": (1, model.freq_dim),
            **dict.fromkeys(("step_index", "sigma", "next_sigma", "new_len"), (1,)),
            **dict.fromkeys(("rope_cos", "rope_sin"), temporal),
            "hist_len": (model.num_layers, model.num_heads),
            "text_bias": (num_text_rows,),
            "scores": (frames, policy.num_segments),
            "kept": (policy.num_kept_segments,),
        }

    def single(self, *names: str) -> tuple[Port, ...]:
        """Tensors that exist once."""
        return tuple(
            Port(name, self._shapes[name], "int32" if name in _INTEGERS else "float32")
            for name in names
        )

    def pair(self, family: Family, layers: Sequence[int]) -> tuple[tuple[Port, ...], ...]:
        """Keys, then values, of each of `layers`."""
        dtype = self._config.dtype
        return tuple(
            tuple(
                Port(kv_name(family, part, layer), self._shape(family, layer), dtype, family)
                for layer in layers
            )
            for part in PARTS
        )

    def _shape(self, family: Family, layer: int) -> tuple[int, ...]:
        config, num_heads = self._config, self._config.model.num_heads
        layout, dim = config.layouts[layer], config.model.head_dim
        if family == "hist":
            return layout.num_rows, dim
        if family == "cross":
            return num_heads, self._num_text_rows, dim
        if family == "new":
            return layout.num_own_rows, dim
        group = layout.group("dynamic")
        assert group is not None, f"layer {layer} is not evicted"
        return group.num_heads, config.policy.num_dynamic_frames * group.tokens_per_frame, dim
