"""A session on a model compiled by Inductor, without a bundle: for checks and benchmarks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from forcing_kv.export.inductor.compile import (
    CompiledPackage,
    InductorOptions,
    compile_sources,
)
from forcing_kv.export.model.capture import graph_sources
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.model.rewrite import sort_heads_
from forcing_kv.runtime_trt.bundle.atomic.files import scratch_folder
from forcing_kv.runtime_trt.inductor.open import package_backend
from forcing_kv.runtime_trt.inductor.package import InductorPackage
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.session import Session


def compile_model(
    model: CausalWanModel,
    config: RolloutConfig,
    folder: Path,
    options: InductorOptions,
) -> CompiledPackage:
    """Compile a model as `fkv build --backend inductor` would, straight from its weights.

    Args:
        model: weights under the official names, heads in checkpoint order; not changed.
        folder: existing directory that receives the package.
    """
    prepared = sort_heads_(copy.deepcopy(model), config.partition)
    prepared = prepared.cast_(getattr(torch, config.dtype)).to(options.device).eval()
    sources = graph_sources(prepared, config, options.fusion)
    return compile_sources(sources, folder, options)


def open_compiled(
    compiled: CompiledPackage, config: RolloutConfig, device: str, *, use_graphs: bool = True
) -> Session:
    """A session on a compiled package; on CUDA it replays a captured graph a chunk by default."""
    content, where = compiled.path.read_bytes(), str(compiled.path)
    package = InductorPackage(content, where, compiled.graphs, compiled.constants, device)
    return Session(package_backend(config, package, use_graphs=use_graphs))


@contextmanager
def inductor_session(
    model: CausalWanModel, config: RolloutConfig, options: InductorOptions
) -> Iterator[Session]:
    """Compile a model to a temporary package and open a session on it; arguments as above."""
    with scratch_folder() as folder:
        compiled = compile_model(model, config, folder, options)
        with open_compiled(compiled, config, options.device) as session:
            yield session
