"""The digest of a bundle: what changes it, where it is told, and how it is pinned."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import fkv
from manifests import edit

from forcing_kv.export.bundle.write import write_manifest
from forcing_kv.runtime_trt.bundle.manifest import MANIFEST_FILE, digest_of, read_manifest
from forcing_kv.runtime_trt.decoder import VideoDecoder
from forcing_kv.runtime_trt.errors import BundleError, InputError
from forcing_kv.runtime_trt.open import open_backend
from forcing_kv.runtime_trt.session import Session

EDITS = {
    "schedule": lambda data: data["config"]["schedule"].update(steps=[900.0, 400.0]),
    "warm-up": lambda data: data["config"]["policy"].update(last_warmup_chunk=2),
    "sink": lambda data: data["config"]["policy"].update(global_sink=False),
    "trimmed": lambda data: data["decoders"]["tae"].update(num_trimmed_frames=1),
    "partition": lambda data: data["config"]["partition"].update(static_heads=[[1], [1]]),
    "epsilon": lambda data: data["config"]["model"].update(eps=1e-5),
    "name": lambda data: data.update(name="another"),
    "provenance": lambda data: data["provenance"].update(checkpoint_sha256="0" * 64),
}  # fmt: skip


@pytest.fixture
def bundle(whole_bundle, tmp_path):
    return Path(shutil.copytree(whole_bundle, tmp_path / "bundle"))


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_an_edit_by_hand_is_refused_without_a_pin(bundle, change):
    edit(bundle, change, seal=False)
    with pytest.raises(BundleError, match=r"manifest\.json: altered since .*sha256:.*export"):
        Session.open(bundle)


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_an_edit_with_a_new_digest_is_refused_by_a_pin(bundle, change):
    pin = read_manifest(bundle).digest
    Session.open(bundle, "onnxruntime", digest=pin, num_threads=1).close()
    edit(bundle, change)
    now = read_manifest(bundle)
    assert now.digest != pin
    message = rf"manifest\.json: is {now.digest}, but {pin} is asked for"
    with pytest.raises(BundleError, match=message):
        Session.open(bundle, digest=pin)
    with pytest.raises(BundleError, match=message):
        open_backend(bundle, digest=pin)
    with pytest.raises(BundleError, match=message):
        VideoDecoder.open(bundle, now, "tae", digest=pin)


@pytest.mark.parametrize(
    "pin", ["", "0" * 64, "sha256:", "sha256:" + "0" * 63, "SHA256:" + "A" * 64]
)
def test_what_is_no_digest_is_told(bundle, pin):
    manifest = read_manifest(bundle)
    for attempt in (
        lambda: Session.open(bundle, digest=pin),
        lambda: VideoDecoder.open(bundle, manifest, "tae", digest=pin),
        lambda: fkv("inspect", bundle, f"--digest={pin}"),
        lambda: fkv("verify", bundle, f"--digest={pin}"),
        lambda: fkv("bench", "chunk", "--device", "cpu", "--bundle", bundle, f"--digest={pin}"),
        lambda: fkv("run", bundle, f"--digest={pin}", "--out", bundle.parent / "x.npz"),
    ):
        with pytest.raises(InputError, match=r"digest is .*; give sha256: and 64 hex"):
            attempt()


def test_the_digest_is_of_the_content_and_not_of_the_text(bundle):
    before = read_manifest(bundle).digest
    file = bundle / MANIFEST_FILE
    data = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(data.items())), indent=7))
    assert read_manifest(bundle).digest == before
    assert write_manifest(read_manifest(bundle), bundle).digest == before
    canonical = '{"a":"ü","b":[1,2.5]}'.encode()
    known = f"sha256:{hashlib.sha256(canonical).hexdigest()}"
    assert digest_of({"b": [1, 2.5], "a": "ü", "digest": "x"}) == known


def test_a_changed_file_changes_the_digest(bundle):
    """By way of its hash, which the manifest holds: of every file that is loaded."""
    recorded = set(read_manifest(bundle).recorded(bundle))
    there = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert there - recorded == {MANIFEST_FILE}


def test_commands_tell_the_digest(bundle, tmp_path):
    digest = read_manifest(bundle).digest
    assert f"digest: {digest}\n" in fkv("inspect", bundle).stdout
    assert json.loads(fkv("inspect", bundle, "--json").stdout)["digest"] == digest
    prompt = tmp_path / "prompt.npy"
    np.save(prompt, np.ones((3, 5), np.float32))
    out = tmp_path / "latents.npz"
    options = ("--prompt-embeds", prompt, "--decode", "none", "--num-chunks", "1", "--json")
    pinned = ("--digest", digest, "--backend", "onnxruntime")
    told = fkv("run", bundle, "--out", out, *options, *pinned)
    assert f"is {digest}" in told.stderr
    assert json.loads(told.stdout)["digest"] == digest


def at(*place, **values):
    """An edit of some entries of the object at a place."""

    def change(data):
        for key in place:
            data = data[key]
        data.update(values)

    return change


MODEL, POLICY, SCHEDULE = (("config", part) for part in ("model", "policy", "schedule"))
MANY_STEPS = [1000 - i / 9 for i in range(2000)]
STRICT = [
    (at(plugin_abi=2), "plugin_abi is 2, but this release has the operators of version 1"),
    (at(weights_nbytes=1), r"weights\.bin: \d+ bytes, but 1 are recorded"),
    (at(*MODEL, num_heads=10**8), "num_heads is 100000000; at most 1024 are"),
    (at(*MODEL, num_layers=10**8), "num_layers is 100000000; at most 1024 are"),
    (at("config", "partition", num_heads=10**8), "num_heads is 100000000; at most 1024 are"),
    (at("config", "partition", static_heads=[[]] * 2000), "num_layers is 2000; at most 1024 are"),
    (at(*POLICY, num_static_frames=2**62), "at most 1048576 are"),
    (at(*POLICY, num_static_frames=-1), "an integer >= 0"),
    (at("config", "chunk", num_frames=2**40), "at most 1048576 are"),
    (at(*SCHEDULE, steps=MANY_STEPS), r"\(2000\); give 1 to 1000 descending"),
    (at(*SCHEDULE, shift=1e-300), "it must be 0.001 to 1000"),
    (at(*MODEL, eps=-1.0), "eps is -1.0; it must be between"),
    (at(*MODEL, freq_dim=10), r"time_sinusoid \[1, 8\] .*\[1, 10\]"),
    (at(*MODEL, text_len=4), r"prompt_embeds \[3, 5\] .*\[4, 5\]"),
    (at(*MODEL, text_dim=4), r"prompt_embeds \[3, 5\] .*\[3, 4\]"),
    (at(provenance={"a": {"b": {"c": 1}}}), "is nested; allowed are texts"),
    (at(provenance={"\x1b": 1}), "is no name; allowed are letters"),
    (at(name="x" * 1001), "1001 characters; at most 1000"),
    (lambda data: data.update(engines=data["engines"] * 33), "engines are 66; at most 64"),
    (at("decoders", "tae", num_trimmed_frames=-1), "-1 is outside of 0 to 1000"),
    (at("engines", 1, environment={"sm": "8" * 50}), "environment.sm is '888"),
    (at("engines", 0, environment={"device": "meta"}), "environment.device is 'meta'"),
    (at("engines", 1, backend="other"), "engines.1.backend is 'other'"),
    (at("engines", 1, folder="../x"), "engines.1.folder: '../x' is no path"),
]


@pytest.mark.parametrize(("change", "message"), STRICT)
def test_entries_are_strict_and_bounded(bundle, change, message):
    edit(bundle, change)
    with pytest.raises(BundleError, match=message):
        fkv("inspect", bundle)


def test_a_long_manifest_is_not_read(bundle):
    with (bundle / MANIFEST_FILE).open("r+b") as file:
        file.truncate(1 << 40)  # It takes no room on the disk.
    with pytest.raises(BundleError, match=r"manifest\.json: longer than 8 MB"):
        read_manifest(bundle)


def test_the_command_in_a_message_is_safe_to_copy(bundle):
    """What a bundle says of itself is quoted where somebody may paste it into a shell."""

    def change(data):
        data["engines"][1]["options"] = {"tf32": "1; rm -rf ~"}
        data["engines"][1]["files"]["engines/tensorrt-sm89/step.plan"] = "0" * 64
        data["engines"][1]["graphs"]["step"]["sha256"] = "0" * 64

    edit(bundle, change)
    with pytest.raises(BundleError, match=r"--tf32 '1; rm -rf ~'`"):
        fkv("inspect", bundle)


def test_what_a_bundle_says_does_not_act_on_the_terminal(bundle):
    def change(data):
        data["name"] = "\x1b]0;owned\x07[bold]x[/bold][/nothing]"
        data["provenance"]["source"] = "[link=file:///etc]\x1b[2J\u202e:bomb:"

    edit(bundle, change)
    told = fkv("inspect", bundle).stdout
    assert "\x1b" not in told
    assert "\u202e" not in told
    assert r"\x1b]0;owned\x07[bold]x[/bold][/nothing]" in told
    assert r"\x1b[2J\u202e:bomb:" in told.replace("│\n│", "").replace("  ", "")


def test_a_digest_is_a_bundle_s(tmp_path):
    with pytest.raises(InputError, match="--digest is a bundle's; give the bundle"):
        fkv("verify", "--golden", tmp_path, f"--digest=sha256:{64 * '0'}")


def test_one_line_stays_one_line(bundle):
    """A line break in a name would forge lines of what is printed."""
    edit(bundle, lambda data: data.update(name="digits\ndigest: sha256:0"))
    with pytest.raises(BundleError, match=r"name: 'digits\\ndigest.* has several lines"):
        read_manifest(bundle)


@pytest.mark.parametrize("pin", [5, b"sha256:0", 1.5])
def test_a_pin_of_another_type_is_told(bundle, pin):
    with pytest.raises(InputError, match=r"digest is .*; give sha256: and 64"):
        Session.open(bundle, digest=pin)
