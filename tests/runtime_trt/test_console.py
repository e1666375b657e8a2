"""Talk goes to stderr, one JSON object goes to stdout, and bars stay away from pipes."""

import json
from pathlib import Path

import numpy as np
import pytest

from forcing_kv.runtime_trt.console import print_json, progress, talk, track


def test_json_object_on_stdout(capsys):
    record = {"path": Path("a/b"), "scalar": np.float32(0.5), "list": np.arange(2), "none": None}
    print_json(record)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "path": "a/b",
        "scalar": 0.5,
        "list": [0, 1],
        "none": None,
    }
    assert captured.err == ""


@pytest.mark.parametrize("record", [float("nan"), np.float32("inf"), object()])
def test_json_refuses_what_json_has_not(record):
    with pytest.raises((TypeError, ValueError)):
        print_json({"value": record})


def test_talk_prints_brackets_and_long_lines_as_they_are(capsys):
    message = "pip install 'forcing-kv[export]' " + "x" * 200
    talk(message, style="red")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"{message}\n"


def test_progress_is_silent_off_a_terminal(capsys):
    with progress("working [hard]", total=2) as task:
        task.advance()
        task.describe("still [working]")
    assert list(track(iter("abc"), "reading")) == ["a", "b", "c"]
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
