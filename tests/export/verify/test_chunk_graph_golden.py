"""The chunk-graph runtime against the published results, on the CPU double."""

from pathlib import Path

import pytest
from host_cuda import HostCuda
from host_engine import HostEngine
from shared_exports import export_once

from forcing_kv.export.bundle.write import BundleLabels
from forcing_kv.export.verify.golden import GoldenCase, verify_golden
from forcing_kv.runtime_trt.cuda.chunk_graph import ChunkGraphBackend
from forcing_kv.runtime_trt.session import Session

CASES = sorted(
    path.parent for path in Path(__file__).parents[2].glob("golden/*/golden.npz")
    if path.parent.name != "head_profile"
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_golden_cases_pass_captured(path, tmp_path):
    case = GoldenCase.load(path)
    bundle = tmp_path / "bundle"
    manifest = export_once(case.load_model(), case.config, bundle, BundleLabels("golden"))
    cuda = HostCuda()
    engine = HostEngine(cuda, bundle, manifest)
    with Session(ChunkGraphBackend(cuda, engine, case.config, manifest.graphs)) as session:
        checks = list(verify_golden(case, session))
        assert session.backend.captured_graphs
    assert all(check.passed for check in checks), checks
    assert not cuda.live
