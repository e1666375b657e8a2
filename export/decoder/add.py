"""Adds a video decoder to a bundle: its graphs with explicit state, its weights, its entry."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forcing_kv.export.bundle.edit import (
    changed_bundle,
    decoder_stems,
    discard_decoder,
    free_name,
)
from forcing_kv.export.bundle.onnx_graph import WeightStore, onnx_model, write_onnx
from forcing_kv.export.bundle.write import Report, graph_info, write_manifest
from forcing_kv.export.checkpoint.finite import FiniteCheck
from forcing_kv.export.model.capture import GraphSource
from forcing_kv.runtime_trt.bundle.atomic.files import scratch_folder
from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo
from forcing_kv.runtime_trt.bundle.hashes import sha256_of
from forcing_kv.runtime_trt.bundle.manifest import (
    GRAPH_FOLDER,
    DecoderInfo,
    Manifest,
)
from forcing_kv.runtime_trt.decode.runner import NEW_STATE, STATE
from forcing_kv.runtime_trt.dtypes import dtype_name
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.ports import port_name


@dataclass(frozen=True)
class DecoderSource:
    """A decoder ready to be captured."""

    kind: str
    decode: nn.Module
    """(latents [1, C, h, w] float32, state) -> (frames [k, 3, H, W] float32, new state).

    Of the frames 0..1 is to be shown: they are clipped where one has seen that they are finite."""
    state_shapes: tuple[tuple[int, ...], ...]
    state_dtype: torch.dtype
    latent_channels: int
    """C of the latents that it takes."""
    decode_first: nn.Module | None = None
    """The same for the first latent frame, from no state; None where zeros are its state."""
    first_states: tuple[int, ...] = ()
    """Which states `decode_first` returns; the others stay zeros."""
    num_trimmed_frames: int = 0
    path: Path | None = None
    """Where its weights come from; None for random ones."""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """As that file has them, under the names of `decode`; for what is said of them."""

    @property
    def source(self) -> str:
        """What it is made from, for people."""
        return "random weights" if self.path is None else self.path.name

    def check(self, channels: int, *, allow_non_finite: bool) -> None:
        """Refuse a decoder that a bundle could not use.

        Args:
            channels: C of the bundle's latents.
            allow_non_finite: whether its weights may be NaN or infinite.

        Raises:
            InputError: it decodes other latents, or has weights that are not finite, in the file or
                in its dtype.
        """
        where = self.source if self.path is None else str(self.path)
        if self.latent_channels != channels:
            raise InputError(
                f"{where}: decodes latents of {self.latent_channels} channels, but this bundle's "
                f"have {channels}; give the decoder of its model"
            )
        if not allow_non_finite:
            check = FiniteCheck(where)
            check.look_at(self.decode, self.weights)
            check.refuse()

    def new_state(self) -> list[Tensor]:
        """The state before any frame."""
        return [torch.zeros(shape, dtype=self.state_dtype) for shape in self.state_shapes]

    def graphs(self, latent_shape: tuple[int, int, int]) -> list[GraphSource]:
        """The graphs for latent frames of [C, h, w]."""
        latents = torch.zeros(1, *latent_shape)
        layers = range(len(self.state_shapes))
        inputs = ("latents", *_numbered(STATE, layers))
        outputs = ("frames", *_numbered(NEW_STATE, layers))
        found = [GraphSource("decode", self.decode, (latents, self.new_state()), inputs, outputs)]
        if self.decode_first is not None:
            outputs = ("frames", *_numbered(NEW_STATE, self.first_states))
            first = GraphSource(
                "decode_first", self.decode_first, (latents,), ("latents",), outputs
            )
            found.append(first)
        return found


def _numbered(stem: str, states: Iterable[int]) -> tuple[str, ...]:
    return tuple(port_name(stem, state) for state in states)


def add_decoder(
    bundle: Path,
    source: DecoderSource,
    *,
    force: bool = False,
    allow_non_finite: bool = False,
    report: Report = lambda _: None,
) -> Manifest:
    """Export a decoder into a bundle that is there.

    Args:
        force: replace a decoder of the same kind.
        allow_non_finite: take weights that are NaN or infinite.
        report: told the name of each part when it begins.

    Returns:
        The new manifest.

    Raises:
        BundleError: no readable bundle.
        InputError: the bundle has such a decoder already, or it is not one for this bundle.
    """
    kind = source.kind
    with (
        changed_bundle(bundle) as manifest,
        scratch_folder(bundle / GRAPH_FOLDER) as work,
    ):
        check_decoder_target(manifest, bundle, kind, force=force)
        source.check(manifest.config.model.in_channels, allow_non_finite=allow_non_finite)
        discard_decoder(bundle, manifest, kind)
        stem = free_name(kind, decoder_stems(manifest))
        (work / GRAPH_FOLDER).mkdir()
        graphs = _write_graphs(source, stem, manifest, work, report)
        weights = f"{GRAPH_FOLDER}/{stem}.bin"
        info = DecoderInfo(
            graphs, weights, sha256_of(work / weights), source.num_trimmed_frames, source.source
        )
        report("manifest")
        updated = replace(manifest, decoders={**manifest.decoders, kind: info})
        for file in (weights, *(graph.file for graph in graphs.values())):
            (work / file).replace(bundle / file)
        updated = write_manifest(updated, bundle)
        discard_decoder(bundle, updated, kind)
    return updated


def check_decoder_target(manifest: Manifest, bundle: Path, kind: str, *, force: bool) -> None:
    """Refuse to replace a decoder unasked, or to write where that is not allowed.

    Raises:
        InputError: what is in the way.
    """
    if kind in manifest.decoders and not force:
        raise InputError(f"{bundle}: has a {kind} decoder already; replace it with --force")
    if not os.access(bundle, os.W_OK):
        raise InputError(f"{bundle}: cannot be written; choose a copy that can")


def _write_graphs(
    source: DecoderSource, stem: str, manifest: Manifest, work: Path, report: Report
) -> Mapping[str, GraphInfo]:
    _, channels, height, width = manifest.config.latent_shape
    graphs: dict[str, GraphInfo] = {}
    folder = work / GRAPH_FOLDER
    with ExitStack() as stack:
        file = stack.enter_context((folder / f"{stem}.bin").open("wb"))
        store = WeightStore(file, f"{stem}.bin", folder)
        for graph in source.graphs((channels, height, width)):
            report(graph.name)
            relative = f"{GRAPH_FOLDER}/{stem}_{graph.name}.onnx"
            exported = onnx_model(graph)
            write_onnx(exported, work / relative, store)
            graphs[graph.name] = graph_info(exported, relative, work)
    return graphs


def frames_from_signed(pixels: Tensor) -> Tensor:
    """Pixels [1, 3, k, H, W] around -1..1 to frames [k, 3, H, W] float32 around 0..1."""
    return (pixels[0].transpose(0, 1).float() + 1) / 2


def named_tensors(content: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    """The content of a weight file whose every entry is a tensor.

    Raises:
        InputError: one is not.
    """
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise InputError(
                f"{where}: entry {str(name)[:80]!r} is a {type(value).__name__}, not a tensor; "
                "give the decoder's own weights"
            )
    return dict(content)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict into `module`, every key, shape and dtype checked.

    Args:
        module: may be on the meta device; takes the tensors themselves, in their dtype.

    Raises:
        InputError: what does not fit.
    """
    needed = {name: list(value.shape) for name, value in module.state_dict().items()}
    found = {name: list(value.shape) for name, value in state.items()}
    wrong = sorted(name for name in {*needed, *found} if needed.get(name) != found.get(name))
    if wrong:
        first = wrong[0]
        has, needs = found.get(first, "missing"), needed.get(first, "unknown")
        raise InputError(
            f"{where}: not the weights of this decoder: {len(wrong)} of {len(needed)} tensors are "
            f"missing, unknown or mis-shaped, such as {', '.join(wrong[:3])} (the first is {has}, "
            f"needed is {needs}); give a whole file of this very model"
        )
    whole = sorted(name for name, value in state.items() if value.dtype not in _FLOATS)
    if whole:
        raise InputError(
            f"{where}: {len(whole)} tensors are no plain floats, such as {whole[0]} "
            f"({dtype_name(state[whole[0]].dtype)}); give weights that are not quantised"
        )
    module.load_state_dict(dict(state), assign=True)


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
