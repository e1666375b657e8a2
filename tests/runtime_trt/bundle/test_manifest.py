"""Opening a bundle: what is missing, altered, malformed or of another version is named."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manifests import edit

from forcing_kv.runtime_trt import Session
from forcing_kv.runtime_trt.bundle.hashes import sha256_of
from forcing_kv.runtime_trt.bundle.manifest import read_manifest
from forcing_kv.runtime_trt.errors import (
    BackendUnavailableError,
    BundleError,
    InputError,
)

JSON_VALUES = st.sampled_from(
    [None, True, -1, 0, 7, 1.5, "", "abc", [], [1], [[1]], {}, {"a": 1}, [None], [{}]]
)


def test_reading_gives_back_what_was_written(tiny_bundle, tiny_config):
    manifest = read_manifest(tiny_bundle)
    assert manifest.config == tiny_config
    again = json.loads(json.dumps(manifest.to_json()))
    assert again == json.loads((tiny_bundle / "manifest.json").read_text())
    assert next(iter(again)) == "schema_version"
    assert set(manifest.graphs) == {"prompt", "step", "step_steady", "evict"}
    assert set(manifest.onnxruntime) == {"step"}


@pytest.mark.parametrize("version", [0, 1, 2, 99, None, "3", True, 3.0])
def test_another_schema_version(copied_bundle, version):
    edit(copied_bundle, lambda data: data.update(schema_version=version))
    with pytest.raises(BundleError, match=r"schema version .* found, this runtime reads 3"):
        read_manifest(copied_bundle)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '"text"', '{"schema_version": 3}'])
def test_malformed_manifest(copied_bundle, content):
    (copied_bundle / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        read_manifest(copied_bundle)


def test_bytes_that_are_no_text(copied_bundle):
    (copied_bundle / "manifest.json").write_bytes(b"\xff\xfe\x00{}")
    with pytest.raises(BundleError, match=r"manifest\.json"):
        read_manifest(copied_bundle)


@settings(max_examples=200)
@given(data=st.data())
def test_any_damaged_entry_is_a_bundle_error_or_harmless(data, tiny_bundle, tmp_path_factory):
    content = holder = json.loads((tiny_bundle / "manifest.json").read_text())
    key = data.draw(st.sampled_from(list(holder)), "key")
    while holder[key] and isinstance(holder[key], (dict, list)) and data.draw(st.integers(0, 4)):
        holder = holder[key]
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        key = data.draw(st.sampled_from(keys), "key")
    if isinstance(holder, dict) and data.draw(st.booleans(), "remove"):
        del holder[key]
    else:
        holder[key] = data.draw(JSON_VALUES, "value")
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "manifest.json").write_text(json.dumps(content))
    message = "manifest.json export"
    try:
        read_manifest(folder)
    except BundleError as error:
        message = str(error)
    assert "manifest.json" in message
    assert "export" in message


def test_unknown_entries_are_refused_by_name(copied_bundle):
    edit(copied_bundle, lambda data: data["config"]["policy"].update(num_sinks=2))
    with pytest.raises(BundleError, match=r"num_sinks.*allowed are.*num_sink_frames"):
        read_manifest(copied_bundle)


@pytest.mark.parametrize("name", ["prompt.onnx", "step.onnx", "evict.onnx", "weights.bin"])
def test_an_altered_file_is_named_with_the_remedy(copied_bundle, name):
    file = copied_bundle / "graphs" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name}: altered since export.*fkv export"):
        Session.open(copied_bundle)


@pytest.mark.parametrize("name", ["step.onnx", "weights.bin"])
def test_a_missing_file_is_named_with_the_remedy(copied_bundle, name):
    (copied_bundle / "graphs" / name).unlink()
    with pytest.raises(BundleError, match=rf"{name}: missing.*fkv export"):
        Session.open(copied_bundle)


def test_a_truncated_weight_file_is_named(copied_bundle):
    file = copied_bundle / "graphs" / "weights.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"weights\.bin: altered"):
        Session.open(copied_bundle)


def test_a_folder_that_is_no_bundle(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(BundleError, match=r"not a bundle.*fkv export"):
            Session.open(folder)


def test_an_unknown_backend_lists_the_known(tiny_bundle):
    with pytest.raises(InputError, match=r"'cuda'.*auto.*onnxruntime"):
        Session.open(tiny_bundle, backend="cuda")


def test_a_missing_onnxruntime_is_named(monkeypatch, tiny_bundle):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for backend in ("auto", "onnxruntime"):
        with pytest.raises(BackendUnavailableError, match=r"pip install 'forcing-kv\[onnxruntime"):
            Session.open(tiny_bundle, backend=backend)


def test_a_bfloat16_bundle_is_refused_with_the_remedy(copied_bundle):
    import onnx

    def change(data):
        data["config"]["dtype"] = "bfloat16"
        del data["onnxruntime"]
        for graph in data["graphs"].values():
            file = copied_bundle / graph["file"]
            model = onnx.load(file, load_external_data=False)
            for kind in ("input", "output"):
                for port, recorded in zip(
                    getattr(model.graph, kind), graph[f"{kind}s"], strict=True
                ):
                    if port.name.split(".")[0][-2:] in ("_k", "_v"):
                        port.type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
                        recorded["dtype"] = "bfloat16"
            file.write_bytes(model.SerializeToString())
            graph["sha256"] = sha256_of(file)

    edit(copied_bundle, change)
    with pytest.raises(BackendUnavailableError, match=r"bfloat16.*--dtype float32"):
        Session.open(copied_bundle, backend="onnxruntime")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["graphs"].update(step=data["graphs"]["evict"]),
        lambda data: data["graphs"].pop("evict"),
        lambda data: data["config"]["policy"].update(num_static_frames=2),
        lambda data: data["config"]["policy"].update(num_dynamic_frames=0),
        lambda data: data["config"]["chunk"].update(latent_height=8),
    ],
)
def test_a_manifest_that_does_not_fit_its_graphs_is_refused(copied_bundle, change):
    edit(copied_bundle, change)
    with pytest.raises(BundleError, match=r"manifest\.json: graphs.*export"):
        read_manifest(copied_bundle)


@pytest.mark.parametrize(
    ("graph", "kind", "place", "change", "told"),
    [
        ("step", "inputs", 2, {"name": "time"}, r"is time \[1, 8\] .*needs time_sinusoid \[1, 8\]"),
        ("step", "inputs", 7, {"shape": [2, 4]}, r"is hist_len \[2, 4\] .*needs hist_len \[2, 3\]"),
        ("step", "outputs", 1, {"dtype": "float16"}, r"is x_next .* float16, .*needs x_next .*32"),
        ("prompt", "inputs", 0, {"shape": [4, 5]}, r"is prompt_embeds \[4, 5\].*needs .* \[3, 5\]"),
        ("prompt", "outputs", 3, {"name": "cross_v.2"}, r"is cross_v\.2 .*needs cross_v\.1 "),
        ("evict", "outputs", 3, {"dtype": "int64"}, r"is kept \[6\] int64,.*needs kept .* int32"),
    ],
)  # fmt: skip
def test_any_port_that_is_not_the_configuration_s_is_named(
    copied_bundle, graph, kind, place, change, told
):
    edit(copied_bundle, lambda data: data["graphs"][graph][kind][place].update(change))
    with pytest.raises(BundleError, match=rf"graphs\.{graph}\.{kind}\[{place}\] {told}.*export"):
        read_manifest(copied_bundle)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda ports: ports.pop(), r"outputs\[3\] is nothing, .*needs kept"),
        (lambda ports: ports.append(ports[0]), r"outputs\[4\] is dyn_k\.1 .*needs nothing"),
        (lambda ports: ports.reverse(), r"outputs\[0\] is kept .*needs dyn_k\.1"),
    ],
)
def test_missing_and_further_ports_are_named(copied_bundle, change, told):
    edit(copied_bundle, lambda data: change(data["graphs"]["evict"]["outputs"]))
    with pytest.raises(BundleError, match=told):
        read_manifest(copied_bundle)


def test_a_graph_that_does_not_fit_the_manifest_is_refused(copied_bundle):
    """A swap of graphs together with their hashes."""
    evict = copied_bundle / "graphs/evict.onnx"
    shutil.copy(evict, copied_bundle / "graphs/step.onnxruntime.onnx")
    edit(
        copied_bundle,
        lambda data: data["onnxruntime"]["step"].update(sha256=data["graphs"]["evict"]["sha256"]),
    )
    with pytest.raises(BundleError, match=r"step.*differ from the manifest.*export"):
        Session.open(copied_bundle, backend="onnxruntime")


def test_a_moved_bundle_still_opens(copied_bundle, tmp_path):
    moved = shutil.move(copied_bundle, tmp_path / "else where")
    Session.open(moved, backend="onnxruntime").close()
