"""Reading JSON into dataclasses: nothing converted, and one message that says where and what."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import pytest

from forcing_kv.runtime_trt.bundle import schema
from forcing_kv.runtime_trt.bundle.schema import load_as, parse_json, read_json
from forcing_kv.runtime_trt.errors import InputError


@dataclass(frozen=True)
class Inner:
    count: int
    sizes: tuple[int, ...] = ()
    ratio: float = 1.0
    on: bool = False

    def __post_init__(self):
        if self.count < 0:
            raise InputError(f"Inner.count is {self.count}; it must be positive")


@dataclass(frozen=True)
class Outer:
    name: str
    parts: Mapping[str, Inner]
    more: tuple[Inner, ...] = ()
    one: Inner | None = None


FIELDS = ["count", "sizes", "ratio", "on"]
GOOD = {
    "name": "x",
    "parts": {"a": {"count": 1, "sizes": [1, 2], "ratio": 2}},
    "more": [{"count": 2}],
    "one": {"count": 3},
}


def test_lists_become_tuples_and_nothing_else_changes():
    found = load_as(Outer, GOOD, "file")
    assert found == Outer("x", {"a": Inner(1, (1, 2), 2.0)}, (Inner(2),), Inner(3))
    assert json.loads(json.dumps(asdict(found)))["parts"]["a"]["sizes"] == [1, 2]
    assert load_as(tuple[Inner, ...], [{"count": 2}]) == (Inner(2),)
    assert load_as(Inner, {"count": 2, "other": 1}, unknown="ignore") == Inner(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": {"a": {"count": True}}}, "file: parts.a.count is True; it must be an integer"),
        ({"parts": {"a": {"count": 1.0}}}, "file: parts.a.count is 1.0; it must be an integer"),
        ({"parts": {"a": {"count": "1"}}}, "file: parts.a.count is '1'; it must be an integer"),
        ({"parts": {"a": {"count": None}}}, "file: parts.a.count is None; it must be an integer"),
        ({"more": [{"count": 1}, {"count": 1, "on": 1}]},
         "file: more.1.on is 1; it must be true or false"),
        ({"one": {"count": 1, "ratio": "2"}}, "file: one.ratio is '2'; it must be a number"),
        ({"one": {"count": 1, "ratio": True}}, "file: one.ratio is True; it must be a number"),
        ({"one": {"count": 1, "sizes": 7}}, "file: one.sizes is 7; it must be a list"),
        ({"one": {"count": 1, "sizes": [1, "b"]}},
         "file: one.sizes.1 is 'b'; it must be an integer"),
        ({"one": []}, "file: one is []; it must be an object"),
        ({"parts": []}, "file: parts is []; it must be an object"),
        ({"name": 5}, "file: name is 5; it must be a text"),
        ({"one": {"count": -1}}, "file: one: Inner.count is -1; it must be positive"),
        ({"one": {}}, f"file: one: entry 'count' is missing; the fields are {FIELDS}"),
        ({"more": [{"count": 1, "z": 1, "y": 2}]},
         f"file: more.0: unknown keys ['y', 'z']; allowed are {FIELDS}"),
        ({"extra": 1},
         "file: unknown keys ['extra']; allowed are ['name', 'parts', 'more', 'one']"),
        ({"name": ["y" * 100]}, "file: name is ['" + "y" * 58 + "...; it must be a text"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(InputError) as caught:
        load_as(Outer, GOOD | change, "file")
    assert str(caught.value) == message


def test_content_of_another_kind():
    for content in (7, None, "x", [1]):
        with pytest.raises(InputError, match=r"^file: the content is .*; it must be an object$"):
            load_as(Outer, content, "file")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "key 'a' stands twice"),
        ('{"a": [{"b": NaN}]}', "NaN is no finite number"),
        ("[-Infinity]", "-Infinity is no finite number"),
        ("[1e999]", "1e999 is no finite number"),
        ("[" * 10**5, "nested too deep"),
        ('{"a":' * 10**5, "nested too deep"),
        (f"[{2**63}]", "9223372036854775808... is beyond 64 bits"),
        (f"[-{'9' * 10**5}]", "is beyond 64 bits"),
        (b"\xff\xfe\x00{}", "not in UTF-8: byte 0 does not decode"),
        ("[1]".encode("utf-16"), "not in UTF-8"),
        ("[1]".encode("utf-32-le"), "Expecting value"),
        (r'["a\ud800b"]', r"'\\ud800' is half of a surrogate pair"),
        (r'{"\udfff": 1}', r"'\\udfff' is half of a surrogate pair"),
        ("", "Expecting value"),
    ],
)
def test_json_that_readers_disagree_about_is_refused(tmp_path, content, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(content)
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=rf"x\.json: not readable as a JSON toy \(.*{reason}"):
        read_json(path, "toy", "make one")


def test_the_largest_integers_and_deep_content():
    assert parse_json(f"[{2**63 - 1}, {-(2**63)}]") == [2**63 - 1, -(2**63)]
    deepest = schema.MAX_DEPTH - 1
    assert parse_json('{"name": ' + "[" * deepest + "]" * deepest + "}")
    deepest += 1
    with pytest.raises(ValueError, match="nested too deep; at most 64 levels are read"):
        parse_json('{"name": ' + "[" * deepest + "]" * deepest + "}")


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"none\.json: no such toy; make one"):
        read_json(tmp_path / "none.json", "toy", "make one")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\); make one"):
        read_json(tmp_path, "toy", "make one")
    path = tmp_path / "long.json"
    path.write_text("[1, 2, 3]")
    monkeypatch.setattr(schema, "MAX_NBYTES", 8)
    with pytest.raises(InputError, match=r"long\.json: longer than 0 MB, so no toy; make one"):
        read_json(path, "toy", "make one")


def test_nobody_pays_for_pydantic_before_something_is_read():
    code = "import sys, forcing_kv.runtime_trt, forcing_kv.tools.cli"
    code += "\nassert 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
