"""Reads the weights back out of a bundle: the model that its graphs were exported from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.model.fp8_layers import quantize_
from forcing_kv.runtime_trt.bundle.constants import ConstantEntry, Piece, read_constants
from forcing_kv.runtime_trt.bundle.manifest import WEIGHT_FILE, Manifest
from forcing_kv.runtime_trt.dtypes import BY_ONNX
from forcing_kv.runtime_trt.errors import BundleError
from forcing_kv.runtime_trt.rollout.ports import steady_name

MODEL_PREFIX = "model."
"""What graphs put before the names of the denoiser's parameters."""

_PATCH_WEIGHT = "patch_embedding.weight"


@dataclass(frozen=True)
class BundleWeights:
    """A model, and where its larger parameters lie in the bundle."""

    model: CausalWanModel
    """Heads in exported order, weights in the bundle's dtype, on the CPU."""
    entries: Mapping[str, ConstantEntry]
    """Parameters in the shared weight file by official name; small ones are missing."""


def read_bundle_weights(bundle: Path, manifest: Manifest) -> BundleWeights:
    """Rebuild the exported model.

    Raises:
        BundleError: a parameter is not among the graphs' initializers.
    """
    with torch.device("meta"):
        model = CausalWanModel(manifest.config.model)
    if manifest.fp8 is not None:
        quantize_(model, manifest.fp8)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = _initializers(bundle, manifest, wanted)
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise BundleError(
            f"{bundle}: the graphs hold no initializer for {missing[:3]} ({len(missing)} missing); "
            "export the bundle again"
        )
    entries = {
        name: weight_entry(tensor, WEIGHT_FILE, wanted[name])
        for name, tensor in found.items()
        if isinstance(tensor, ir.ExternalTensor)
    }
    state = {
        name: torch.frombuffer(bytearray(tensor.tobytes()), dtype=_dtype(tensor)).view(wanted[name])
        for name, tensor in found.items()
        if name not in entries
    }
    for name, entry, content in read_constants(bundle, entries):
        dtype = getattr(torch, entry.dtype)
        state[name] = torch.from_numpy(content).view(dtype).view(entry.shape)
    model.load_state_dict(state, assign=True)
    return BundleWeights(model.requires_grad_(False).eval(), entries)


def _initializers(
    bundle: Path, manifest: Manifest, wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, ir.TensorProtocol]:
    """Initializers of all graphs by official parameter name."""
    found: dict[str, ir.TensorProtocol] = {}
    patches: list[ir.TensorProtocol] = []
    flat = (wanted[_PATCH_WEIGHT][0], torch.Size(wanted[_PATCH_WEIGHT][1:]).numel())
    for graph_name, graph in manifest.graphs.items():
        if graph_name == steady_name("step"):  # It has those of the general form.
            continue
        for name, value in ir.load(bundle / graph.file).graph.initializers.items():
            tensor, official = value.const_value, name.removeprefix(MODEL_PREFIX)
            assert tensor is not None, f"initializer {name} has no value"
            if official in wanted:
                found[official] = tensor
            elif tuple(tensor.shape.numpy()) == flat:
                patches.append(tensor)
    # The exporter folds the reshape of this one weight, and with it the name.
    if _PATCH_WEIGHT not in found and len(patches) == 1:
        found[_PATCH_WEIGHT] = patches[0]
    return found


def _dtype(tensor: ir.TensorProtocol) -> torch.dtype:
    return getattr(torch, BY_ONNX[tensor.dtype.name].name)


def weight_entry(tensor: ir.ExternalTensor, file: str, shape: tuple[int, ...]) -> ConstantEntry:
    """Where a tensor of a graph lies in its weight file, which is `file`."""
    piece = Piece(file, tensor.offset or 0, tensor.length or tensor.nbytes)
    return ConstantEntry(shape, BY_ONNX[tensor.dtype.name].name, (piece,))
