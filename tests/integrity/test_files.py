"""Which files a bundle may name, and which an engine may open."""

import ast
import os
import shutil
from pathlib import Path

import onnx
import pytest
from manifests import edit
from onnx import TensorProto, helper

from forcing_kv.runtime_trt.bundle.fields import BundlePath
from forcing_kv.runtime_trt.bundle.hashes import open_regular, sha256_of
from forcing_kv.runtime_trt.bundle.manifest import Bundle, read_manifest
from forcing_kv.runtime_trt.bundle.schema import load_as, read_json
from forcing_kv.runtime_trt.errors import BundleError, InputError
from forcing_kv.runtime_trt.session import Session

INDUCTOR = "engines/inductor-cpu"


@pytest.mark.parametrize(
    "path",
    [
        "", ".", "..", "/", "/etc/passwd", "../x", "a/../b", "a/..", "./a", "a/./b", "a//b", "a/",
        "a\\b", "a\0b", "a\nb", "\x1b[1m", "a\u202eb", "x" * 501,
    ],
)  # fmt: skip
def test_paths_that_are_none_of_a_bundle(path):
    with pytest.raises(InputError, match="is no path within the bundle; allowed are relative"):
        load_as(BundlePath, path)


@pytest.mark.parametrize("path", ["a", "graphs/step.onnx", "a b/c-d_e.f", "ü/日本", ".hidden"])
def test_paths_of_a_bundle(path):
    assert load_as(BundlePath, path) == path


def as_in_a_hub_cache(bundle, cache):
    """The bundle as `huggingface_hub` downloads it: links to blobs that are named by their hash."""
    snapshot, blobs = (cache / "models--a--b" / part for part in ("snapshots/01ab", "blobs"))
    blobs.mkdir(parents=True)
    for file in (path for path in bundle.rglob("*") if path.is_file()):
        blob, place = blobs / sha256_of(file), snapshot / file.relative_to(bundle)
        shutil.copy(file, blob)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(blob, place.parent))
    return snapshot


def test_a_bundle_in_a_hub_cache_opens(whole_bundle, tmp_path):
    snapshot = as_in_a_hub_cache(whole_bundle, tmp_path)
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link"):
        with Bundle(folder) as bundle:
            bundle.check(bundle.recorded)
        Session.open(folder, "onnxruntime", num_threads=1).close()


def test_links_within_a_bundle_may_be_and_others_not(copied_bundle, tmp_path):
    step = copied_bundle / "graphs" / "step.onnx"
    step.rename(copied_bundle / "moved.onnx")
    step.symlink_to("../moved.onnx")
    Session.open(copied_bundle, "onnxruntime", num_threads=1).close()
    (copied_bundle / "moved.onnx").rename(tmp_path / "step.onnx")
    step.unlink()
    step.symlink_to(tmp_path / "step.onnx")
    with pytest.raises(BundleError, match=r"step\.onnx: a link that leads out of the bundle, to"):
        Session.open(copied_bundle)


def test_a_folder_within_that_is_a_link_to_elsewhere(copied_bundle, tmp_path):
    (copied_bundle / "graphs").rename(tmp_path / "graphs")
    (copied_bundle / "graphs").symlink_to(tmp_path / "graphs")
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Session.open(copied_bundle)


