"""Bundles that several tests use: each is exported once a run, whatever worker asks first.

What is exported is told by its content: weights, configuration, labels, FP8 scales, the project's
sources and the versions of the exporter's packages. The same content gives the same bundle, byte by
byte (tests/export/bundle/test_bundle.py exports twice and compares), so a copy stands for an export
of its own. Tests of the export itself call `forcing_kv.export.bundle.write.export_bundle`.
"""

import hashlib
import os
import shutil
from functools import cache
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from forcing_kv.export.bundle import write as exporter
from forcing_kv.export.bundle.write import BundleLabels
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.runtime_trt.bundle.fp8 import Fp8Scales
from forcing_kv.runtime_trt.bundle.manifest import Manifest, read_manifest
from forcing_kv.runtime_trt.rollout.config import RolloutConfig

CACHE_VARIABLE = "FORCING_KV_TEST_CACHE"
"""Environment variable: the folder of the bundles, which tests/conftest.py sets."""

PACKAGES = ("onnx", "onnx-ir", "onnxscript", "torch")
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


def export_once(
    model: CausalWanModel,
    config: RolloutConfig,
    target: Path,
    labels: BundleLabels,
    *,
    fp8: Fp8Scales | None = None,
) -> Manifest:
    """Puts a bundle at `target`, where there is none: a copy, which the test may change.

    `model` stays as it is; the other arguments are those of `export_bundle`.
    """
    folder = Path(os.environ[CACHE_VARIABLE]) / key_of(model, config, labels, fp8)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():  # It appears whole or not at all.
            exporter.export_bundle(model, config, folder, labels, fp8=fp8)
    shutil.copytree(folder, target)
    return read_manifest(target)
