"""Which weights a stripped engine leaves out, and where the bundle holds them.

An engine is asked for its weights by name. The names are those of the graph that the builder was
given, which for TensorRT-RTX is not the bundle's own, so they are recorded when it is built. Only
what lies in the shared weight file is left out: no engine lacks what the bundle does not hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import onnx_ir as ir

from forcing_kv.export.bundle.read import weight_entry
from forcing_kv.runtime_trt.bundle.constants import ConstantEntry, write_table
from forcing_kv.runtime_trt.errors import ForcingKvError


def shared_weights(path: Path) -> dict[str, ConstantEntry]:
    """Initializers of a graph that lie in the weight file beside it, by name.

    Args:
        path: ONNX file, in a bundle or derived from one.

    Returns:
        Where they are; files are relative to the graph's folder.
    """
    values = ir.load(path).graph.initializers
    tensors = {name: value.const_value for name, value in values.items()}
    return {
        name: weight_entry(tensor, str(tensor.location), tuple(tensor.shape.numpy()))
        for name, tensor in tensors.items()
        if isinstance(tensor, ir.ExternalTensor)
    }


def mark_stripped(network: Any, path: Path) -> dict[str, ConstantEntry]:
    """Mark what a stripped engine leaves out.

    Args:
        network: TensorRT network, parsed from `path`; changed.

    Returns:
        Where each weight that is left out lies; files are relative to the graph's folder.

    Raises:
        ForcingKvError: the network does not know a weight by its name in the graph.
    """
    table = shared_weights(path)
    unknown = [name for name in table if not network.mark_weights_refittable(name)]
    if unknown:
        raise ForcingKvError(
            f"{path.name}: --strip-weights needs to name its weights, and the builder does not "
            f"know {unknown[:3]} ({len(unknown)} unknown); build it without --strip-weights"
        )
    return table


def write_stripped(path: Path, table: Mapping[str, ConstantEntry], folder: PurePath) -> None:
    """Write what `mark_stripped` returned, for a graph that is in `folder` of the bundle."""
    write_table(
        path,
        {
            name: replace(
                entry,
                pieces=tuple(
                    replace(piece, file=str(folder / piece.file)) for piece in entry.pieces
                ),
            )
            for name, entry in table.items()
        },
    )
