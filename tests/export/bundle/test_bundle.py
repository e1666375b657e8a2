"""What an export writes: all or nothing, each weight once, nothing of the machine that wrote it."""

import dataclasses
import getpass
import hashlib
import itertools
import shutil
import socket
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from shared_exports import export_once, shared_graphs

from forcing_kv.export.bundle import onnx_graph, write
from forcing_kv.export.bundle.write import BundleLabels, export_bundle, replaced_directory
from forcing_kv.export.model.capture import graph_sources
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.model.rewrite import sort_heads_
from forcing_kv.export.verify.eager import eager_session
from forcing_kv.runtime_trt import Session
from forcing_kv.runtime_trt.bundle.atomic import places
from forcing_kv.runtime_trt.bundle.hashes import sha256_of
from forcing_kv.runtime_trt.bundle.manifest import read_manifest
from forcing_kv.runtime_trt.errors import ForcingKvError, InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.schedule import Schedule

SHAPE = ModelShape(
    3, dim=48, ffn_dim=40, num_heads=4, in_channels=2, text_len=6, text_dim=20, freq_dim=16
)
PARTITION = HeadPartition(4, ((1,), (1, 2), (0, 3)))
DTYPES = ("float32", "float16", "bfloat16")


def make_config(dtype="float32", **policy):
    return RolloutConfig(
        SHAPE, ChunkShape(3, 4, 6), CachePolicy(**policy), PARTITION, Schedule((1000, 500)), dtype
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return CausalWanModel(SHAPE).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def bundles(model, tmp_path_factory):
    """One bundle a dtype."""
    folder = tmp_path_factory.mktemp("bundles")
    for dtype in DTYPES:
        export_once(model, make_config(dtype), folder / dtype, BundleLabels("tiny"))
    return folder


def prompt():
    shape = (SHAPE.text_len, SHAPE.text_dim)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def rollout(session, num_chunks=4):
    with session:
        session.set_prompt(prompt())
        return list(session.stream(num_chunks, seed=1))


def graphs(bundle: Path):
    for info in read_manifest(bundle).graphs.values():
        yield info, onnx.load(bundle / info.file, load_external_data=False)


def test_the_model_given_is_not_changed(model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    eager_session(model, make_config("bfloat16")).close()
    sorted_copy = sort_heads_(CausalWanModel(SHAPE), PARTITION)
    assert sorted_copy.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name]), name


