"""The Inductor engine of a bundle: weights shared, results as the golden case has them."""

from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._inductor.config
from shared_exports import export_once

from forcing_kv.export.bundle.read import read_bundle_weights
from forcing_kv.export.bundle.write import BundleLabels
from forcing_kv.export.inductor import compile as compiler
from forcing_kv.export.inductor.build import build_inductor
from forcing_kv.export.inductor.compile import (
    InductorOptions,
    choose_attention,
    refused_attention,
)
from forcing_kv.export.model.fusion import FUSED, FusionOptions
from forcing_kv.export.model.rewrite import sort_heads_
from forcing_kv.export.verify.bundle import verify_bundle
from forcing_kv.export.verify.golden import GoldenCase, verify_golden
from forcing_kv.plugins.steady_attention.cuda_body import KERNELS
from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo, TensorInfo
from forcing_kv.runtime_trt.bundle.manifest import read_manifest
from forcing_kv.runtime_trt.errors import BackendUnavailableError, BundleError, InputError
from forcing_kv.runtime_trt.inductor.backend import InductorBackend
from forcing_kv.runtime_trt.inductor.engine import InductorEngine
from forcing_kv.runtime_trt.inductor.package import (
    InductorPackage,
    check_environment,
    environment,
)
from forcing_kv.runtime_trt.open import open_backend
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.session import Session

SMALL = RolloutConfig(
    ModelShape(2, dim=8, ffn_dim=8, num_heads=2, text_len=3, text_dim=4, freq_dim=8),
    ChunkShape(3, 4, 6),
    CachePolicy(),
    HeadPartition(2, ((), (0,))),
    dtype="bfloat16",
)


@pytest.fixture(scope="module")
def case(repository: Path) -> GoldenCase:
    return GoldenCase.load(repository / "tests/golden/fkv_selfforcing")


@pytest.fixture(scope="module")
def bundle(case: GoldenCase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inductor") / "bundle"
    export_once(case.load_model(), case.config, folder, BundleLabels("golden"))
    return folder


@pytest.mark.slow
def test_weights_come_back_out_of_a_bundle(bundle, case):
    weights = read_bundle_weights(bundle, read_manifest(bundle))
    wanted = sort_heads_(case.load_model(), case.config.partition).state_dict()
    found = weights.model.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.slow
@pytest.mark.parametrize("fusion", [FUSED, FusionOptions(text_rows=12)], ids=["fused", "folded"])
def test_engine_passes_the_golden_case(bundle, case, fusion):
    build_inductor(bundle, InductorOptions("cpu", fusion))
    (record,) = read_manifest(bundle).engines
    stored = (bundle / record.folder / "constants.bin").stat().st_size
    assert stored < 0.05 * (bundle / "graphs/weights.bin").stat().st_size
    with Session.open(bundle, "inductor") as session:
        for check in verify_golden(case, session):
            assert check.passed, check.line()
    with closing(open_backend(bundle, "inductor")) as backend:
        report = verify_bundle(bundle, backend)
        assert report.passed, report
        assert {"cross_k.0", "new_v.1", "dyn_k.1"} <= {check.tensor for check in report.tensors}
    package = bundle / record.folder / "package.pt2"
    content = bytearray(package.read_bytes())
    content[len(content) // 2] ^= 1
    package.write_bytes(content)
    message = r"package\.pt2: altered since it was built .*`fkv build"
    for backend in ("inductor", "auto"):
        with pytest.raises(BundleError, match=message):
            open_backend(bundle, backend)


@pytest.fixture
def loads(monkeypatch):
    """Replaces PyTorch's loader of packages; lists the calls."""
    calls = []
    runner = SimpleNamespace(get_constant_fqns=list)

    def load(file, **options):
        calls.append((file.read(), options))
        return SimpleNamespace(aoti_runners=dict.fromkeys(("prompt", "step", "clean"), runner))

    monkeypatch.setattr("torch.export.pt2_archive._package.load_pt2", load)
    return calls


def test_a_package_is_loaded_once(loads):
    graphs = dict.fromkeys(("prompt", "step", "clean"), GraphInfo("package.pt2", "", (), ()))
    package = InductorPackage(b"models", "here", graphs, {}, "cpu")
    assert loads == [(b"models", {"run_single_threaded": True, "device_index": -1})]
    package.sibling()
    assert len(loads) == 2
    with pytest.raises(BundleError, match=r"here holds no graph evict; build it again"):
        InductorPackage(b"models", "here", {**graphs, "evict": graphs["step"]}, {}, "cpu")


def test_memory_of_captures_is_of_the_packages_device(monkeypatch):
    current = [torch.device("cuda", 0)]

    @contextmanager
    def device(wanted):
        current.append(wanted)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "MemPool", lambda: current[-1])
    engine = InductorEngine(SimpleNamespace(device=torch.device("cuda", 1)))
    assert engine._pool == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 0)]


