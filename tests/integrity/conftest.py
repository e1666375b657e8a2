"""A small whole bundle: denoiser, a decoder, records of engines of every kind, a timing cache."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from manifests import edit
from tiny_bundles import copied_bundle, tiny_bundle, tiny_config

from forcing_kv.runtime_trt.bundle.constants import ConstantEntry, Piece, write_table
from forcing_kv.runtime_trt.bundle.hashes import sha256_of
from forcing_kv.runtime_trt.bundle.manifest import WEIGHT_FILE, read_manifest
from forcing_kv.runtime_trt.rollout.ports import ports

__all__ = ["copied_bundle", "tiny_bundle", "tiny_config"]

INDUCTOR, TENSORRT = "engines/inductor-cpu", "engines/tensorrt-sm89"
TIMING = "engines/timing-gpu-11.4-1.cache"


@pytest.fixture(scope="session")
def whole_bundle(tiny_bundle, tiny_config, tmp_path_factory) -> Path:
    """Read only. Its engines are of another machine, so that ONNX Runtime runs it."""
    import torch
    from shared_exports import shared_graphs

    from forcing_kv.export.bundle.write import write_manifest
    from forcing_kv.export.decoder.add import add_decoder
    from forcing_kv.export.decoder.tae import TinyDecoder, tiny_decoder

    folder = tmp_path_factory.mktemp("whole")
    _, channels, *size = tiny_config.latent_shape
    torch.manual_seed(0)
    torch.save(TinyDecoder(channels, (8, 6, 4, 4)).state_dict(), folder / "taew2_1.pth")
    bundle = Path(shutil.copytree(tiny_bundle, folder / "bundle"))
    with shared_graphs():
        add_decoder(bundle, tiny_decoder(folder / "taew2_1.pth", (size[0], size[1])))
    for engine in (INDUCTOR, TENSORRT):
        (bundle / engine).mkdir(parents=True)
    (bundle / TIMING).write_bytes(b"tactics")
    records = [_inductor(bundle), _tensorrt(bundle)]
    caches = {TIMING: sha256_of(bundle / TIMING)}
    edit(bundle, lambda data: data.update(engines=records, timing_caches=caches))
    write_manifest(read_manifest(bundle), bundle)  # With every entry that there is.
    return bundle


def _inductor(bundle: Path) -> dict:
    """As `fkv build --backend inductor` writes it, for a release of PyTorch that there is not."""
    (bundle / INDUCTOR / "package.pt2").write_bytes(b"no package")
    (bundle / INDUCTOR / "constants.bin").write_bytes(bytes(16))
    pieces = (Piece(WEIGHT_FILE, 0, 8), Piece(f"{INDUCTOR}/constants.bin", 8, 8))
    write_table(bundle / INDUCTOR / "constants.json", {"w": ConstantEntry((4,), "float32", pieces)})
    config = read_manifest(bundle).config
    package = f"{INDUCTOR}/package.pt2"
    fused = ports(config, time_tables=True, clean_graph=True)
    graphs = {
        name: {"file": package, "sha256": sha256_of(bundle / package)}
        | {kind: _infos(getattr(graph, kind)) for kind in ("inputs", "outputs")}
        for name, graph in fused.items()
    }
    files = {
        str(path.relative_to(bundle)): sha256_of(path)
        for path in sorted((bundle / INDUCTOR).iterdir())
    }
    return {
        "backend": "inductor", "folder": INDUCTOR, "build_seconds": 1.5, "files": files,
        "environment": {"torch": "1.0", "device": "cpu", "cpu": "AVX2"},
        "options": {"device": "cpu", "fusion": {"qkv": True, "text_rows": None}, "autotune": True},
        "graphs": graphs, "decoders": {},
    }  # fmt: skip


def _infos(found) -> list[dict]:
    return [{"name": p.name, "shape": list(p.shape), "dtype": p.dtype} for p in found]


def _tensorrt(bundle: Path) -> dict:
    graphs, files = {}, {}
    for name, info in read_manifest(bundle).graphs.items():
        plan = f"{TENSORRT}/{name}.plan"
        (bundle / plan).write_bytes(f"no plan of {name}".encode())
        files[plan] = sha256_of(bundle / plan)
        graphs[name] = json.loads(json.dumps(asdict(replace(info, file=plan, sha256=files[plan]))))
    return {
        "backend": "tensorrt", "target": "sm89", "folder": TENSORRT, "build_seconds": 2.5,
        "environment": {"tensorrt": "11.4.0.106", "sm": "89", "gpu": "NVIDIA L4"},
        "options": {"tf32": True}, "files": files, "graphs": graphs,
        "details": {name: {"weight_nbytes": 1000, "scratch_nbytes": 5000} for name in graphs},
        "decoders": {},
    }  # fmt: skip
