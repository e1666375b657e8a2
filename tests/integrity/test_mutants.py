"""Whoever alters a bundle gets one clear error, or exactly the output of the bundle that it was.

Mutants are drawn from a seed. The run of every day draws few; `pytest -m slow -s` on this file
draws many and prints how many of each kind were tried, refused and accepted (docs/reliability.md).
"""

import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from forcing_kv.runtime_trt.bundle.manifest import MANIFEST_FILE, Bundle, digest_of, read_manifest
from forcing_kv.runtime_trt.decoder import VideoDecoder
from forcing_kv.runtime_trt.errors import ForcingKvError
from forcing_kv.runtime_trt.inductor import open as inductor
from forcing_kv.runtime_trt.session import Session
from forcing_kv.tools.inspect_bundle import inspect

MAX_SECONDS = 10
"""For one bundle, on a machine that does other things too; a whole one takes 0.1 s."""
MAX_KILOBYTES = 300 << 10
"""More memory at most while mutants are tried."""
FEW, MANY = 30, 2_000
"""Mutants of a kind of `KINDS`."""

VALUES = st.sampled_from(
    [
        None, True, False, -1, 0, 1, 2, 7, 10**8, 2**62, -(2**63), 0.5, -0.0, 1e-300, 1e300, "",
        "abc", "float32", "float", "x" * 5000, "\x1b[31m[red]", "../up", "/etc/passwd", "a/../b",
        "sha256:" + "0" * 64, "0" * 64, [], [1], [[1]], [None], [{}], {}, {"a": 1},
        list(range(999)), {"file": "/etc/passwd"},
    ]
)  # fmt: skip
PATHS = st.sampled_from(
    [
        "/etc/hostname", "../bundle/graphs/step.onnx", "graphs/../graphs/step.onnx", "", ".",
        "./graphs/step.onnx", "graphs//step.onnx", "graphs/", "graphs\\step.onnx", "a\0b",
        "graphs/step.onnx\n", "\x1b]0;title\x07", "graphs", "manifest.json", "C:/x", "~/x",
        "/proc/self/environ", "/dev/zero", "/dev/stdin", "x" * 600, "graphs/" + "a/" * 200 + "b",
        "graphs/prompt.onnx", "graphs/weights.bin", "graphs/none.onnx", "none/constants.json",
    ]
)  # fmt: skip


def use(bundle: Path) -> str:
    """Everything that a bundle is used for; names its output."""
    with Bundle(bundle) as opened:
        opened.check_exported()
        opened.check(opened.recorded)
        manifest = opened.manifest
        if any(record.backend == "inductor" for record in manifest.engines):
            inductor.checked_inductor_record(opened)
    said = hashlib.sha256()
    model = manifest.config.model
    prompt = np.linspace(-1, 1, model.text_len * model.text_dim, dtype=np.float32)
    with Session.open(bundle, num_threads=1) as session:
        session.set_prompt(prompt.reshape(model.text_len, model.text_dim))
        for chunk in session.stream(3, seed=1):
            said.update(chunk.latents.tobytes())
    for kind in manifest.decoders:
        with VideoDecoder.open(bundle, manifest, kind, num_threads=1) as decoder:
            said.update(decoder.decode(chunk.latents).tobytes())
    return said.hexdigest()


@pytest.fixture(scope="module")
def original(whole_bundle):
    """The bundle, its manifest as text, and its output."""
    with pytest.MonkeyPatch.context() as patch:
        # Its package is for another machine; all that comes after that check is to be checked too.
        patch.setattr(inductor, "check_environment", lambda *_: None)
        patch.setattr("forcing_kv.runtime_trt.open.BACKENDS", ("onnxruntime",))
        patch.setattr(inductor, "InductorPackage", None)
        yield whole_bundle, (whole_bundle / MANIFEST_FILE).read_text(), use(whole_bundle)


def leaves(node, place=()):
    """Every entry of parsed JSON, by its place."""
    entries = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in entries:
        yield (*place, key)
        if isinstance(value, (dict, list)):
            yield from leaves(value, (*place, key))


def holder_of(data, place):
    for key in place[:-1]:
        data = data[key]
    return data


def seal(data):
    return json.dumps({**data, "digest": digest_of(data)})


def drawn_entry(draw, text):
    """A manifest with one entry replaced, removed, added, moved or made a neighbour's."""
    data = json.loads(text)
    place = draw(st.sampled_from(list(leaves(data))), "place")
    holder, key = holder_of(data, place), place[-1]
    how = draw(st.sampled_from(["replace", "nudge", "remove", "add", "borrow"]), "how")
    if how == "replace":
        holder[key] = draw(VALUES, "value")
    elif how == "nudge":
        holder[key] = nudged(holder[key])
    elif how == "remove":
        del holder[key]
    elif how == "borrow":
        others = list(leaves(json.loads(text)))
        other = draw(st.sampled_from(others), "other")
        holder[key] = holder_of(json.loads(text), other)[other[-1]]
    elif isinstance(holder, dict):
        holder[draw(st.sampled_from(["a", "..", "\x1b[1m", "k" * 3000]), "key")] = draw(VALUES)
    else:
        holder.insert(0, draw(VALUES, "value"))
    return data


