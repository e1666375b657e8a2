"""A package of AOTInductor graphs in memory: weights handed over once, graphs run by name.

torch is imported when a package is opened, never before.
"""

from __future__ import annotations

import io
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo
from forcing_kv.runtime_trt.errors import BackendUnavailableError, BundleError, require
from forcing_kv.runtime_trt.rollout.ports import split_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REBUILD = "build it again with `fkv build BUNDLE --backend inductor`"


def environment(device: torch.device | str) -> dict[str, str]:
    """What a package must have been compiled for to run on `device`."""
    torch = require("torch", extra="inductor")
    found = {"torch": torch.__version__, "machine": platform.machine()}
    if torch.device(device).type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found |= {"device": "cuda", "sm": f"{major}{minor}", "cuda": str(torch.version.cuda)}
    else:
        capability: str = torch.backends.cpu.get_cpu_capability()
        found |= {"device": "cpu", "cpu": capability}
    return found


def check_environment(built: Mapping[str, str], device: torch.device | str) -> None:
    """Compare where a package was compiled with here.

    Raises:
        BackendUnavailableError: they differ; names every difference.
    """
    here = environment(device)
    keys = [key for key in {**built, **here} if built.get(key) != here.get(key)]
    if keys:
        differences = ", ".join(
            f"{key} {built.get(key)} (here {here.get(key)})" for key in sorted(keys)
        )
        raise BackendUnavailableError(
            f"the Inductor engine was compiled for another environment: {differences}; {REBUILD}"
        )


class InductorPackage:
    """Compiled graphs with their weights.

    Args:
        content: of the package's file. It holds native code, which this runs.
        where: the file, for messages.
        constants: what the graphs were compiled with, by name, on the target device; shared.

    Raises:
        BundleError: the file does not load, or needs a constant that is not given.
    """

    def __init__(
        self,
        content: bytes,
        where: str,
        graphs: Mapping[str, GraphInfo],
        constants: Mapping[str, Tensor],
        device: torch.device | str,
    ) -> None:
        torch = require("torch", extra="inductor")
        self.graphs = dict(graphs)
        self.constants = dict(constants)
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._content, self._where = content, where
        loaded = self._load()
        self._runners = {name: self._ready(name, loaded) for name in graphs}

    def _load(self) -> Mapping[str, Any]:
        """Every model of the package, each loaded once."""
        archive = require("torch.export.pt2_archive._package", extra="inductor")
        index = self.device.index if self.device.type == "cuda" else None
        try:
            # One runner without worker threads: the form that a CUDA graph can capture.
            contents = archive.load_pt2(
                io.BytesIO(self._content),
                run_single_threaded=True,
                device_index=-1 if index is None else index,
            )
        except Exception as error:
            raise BundleError(f"{self._where} does not load ({error}); {REBUILD}") from error
        models: Mapping[str, Any] = contents.aoti_runners
        return models

    def _ready(self, name: str, loaded: Mapping[str, Any]) -> Any:
        """The model of one graph, its constants handed over."""
        if name not in loaded:
            raise BundleError(f"{self._where} holds no graph {name}; {REBUILD}")
        runner = loaded[name]
        needed = runner.get_constant_fqns()
        missing = [constant for constant in needed if constant not in self.constants]
        if missing:
            raise BundleError(
                f"{self._where}: graph {name} needs constants {missing[:3]}, which the engine's "
                f"table does not have; {REBUILD}"
            )
        if needed:
            given = {constant: self.constants[constant] for constant in needed}
            runner.load_constants(given, check_full_update=True, user_managed=True)
        return runner

    def sibling(self) -> InductorPackage:
        """The same graphs for another session, on the same weights."""
        return InductorPackage(self._content, self._where, self.graphs, self.constants, self.device)

    def run(self, graph: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a graph on the current stream.

        Args:
            tensors: every input by name; others are ignored.

        Returns:
            Every output by name, in memory that the package allocates.
        """
        pytree = require("torch.utils._pytree", extra="inductor")
        info = self.graphs[graph]
        outputs = self._runners[graph](*_grouped([port.name for port in info.inputs], tensors))
        names = [port.name for port in info.outputs]
        return dict(zip(names, pytree.tree_leaves(outputs), strict=True))

    def close(self) -> None:
        """Drop the graphs; the last sibling to go frees the weights."""
        self._runners.clear()
        self.constants.clear()


def _grouped(names: list[str], tensors: Mapping[str, Tensor]) -> list[Any]:
    """Arguments of a graph: `hist_k.0`, `hist_k.1`, ... are one list.

    All are dense: a compiled graph reads its inputs as row-major without a look at their strides,
    and what another graph returned may lie otherwise (convolutions leave channels last).
    """
    arguments: dict[str, Any] = {}
    for name in names:
        stem, index = split_name(name)
        if index is None:
            arguments[stem] = tensors[name].contiguous()
        else:
            arguments.setdefault(stem, []).append(tensors[name].contiguous())
    return list(arguments.values())
