"""Bundles and graphs that several tests use: each is exported once a run, by whoever asks first.

What is exported is told by its content: weights, configuration, labels, FP8 scales, the project's
sources and the versions of the exporter's packages. The same content gives the same bundle, byte by
byte (tests/export/bundle/test_bundle.py exports twice and compares), so a copy stands for an export
of its own. Tests of the export itself call `forcing_kv.export.bundle.write.export_bundle`.

Within `shared_graphs`, commands too take each graph that was exported before from the cache.
"""

import hashlib
import io
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from filelock import FileLock

from forcing_kv.export.bundle import onnx_graph
from forcing_kv.export.bundle import write as exporter
from forcing_kv.export.bundle.write import BundleLabels
from forcing_kv.export.decoder import add as decoders
from forcing_kv.export.model.capture import GraphSource
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.runtime_trt.bundle.fp8 import Fp8Scales
from forcing_kv.runtime_trt.bundle.manifest import Manifest, read_manifest
from forcing_kv.runtime_trt.rollout.config import RolloutConfig

CACHE_VARIABLE = "FORCING_KV_TEST_CACHE"
"""Environment variable: the folder of the bundles, which tests/conftest.py sets."""

PACKAGES = ("diffusers", "onnx", "onnx-ir", "onnxscript", "torch")
FOLDERS = ("export", "plugins", "runtime_trt")


@cache
def hash_of_sources() -> bytes:
    """Of everything that an export is made by."""
    digest = hashlib.sha256(repr([(name, version(name)) for name in PACKAGES]).encode())
    repository = Path(__file__).parents[2]
    for file in sorted(file for folder in FOLDERS for file in (repository / folder).rglob("*.*")):
        if file.suffix in (".json", ".py"):
            digest.update(f"{file.relative_to(repository)}\0".encode() + file.read_bytes())
    return digest.digest()


def key_of(
    model: CausalWanModel, config: RolloutConfig, labels: BundleLabels, fp8: Fp8Scales | None
) -> str:
    """Names a bundle by all that it is made of."""
    import torch

    digest = hashlib.sha256(hash_of_sources())
    digest.update(repr((config, labels, fp8)).encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


class _ContentPickler(pickle.Pickler):
    """Writes tensors as what they hold, not as where they lie, and no path they came from."""

    def reducer_override(self, value: Any) -> Any:
        import torch

        if type(value).__name__ == "FrozenDict":  # The configuration of a model of diffusers.
            return dict, ({key: each for key, each in value.items() if key != "_name_or_path"},)
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest = hashlib.sha256(content).hexdigest()
        return repr, ((type(value).__name__, value.dtype, tuple(value.shape), digest),)


def key_of_graph(source: GraphSource) -> str:
    """Names a graph by all that it is made of."""
    file = io.BytesIO()
    _ContentPickler(file).dump(source)
    return hashlib.sha256(hash_of_sources() + file.getvalue()).hexdigest()[:32]


def onnx_model_once(source: GraphSource) -> Any:
    """What `onnx_model` makes of `source`, exported where nobody has done so before."""
    import onnx
    import onnx_ir as ir

    file = Path(os.environ[CACHE_VARIABLE]) / f"{key_of_graph(source)}.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.exists():
            part = file.with_suffix(".part")
            onnx.save(ir.to_proto(onnx_graph.onnx_model(source)), part)
            part.rename(file)
    return ir.from_proto(onnx.load(file))


@contextmanager
def shared_graphs() -> Iterator[None]:
    """Within the block, graphs of bundles and of decoders are exported once a run."""
    with (
        mock.patch.object(exporter, "onnx_model", onnx_model_once),
        mock.patch.object(decoders, "onnx_model", onnx_model_once),
    ):
        yield


def export_once(
    model: CausalWanModel,
    config: RolloutConfig,
    target: Path,
    labels: BundleLabels,
    *,
    fp8: Fp8Scales | None = None,
    allow_non_finite: bool = False,
) -> Manifest:
    """Puts a bundle at `target`, where there is none: a copy, which the test may change.

    `model` stays as it is; the other arguments are those of `export_bundle`.
    """
    folder = Path(os.environ[CACHE_VARIABLE]) / key_of(model, config, labels, fp8)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():  # It appears whole or not at all.
            with shared_graphs():
                exporter.export_bundle(
                    model, config, folder, labels, fp8=fp8, allow_non_finite=allow_non_finite
                )
    shutil.copytree(folder, target)
    return read_manifest(target)