def nudged(value):
    """A value of the same type that is plausible."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1:] != "0" else "1")
    if value is None:
        return 1
    return type(value)(list(value.items())[:-1] if isinstance(value, dict) else value[:-1])


def edited(draw, folder, text):
    """One entry of the manifest, its digest left as it was."""
    (folder / MANIFEST_FILE).write_text(json.dumps(drawn_entry(draw, text)))


def resealed(draw, folder, text):
    """One entry or two of the manifest, by somebody who makes its digest right again."""
    data = drawn_entry(draw, text)
    if draw(st.integers(0, 3), "twice") == 0:
        data = drawn_entry(draw, json.dumps(data))
    (folder / MANIFEST_FILE).write_text(seal(data))


def redirected(draw, folder, text):
    """A path of the manifest to elsewhere, and the digest right again."""
    data = json.loads(text)
    named = {"file", "weights_file", "folder"}
    places = [place for place in leaves(data) if place[-1] in named]
    places += [place for place in leaves(data) if "/" in str(place[-1])]
    place, path = draw(st.sampled_from(places), "place"), draw(PATHS, "path")
    holder = holder_of(data, place)
    if place[-1] in named:
        holder[place[-1]] = path
    else:
        holder[path] = holder.pop(place[-1])
    (folder / MANIFEST_FILE).write_text(seal(data))


def scribbled(draw, folder, text):
    """The manifest as text: cut, repeated, in other encodings, or with a key twice."""
    content = text.encode()
    at = draw(st.integers(0, len(content) - 1), "at")
    names = sorted(set(json.loads(text)))
    name = draw(st.sampled_from(names), "name")
    changes = {
        "flip": content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :],
        "cut": content[:at],
        "append": content + content[at:],
        "twice": content.replace(b"{", b'{"' + name.encode() + b'": 1,', 1),
        "utf-16": text.encode("utf-16"),
        "deep": content.replace(b'"name"', b'"a":' + 500 * b"[" + 500 * b"]" + b',"name"', 1),
        "number": content.replace(b"1", b"9" * 5000, 1),
        "nan": content.replace(b"1", b"NaN", 1),
        "surrogate": content.replace(b'"tiny"', rb'"\ud800"', 1),
        "nothing": b"",
        "bytes": bytes(range(256)),
    }
    (folder / MANIFEST_FILE).write_bytes(changes[draw(st.sampled_from(sorted(changes)), "how")])


def damaged(draw, folder, text):
    """A file: flipped, cut, longer, another's, a link, a pipe, a folder, or gone."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = draw(st.sampled_from(files), "file")
    content = path.read_bytes()
    at = draw(st.integers(0, len(content) - 1), "at")
    how = draw(st.sampled_from(["flip", "cut", "extend", "swap", "link", "pipe", "folder", "gone"]))
    if how == "flip":
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        return
    if how in ("cut", "extend"):
        path.write_bytes(content[:at] if how == "cut" else content + content[at:])
        return
    path.unlink()
    if how == "swap":
        shutil.copy(draw(st.sampled_from([each for each in files if each != path])), path)
    elif how == "link":
        outside = folder.parent / "outside"
        outside.write_bytes(content)
        path.symlink_to(draw(st.sampled_from([outside, "/dev/zero", path, files[0], "/"]), "to"))
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()


KINDS = (edited, resealed, redirected, scribbled, damaged)


def judge(bundle, output):
    """`refused`, `same` or `other` output; anything else fails."""
    before, begin = sorted(bundle.parent.rglob("*")), time.monotonic()
    message, found = str(bundle), "refused"
    try:
        found = "same" if use(bundle) == output else "other"
    except ForcingKvError as error:
        message = str(error)
    assert str(bundle) in message
    assert len(message) < 2000
    with (
        contextlib.redirect_stdout(io.StringIO()) as screen,
        contextlib.suppress(ForcingKvError, OSError),
    ):
        inspect(bundle, check=False)  # The checks have been made; this shows what there is.
    assert "\x1b" not in screen.getvalue()
    assert time.monotonic() - begin < MAX_SECONDS
    assert sorted(bundle.parent.rglob("*")) == before
    return found


def tried(original, folder, kind, draw):
    """Make a mutant and judge it."""
    source, text, output = original
    shutil.rmtree(folder, ignore_errors=True)
    bundle = Path(shutil.copytree(source, folder / "bundle"))
    kind(draw, bundle, text)
    found = judge(bundle, output)
    if kind in (edited, scribbled):
        untouched = found == "refused" or canonical(bundle) == canonical(source)
        assert untouched, "an edit was accepted though nobody made the digest right"
    if kind is damaged:
        assert found in ("refused", "same")
    return found


def canonical(bundle):
    return digest_of(json.loads((bundle / MANIFEST_FILE).read_text(encoding="utf-8-sig")))


def run(original, folder, kind, count):
    """Try mutants; how many ended how."""
    verdicts = Counter()

    @seed(20260801)
    @settings(
        max_examples=count, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(data=st.data())
    def try_one(data):
        verdicts[tried(original, folder, kind, data.draw)] += 1

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try_one()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MAX_KILOBYTES
    return verdicts


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_mutants(original, tmp_path, kind):
    verdicts = run(original, tmp_path / "mutant", kind, FEW)
    assert verdicts["refused"] > FEW // 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_many_mutants(original, tmp_path, kind):
    begin = time.monotonic()
    verdicts = run(original, tmp_path / "mutant", kind, MANY)
    print(
        f"\n{kind.__name__}: {sum(verdicts.values())} tried, {verdicts['refused']} refused, "
        f"{verdicts['same']} of the same output, {verdicts['other']} of another, "
        f"{time.monotonic() - begin:.0f} s"
    )


def test_the_whole_bundle_runs(original):
    bundle, _, output = original
    assert use(bundle) == output
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        inspect(bundle)
    assert f"digest: {read_manifest(bundle).digest}\n" in screen.getvalue()
