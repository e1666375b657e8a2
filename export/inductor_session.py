"""A session on a model compiled by Inductor, without a bundle: for checks and benchmarks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from forcing_kv.export.denoiser import CausalWanModel
from forcing_kv.export.inductor_package import InductorOptions, compile_package
from forcing_kv.export.rewrite import sort_heads_
from forcing_kv.runtime_trt.backends.open_inductor import package_backend
from forcing_kv.runtime_trt.config import RolloutConfig
from forcing_kv.runtime_trt.inductor_package import InductorPackage
from forcing_kv.runtime_trt.session import Session


@contextmanager
def inductor_session(
    model: CausalWanModel,
    config: RolloutConfig,
    options: InductorOptions,
    *,
    use_graphs: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> Iterator[Session]:
    """Compile a model to a temporary package and open a session on it.

    Args:
        model: weights under the official names, heads in checkpoint order; not changed.
        config: rollout configuration.
        options: target and fusions.
        use_graphs: on CUDA, replay a captured graph a chunk.
        report: told the name of each part when it begins.
    """
    prepared = sort_heads_(copy.deepcopy(model), config.partition)
    prepared = prepared.cast_(getattr(torch, config.dtype)).to(options.device).eval()
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_package(prepared, config, Path(folder), options, report)
        package = InductorPackage(
            compiled.path, compiled.graphs, compiled.constants, options.device
        )
        with Session(package_backend(config, package, use_graphs=use_graphs)) as session:
            yield session