def test_single_tensors_are_shown():
    port = TensorInfo("prompt_embeds", (3, 4), "float32")
    cross = torch.arange(8, dtype=torch.bfloat16)

    graphs = {
        "prompt": GraphInfo("package.pt2", "", (port,), ()),
        "step": GraphInfo("package.pt2", "", (), ()),
    }

    def run(graph, tensors):
        assert graph == "prompt"
        return {"cross_k.0": cross * tensors["prompt_embeds"].sum()}

    package = SimpleNamespace(device=torch.device("cpu"), graphs=graphs, run=run)
    backend = InductorBackend(SMALL, package)
    backend.set_prompt(np.ones((3, 4), np.float32))
    shown = backend.read_tensor("cross_k.0")
    assert shown.dtype == np.float32
    np.testing.assert_array_equal(shown, 12 * np.arange(8))
    assert not backend.read_pool(1)[0].any()


def test_another_environment_is_refused():
    here = environment("cpu")
    check_environment(here, "cpu")
    with pytest.raises(BackendUnavailableError, match=r"torch 1\.0 \(here .*build it again with"):
        check_environment({**here, "torch": "1.0"}, "cpu")


@pytest.mark.parametrize("autotune", [False, True])
def test_compiler_knows_its_settings(autotune):
    settings = InductorOptions("cuda", autotune=autotune).inductor_settings()
    assert settings["aot_inductor.compile_wrapper_opt_level"] == "O0"
    assert ("max_autotune" in settings) is autotune
    known = torch._inductor.config.get_config_copy()
    assert settings.keys() <= known.keys()


def test_a_kernel_that_refuses_the_model_is_no_package_s(monkeypatch, caplog):
    """What a GPU would refuse, here every fused kernel on a CPU: said before anything is built."""
    for name, value in {"is_available": True, "get_device_name": "A GPU"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    called = partial(refused_attention, device="cpu")
    monkeypatch.setattr(
        compiler, "refused_attention", lambda kernel, config, _: called(kernel, config)
    )
    for name in KERNELS:
        with pytest.raises(
            InputError, match=rf"--attention {name} refuses .*: .*CPU.*; take triton"
        ):
            choose_attention(name, "cuda", SMALL)
    assert choose_attention("auto", "cuda", SMALL) == "triton"
    assert "attend with triton: cudnn refuses the model" in caplog.text

    shapes = []

    def dense(q, k, v):
        shapes.append((tuple(q.shape), tuple(k.shape)))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(compiler, "KERNELS", dict.fromkeys(KERNELS, dense))
    assert choose_attention("auto", "cuda", SMALL) == "cudnn"
    group = SMALL.layouts[-1].groups[-1]
    own, dim = SMALL.chunk.num_tokens, SMALL.model.head_dim
    heads = group.num_heads
    assert shapes == [((1, heads, own, dim), (1, heads, own + group.steady_rows, dim))]


def test_cuda_without_a_device_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    with pytest.raises(BackendUnavailableError, match="give --device cpu"):
        build_inductor(tmp_path, InductorOptions("cuda"))