def test_a_manifest_that_is_a_link_to_elsewhere(copied_bundle, tmp_path):
    (copied_bundle / "manifest.json").rename(tmp_path / "manifest.json")
    (copied_bundle / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(BundleError, match="leads out of the bundle"):
        read_manifest(copied_bundle)


@pytest.mark.parametrize("name", ["manifest.json", "graphs/step.onnx", "graphs/weights.bin"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop", "broken link"])
def test_what_is_no_file_is_refused_at_once(copied_bundle, name, kind):
    path = copied_bundle / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path.name, "broken link": "none"}[kind])
    with pytest.raises(BundleError, match=path.name):
        Session.open(copied_bundle)


def test_json_that_is_a_pipe_or_endless(tmp_path):
    pipe = tmp_path / "x.json"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(InputError, match=r"cannot be read \(not a regular file\); make one"):
            read_json(path, "toy", "make one")
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(pipe)


def test_two_hashes_of_one_file_are_refused(copied_bundle):
    def change(data):
        data["timing_caches"] = {"graphs/step.onnx": "0" * 64}

    edit(copied_bundle, change)
    with pytest.raises(BundleError, match=r"graphs/step\.onnx has two hashes"):
        read_manifest(copied_bundle)


def altered_graph(bundle, name, change):
    """Change an ONNX file by somebody who makes every hash right again."""
    file = bundle / "graphs" / f"{name}.onnx"
    model = onnx.load(file, load_external_data=False)
    change(model)
    file.write_bytes(model.SerializeToString())
    edit(bundle, lambda data: data["graphs"][name].update(sha256=sha256_of(file)))


def outside(tensor, location):
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "4")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def first_outside(model):
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def set_entry(key, value):
    def change(model):
        entries = first_outside(model).external_data
        next(entry for entry in entries if entry.key == key).value = value

    return change


def twice(model):
    entry = first_outside(model).external_data.add()
    entry.key, entry.value = "location", "weights.bin"


def in_an_attribute(model):
    tensor = outside(TensorProto(name="x", dims=[1], data_type=1), "/etc/passwd")
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))


def in_a_subgraph(model):
    tensor = outside(TensorProto(name="x", dims=[1], data_type=1), "../../secret")
    inner = helper.make_graph([], "inner", [], [], [tensor])
    model.graph.node.append(helper.make_node("If", ["c"], ["o"], then_branch=inner))


def in_a_function(model):
    tensor = outside(TensorProto(name="x", dims=[1], data_type=1), "weights.bin")
    model.functions[0].node.append(helper.make_node("Constant", [], ["unused"], value=tensor))


def in_a_sparse_one(model):
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(outside(TensorProto(name="x", dims=[1], data_type=1), "other.bin"))


def for_training(model):
    model.training_info.add()


OUTSIDE = {
    "absolute": (set_entry("location", "/etc/passwd"), r"lies in '/etc/passwd', but only weights"),
    "above": (set_entry("location", "../../weights.bin"), r"lies in '\.\./\.\./weights\.bin'"),
    "beside": (set_entry("location", "other.bin"), r"lies in 'other\.bin'"),
    "beyond": (set_entry("offset", str(10**9)), r"ends beyond the end of graphs/weights\.bin"),
    "negative": (set_entry("offset", "-4"), r"'-4' is no number of bytes"),
    "shorter": (set_entry("length", "4"), r"has 4 bytes, but is float32"),
    "twice": (twice, r"has two entries 'location'"),
    "attribute": (in_an_attribute, r"a constant within a node lies in another file"),
    "subgraph": (in_a_subgraph, r"a constant within a node lies in another file"),
    "function": (in_a_function, r"a constant within a node lies in another file"),
    "sparse": (in_a_sparse_one, r"a constant within a node lies in another file"),
    "training": (for_training, r"a graph for training"),
}


@pytest.mark.parametrize(("change", "message"), OUTSIDE.values(), ids=OUTSIDE)
def test_weights_outside_of_the_hashed_file(copied_bundle, change, message):
    altered_graph(copied_bundle, "step", change)
    for backend in ("auto", "onnxruntime"):
        with pytest.raises(BundleError, match=rf"graphs/step\.onnx: .*{message}"):
            Session.open(copied_bundle, backend)


def test_a_graph_whose_ports_are_others(copied_bundle):
    """The manifest is right; the file is not what it says."""

    def change(model):
        model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE

    altered_graph(copied_bundle, "step", change)
    with pytest.raises(BundleError, match=r"inputs of this graph differ .* float64 in the file"):
        Session.open(copied_bundle)


