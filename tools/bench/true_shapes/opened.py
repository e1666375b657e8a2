"""Subjects opened from what an earlier round has built."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from forcing_kv.runtime_trt.bundle.atomic.files import write_file
from forcing_kv.runtime_trt.bundle.manifest import MANIFEST_FILE, read_manifest
from forcing_kv.runtime_trt.session import Session
from forcing_kv.tools.bench.subjects import LoadClock, Subject
from forcing_kv.tools.bench.workloads import Workload

_PRODUCT = ("inductor", "onnxruntime")
"""Subjects that are opened from a bundle."""
_ROOT = Path(__file__).resolve().parents[3]
_MADE_BY = (
    "runtime_trt", "plugins", "export", "tools/bench/pytorch", "tools/bench/true_shapes",
)  # fmt: skip
"""Folders of the source that bundles and references are made by."""


def place_of(folder: Path, work: Workload) -> Path:
    """Where a workload's bundle and results are kept; emptied when the source has changed."""
    digest = hashlib.sha256(repr(work.config.to_json()).encode()).hexdigest()[:12]
    name = f"{work.model}-{work.size}-{work.policy}-{work.config.dtype}-{digest}"
    place = folder / "true-shapes" / name
    made_by = place / "source"
    if not made_by.is_file() or made_by.read_text() != _source_digest():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        write_file(made_by, _source_digest().encode())
    return place


@cache
def _source_digest() -> str:
    """Hash of the source that makes what is kept."""
    found = hashlib.sha256()
    for folder in _MADE_BY:
        for file in sorted((_ROOT / folder).rglob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()


@contextmanager
def opened(subject: Subject, work: Workload, place: Path, clock: LoadClock) -> Iterator[Session]:
    """A session of a subject on the CPU, one thread; the product's from a bundle in `place`."""
    if subject.name not in _PRODUCT:
        with subject.open(work, "cpu", clock) as session:
            yield session
        return
    bundle = place / "bundle"
    with clock("build"):
        _build(subject.name, work, bundle)
    with clock("open"):
        session = Session.open(bundle, subject.name, num_threads=1)
    with session:
        yield session


def _build(backend: str, work: Workload, bundle: Path) -> None:
    """Make what is missing of a bundle and its engine."""
    from forcing_kv.export.bundle.write import BundleLabels, export_bundle
    from forcing_kv.export.inductor.build import build_inductor
    from forcing_kv.export.inductor.compile import InductorOptions

    if not (bundle / MANIFEST_FILE).is_file():
        labels = BundleLabels(work.model)
        export_bundle(work.load("cpu"), work.config, bundle, labels, consume=True)
    if backend == "inductor" and not read_manifest(bundle).engines:
        build_inductor(bundle, InductorOptions("cpu"))
