"""The record of built engines: its schema, what it runs on, and the command that mends it."""

import json
from pathlib import Path

import pytest

from forcing_kv.runtime_trt.bundle.engines import EngineRecord
from forcing_kv.runtime_trt.bundle.schema import load_as
from forcing_kv.runtime_trt.errors import BackendUnavailableError, BundleError, InputError

BUNDLE = Path("bundle")
AB, EF = 32 * "ab", 32 * "ef"
PORT = {"name": "x", "shape": [1, 2], "dtype": "float32"}


def part(folder, **more):
    graph = {"file": f"{folder}/step.plan", "sha256": AB, "inputs": [PORT], "outputs": []}
    detail = {
        "inputs_sha256": "cd", "nbytes": 3, "weight_nbytes": 2, "scratch_nbytes": None,
        "num_layers": 4, "num_attention": 2, "num_fused_attention": 1,
        "num_fp8_products": 0, "build_seconds": 0.5,
    }  # fmt: skip
    return {
        "folder": folder, **more, "build_seconds": 1.5, "files": {f"{folder}/step.plan": AB},
        "graphs": {"step": graph}, "details": {"step": detail},
    }  # fmt: skip


def content(sm="89", backend="tensorrt", options=None, **more):
    """A record as TensorRT builds write it, keys in their order."""
    first = part("engines/a")
    return {
        "backend": backend, "target": f"sm{sm}", "folder": first.pop("folder"),
        "environment": {"tensorrt": "11.4", "sm": sm}, "options": options or {}, **first,
        "decoders": {"vae": part("engines/a/vae", decoder_sha256=EF)}, **more,
    }  # fmt: skip


def record(*arguments, **options):
    return load_as(EngineRecord, content(*arguments, **options), "engines.0")


def test_a_record_is_written_as_it_was_read():
    data = content()
    assert json.dumps(record().to_json()) == json.dumps(data)
    data["details"]["step"]["refitted"] = True
    assert load_as(EngineRecord, data).to_json()["details"]["step"]["refitted"] is True
    plain = {key: data[key] for key in ("backend", "folder", "options", "build_seconds", "files")}
    inductor = {**plain, "backend": "inductor", "environment": {"device": "cpu"}, "graphs": {}}
    written = load_as(EngineRecord, inductor).to_json()
    assert written == {**inductor, "decoders": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 1}, r"engines\.0: unknown keys \['speed'\]; allowed are .*'environment'"),
        ({"files": {"a": 1}}, r"engines\.0: files\.a is 1; it must be a text"),
        ({"environment": {"tensorrt": "11"}}, r"environment\.sm is ''; it must say what"),
        ({"environment": {"sm": "x9"}}, r"environment\.sm is 'x9'; it must say what"),
        ({"environment": {"sm": 89}}, r"environment\.sm is 89; it must be a text"),
        ({"backend": "inductor"}, r"environment\.device is ''; it must say what"),
        ({"build_seconds": "1"}, r"build_seconds is '1'; it must be a number"),
        ({"details": {"step": {"layers": 3}}}, r"details\.step: unknown keys \['layers'\]"),
        ({"decoders": {"vae": part("a")}}, r"decoders\.vae: entry 'decoder_sha256' is missing"),
        ({"graphs": {"step": {**PORT}}}, r"graphs\.step: entry 'file' is missing"),
    ],
)
def test_what_is_no_record_is_named(change, message):
    with pytest.raises(InputError, match=message):
        record(**change)


@pytest.mark.parametrize(
    ("built", "here", "runs"),
    [
        (89, 89, True), (80, 89, True), (89, 80, True), (80, 80, True), (90, 120, True),
        (79, 80, False), (80, 79, False), (75, 89, False), (89, 75, False), (75, 75, True),
    ],
)  # fmt: skip
def test_hardware_compatible_engines_run_from_ampere_on(built, here, runs):
    assert record(str(built), options={"hardware_compatible": True}).runs_on(here) is runs
    assert record(str(built)).runs_on(here) is (built == here)


def test_a_decoders_engines_are_a_record_of_their_own():
    whole = record(options={"refit": True})
    alone = whole.decoder(BUNDLE, "vae", EF)
    assert (alone.folder, alone.decoders) == ("engines/a/vae", {})
    assert alone.files == {"engines/a/vae/step.plan": AB}
    assert alone.environment == whole.environment
    command = r"`fkv build bundle --backend tensorrt --refit`$"
    assert f"{alone.rebuild_command(BUNDLE)}$" == command
    with pytest.raises(BundleError, match=rf"compiled from another one .*{command}"):
        whole.decoder(BUNDLE, "vae", "00")
    with pytest.raises(BackendUnavailableError, match=rf"holds no tae decoder; .*{command}"):
        whole.decoder(BUNDLE, "tae", EF)


def test_the_command_names_target_or_device():
    rtx = record("86", "tensorrt-rtx", {"backend": "tensorrt-rtx", "target": "sm86"})
    assert rtx.rebuild_command(BUNDLE) == "`fkv build bundle --backend tensorrt-rtx --target sm86`"
    inductor = record(backend="inductor", environment={"device": "cuda"}, options={"fusion": {}})
    assert inductor.rebuild_command(BUNDLE) == "`fkv build bundle --backend inductor --device cuda`"