@pytest.mark.parametrize("content", [b"", b"ORTM", b"\xff" * 50, b"\x3a\x02\x08", b"\x3b\x3c" * 9])
def test_a_graph_that_is_none(copied_bundle, content):
    file = copied_bundle / "graphs" / "step.onnx"
    file.write_bytes(content)
    edit(copied_bundle, lambda data: data["graphs"]["step"].update(sha256=sha256_of(file)))
    with pytest.raises(BundleError, match=r"graphs/step\.onnx: no ONNX"):
        Session.open(copied_bundle)


def test_engines_read_nothing_that_has_no_hash(whole_bundle, tmp_path):
    """A table of constants leads to a file that the manifest does not know."""
    from forcing_kv.runtime_trt.inductor import open as inductor

    bundle = Path(shutil.copytree(whole_bundle, tmp_path / "bundle"))
    table = bundle / INDUCTOR / "constants.json"
    (bundle / "secret").write_bytes(bytes(100))
    for place, message in (("secret", "no hash of it is recorded"), ("../secret", "is no path")):
        table.write_text(
            '{"w": {"shape": [1], "dtype": "float32", "pieces": '
            f'[{{"file": "{place}", "offset": 0, "nbytes": 4}}]}}}}'
        )
        files = {str(table.relative_to(bundle)): sha256_of(table)}
        edit(bundle, lambda data, new=files: data["engines"][0]["files"].update(new))
        with pytest.MonkeyPatch.context() as patch, Bundle(bundle) as opened:
            patch.setattr(inductor, "check_environment", lambda *_: None)
            with pytest.raises(BundleError, match=message):
                inductor.checked_inductor_record(opened)


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


LATE = {
    "package": lambda bundle: flip(bundle / INDUCTOR / "package.pt2"),
    "table of constants": lambda bundle: flip(bundle / INDUCTOR / "constants.json"),
    "constants": lambda bundle: flip(bundle / INDUCTOR / "constants.bin"),
    "weights": lambda bundle: flip(bundle / "graphs" / "weights.bin"),
    "portable graph": lambda bundle: flip(bundle / "graphs" / "evict.onnx"),
    "ports": lambda bundle: edit(
        bundle, lambda data: data["engines"][0]["graphs"]["clean"]["inputs"].pop()
    ),
    "order": lambda bundle: edit(
        bundle, lambda data: data["engines"][0]["graphs"]["step"]["outputs"].reverse()
    ),
    "a second package": lambda bundle: edit(
        bundle,
        lambda data: data["engines"][0]["graphs"]["step"].update(
            file="graphs/step.onnx", sha256=(data["graphs"]["step"]["sha256"])
        ),
    ),
    "another file of the table": lambda bundle: (bundle / "graphs" / "weights.bin").unlink(),
}


@pytest.mark.parametrize("spoil", [None, *LATE.values()], ids=["whole", *LATE])
@pytest.mark.parametrize("backend", ["auto", "inductor"])
def test_native_code_is_loaded_after_every_check(
    whole_bundle, tmp_path, monkeypatch, backend, spoil
):
    """Whatever is wrong, the library of an Inductor package has not been loaded by then."""
    from forcing_kv.runtime_trt.inductor import open as inductor
    from forcing_kv.runtime_trt.inductor.package import environment

    class LoadedError(Exception):
        pass

    def load(*_):
        raise LoadedError

    bundle = Path(shutil.copytree(whole_bundle, tmp_path / "bundle"))
    here = environment("cpu")
    edit(bundle, lambda data: data["engines"][0].update(environment=here))
    monkeypatch.setattr(inductor, "InductorPackage", load)
    if spoil is None:
        with pytest.raises(LoadedError):
            Session.open(bundle, backend)
        return
    spoil(bundle)
    with pytest.raises(BundleError):
        Session.open(bundle, backend)


def test_nothing_is_fetched_unasked(repository):
    """Whatever loads a model by its folder says that it is to be there."""
    calls = [
        (file, call)
        for package in ("calibration", "export", "plugins", "runtime_trt", "tools")
        for file in sorted((repository / package).rglob("*.py"))
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "from_pretrained"
    ]
    assert len(calls) >= 2
    for file, call in calls:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("local_files_only") == "True", f"{file}:{call.lineno}"