def test_head_order_leaves_outputs_unchanged(model):
    """Same policy for both kinds of heads, so that a partition is an order and nothing else."""
    videos = []
    for static in (((), (), ()), PARTITION.static_heads, ((3,), (0, 2), (0, 1, 2, 3))):
        partition = HeadPartition(4, static)
        policy = CachePolicy(1, 2, 2, 0, compress_first_layer=True)
        config = dataclasses.replace(make_config(), partition=partition, policy=policy)
        videos.append([chunk.latents for chunk in rollout(eager_session(model, config))])
    for other in videos[1:]:
        np.testing.assert_allclose(other, videos[0], atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_onnxruntime_is_close_to_eager(model, bundles, dtype):
    wanted = rollout(eager_session(model, make_config(dtype)))
    found = rollout(Session.open(bundles / dtype, "onnxruntime", num_threads=1))
    exact = rollout(eager_session(model, make_config("float32")))
    for ours, theirs, true in zip(found, wanted, exact, strict=True):
        if dtype == "float32":
            np.testing.assert_allclose(ours.latents, theirs.latents, atol=5e-6)
            assert np.array_equal(ours.kept, theirs.kept) or ours.kept is theirs.kept is None
            continue
        error = np.abs(ours.latents - true.latents).max()
        allowed = np.abs(theirs.latents - true.latents).max()
        assert 0 < error <= 2 * allowed + 2e-3
        assert error < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_graphs_are_valid_and_say_their_dtype(bundles, dtype):
    compute = {
        "float32": onnx.TensorProto.FLOAT,
        "float16": onnx.TensorProto.FLOAT16,
        "bfloat16": onnx.TensorProto.BFLOAT16,
    }[dtype]
    for info, graph in graphs(bundles / dtype):
        onnx.checker.check_model(bundles / dtype / info.file, full_check=False)
        ports = {
            **{v.name: v for v in graph.graph.input},
            **{v.name: v for v in graph.graph.output},
        }
        assert list(ports) == [port.name for port in (*info.inputs, *info.outputs)]
        for port in (*info.inputs, *info.outputs):
            tensor = ports[port.name].type.tensor_type
            assert tuple(dim.dim_value for dim in tensor.shape.dim) == port.shape
            if port.name.partition(".")[0] in ("hist_k", "new_v", "cross_k", "dyn_v"):
                assert tensor.elem_type == compute
            elif port.name in ("x", "x0", "x_next", "eps", "scores", "sigma", "rope_cos"):
                assert tensor.elem_type == onnx.TensorProto.FLOAT
            elif port.name in ("kept", "hist_len", "new_len"):
                assert tensor.elem_type == onnx.TensorProto.INT32


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_custom_node_has_a_body_and_says_how_to_find_its_plugin(bundles, dtype):
    seen = set()
    for _, graph in graphs(bundles / dtype):
        bodies = {function.name for function in graph.functions}
        for node in graph.graph.node:
            if node.domain in ("", "ai.onnx"):
                continue
            assert node.domain == "forcing_kv"
            assert node.op_type in bodies
            names = {attribute.name for attribute in node.attribute}
            assert names >= {"plugin_namespace", "plugin_version", "aot"}
            seen.add(node.op_type)
    assert seen == {
        "FkHeadIndexedAttention", "FkQkNormRope", "FkSegmentSimilarity", "FkSimilarityEviction",
        "FkSteadyAttention",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_of_this_machine_is_inside(bundles, dtype):
    words = ["/tmp/", ".py", "forcing_kv/", str(bundles)]
    words += [str(Path.home()), str(Path.cwd()), str(Path(torch.__file__).parents[1])]
    words += [name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 5]
    files = [path for path in (bundles / dtype).rglob("*") if path.is_file()]
    assert len(files) == (6 if dtype == "bfloat16" else 7)
    for file in files:
        content = file.read_bytes()
        for word in words:
            # Weights are random bytes, in which a short word may turn up.
            if len(word) > 5 or file.suffix != ".bin":
                assert word.encode() not in content, f"{word} in {file.name}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_is_stored_once(model, bundles, dtype):
    content = (bundles / dtype / "graphs" / "weights.bin").read_bytes()
    places: Counter[tuple[int, int]] = Counter()
    shapes = {}
    for _, graph in graphs(bundles / dtype):
        for tensor in graph.graph.initializer:
            if not tensor.HasField("data_location") or not tensor.external_data:
                assert len(tensor.raw_data) <= 1024
                continue
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == "weights.bin"
            place = int(entries["offset"]), int(entries["length"])
            assert place[0] % 4096 == 0
            assert sum(place) <= len(content)
            places[place] += 1
            shapes[place] = tuple(tensor.dims)
    offsets = sorted(places)
    assert all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(offsets))
    hashes = Counter()
    for offset, length in places:
        rows = np.frombuffer(content[offset : offset + length], np.uint8)
        hashes[hashlib.sha256(rows).hexdigest()] += 1
        shape = shapes[offset, length]
        if len(shape) == 2:  # a transposed copy counts as a copy
            turned = rows.reshape(*shape, -1).swapaxes(0, 1)
            if shape[0] != shape[1] or not np.array_equal(turned, rows.reshape(*shape, -1)):
                hashes[hashlib.sha256(np.ascontiguousarray(turned)).hexdigest()] += 1
    assert max(hashes.values()) == 1
    wanted = sum(
        value.numel() * value.element_size()
        for value in CausalWanModel(SHAPE).cast_(getattr(torch, dtype)).state_dict().values()
    )
    stored = sum(length for _, length in places)
    assert stored <= wanted * 1.02 + 16 * 1024


def test_the_manifest_tells_the_truth(model, bundles):
    folder = bundles / "float32"
    manifest = read_manifest(folder)
    assert manifest.config == make_config()
    assert manifest.weights_nbytes == (folder / "graphs/weights.bin").stat().st_size
    assert manifest.weights_sha256 == sha256_of(folder / "graphs/weights.bin")
    for info in manifest.graphs.values():
        assert info.sha256 == sha256_of(folder / info.file)
    assert set(manifest.provenance["tools"]) >= {"torch", "onnx"}
    assert (folder.stat().st_mode & 0o777) == 0o755


def test_a_second_export_is_the_same(model, bundles, tmp_path):
    """Which is why one export serves many tests (doubles/shared_exports.py)."""
    export_bundle(model, make_config(), tmp_path / "again", BundleLabels("tiny"))
    for name in ("graphs/prompt.onnx", "graphs/step.onnx", "graphs/evict.onnx", "manifest.json"):
        assert sha256_of(tmp_path / "again" / name) == sha256_of(bundles / "float32" / name)
    assert sha256_of(tmp_path / "again/graphs/weights.bin") == sha256_of(
        bundles / "float32/graphs/weights.bin"
    )


def test_a_graph_is_decomposed_once_and_pytorch_left_as_it_was(model, monkeypatch):
    """Names private to other packages among them: without those an export is right, but slow."""
    from onnxscript import rewriter
    from torch._export import utils
    from torch.fx import config
    from torch.onnx._internal.exporter import _schemas

    def told():
        return config.do_not_emit_stack_traces, utils._materialize_cpp_cia_ops

    before, calls, plain = told(), [], torch.export.ExportedProgram.run_decompositions

    def counted(program, table, **options):
        calls.append(told())
        return plain(program, table, **options)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    (source,) = (each for each in graph_sources(model, make_config()) if each.name == "evict")
    onnx_graph.onnx_model(source)
    ((stacks, listed),) = calls
    assert stacks is True
    assert listed is not before[1]
    assert told() == before
    assert hasattr(_schemas.op_signature_from_function, "cache_info")
    assert len(onnx_graph._REWRITE_RULES) == len(rewriter._DEFAULT_REWRITE_RULES) - 1


@pytest.mark.parametrize(
    ("stage", "error", "raised"),
    [
        ("write_onnx", OSError(28, "No space left on device"), ForcingKvError),
        ("sha256_of", KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_crash_leaves_nothing(model, tmp_path, monkeypatch, stage, error, raised):
    def fail(*_):
        raise error

    monkeypatch.setattr(write, stage, fail)
    with pytest.raises(raised), shared_graphs():
        export_bundle(model, make_config(), tmp_path / "b", BundleLabels("tiny"))
    assert list(tmp_path.iterdir()) == []


def test_a_crash_leaves_the_old_bundle(model, bundles, tmp_path, monkeypatch):
    old = shutil.copytree(bundles / "float32", tmp_path / "b")
    before = sha256_of(old / "manifest.json")

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(write, "sha256_of", fail)
    with pytest.raises(MemoryError), shared_graphs():
        export_bundle(model, make_config(), old, BundleLabels("new"), force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert sha256_of(old / "manifest.json") == before


def write_word(folder: Path, word: str, **options):
    with replaced_directory(folder, **options) as temporary:
        (temporary / "manifest.json").write_text(word)


def test_only_force_replaces_and_only_bundles(tmp_path):
    target = tmp_path / "deep" / "b"
    write_word(target, "one", force=False)
    with pytest.raises(InputError, match=r"exists already.*--force"):
        write_word(target, "two", force=False)
    assert (target / "manifest.json").read_text() == "one"
    write_word(target, "two", force=True)
    assert (target / "manifest.json").read_text() == "two"
    assert [path.name for path in target.parent.iterdir()] == ["b"]
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.png").write_text("x")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(InputError, match="file is not a writable folder"):
        write_word(file / "b", "one", force=False)
    for other in (photos, file):
        with pytest.raises(InputError, match="is not a bundle"):
            write_word(other, "three", force=True)
    assert (photos / "cat.png").exists()
    assert file.read_text() == "x"


def test_a_failed_replacement_puts_the_old_bundle_back(tmp_path, monkeypatch):
    write_word(tmp_path / "b", "one", force=False)
    rename = Path.rename

    def fail_on_the_new(path, target):
        if not path.name.endswith(".old") and Path(target).name == "b":
            raise PermissionError(13, "Permission denied", str(target))
        return rename(path, target)

    monkeypatch.setattr(places, "_rename", lambda *_: False)  # A system that cannot exchange.
    monkeypatch.setattr(Path, "rename", fail_on_the_new)
    with pytest.raises(ForcingKvError, match=r"/b: Permission denied; check"):
        write_word(tmp_path / "b", "two", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert (tmp_path / "b" / "manifest.json").read_text() == "one"


def test_force_follows_a_link_to_a_bundle(tmp_path):
    write_word(tmp_path / "real", "one", force=False)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_word(tmp_path / "link", "two", force=True)
    assert (tmp_path / "link" / "manifest.json").read_text() == "two"
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"real", "link"}


@pytest.mark.parametrize(
    ("policy", "partition", "told"),
    [
        ({}, HeadPartition(4, ((), (0, 1, 2, 3), ())), "layer 1 has no dynamic head"),
        ({"num_segments": 5}, PARTITION, "5 does not divide"),
        ({"num_temporal_frames": 0}, PARTITION, "1 <= num_temporal_frames <= 3"),
        ({"num_temporal_frames": 4, "num_sink_frames": 0}, PARTITION, "4"),
        ({"num_dynamic_frames": 4}, PARTITION, "4"),
        ({}, HeadPartition(3, ((), (), ())), "3 heads"),
        ({}, HeadPartition(4, ((), ())), "2 layers"),
    ],
)
def test_what_fixed_shapes_cannot_run_is_refused(policy, partition, told):
    with pytest.raises(InputError, match=told):
        dataclasses.replace(make_config(), policy=CachePolicy(**policy), partition=partition)
