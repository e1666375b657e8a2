"""Talk goes to stderr, one JSON object goes to stdout, and bars stay away from pipes."""

import json
from pathlib import Path

import numpy as np
import pytest

from forcing_kv.runtime_trt.console import console, print_json, progress, screen, shown, talk, track


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


ACTING = "\x1b]0;title\x07\x1b[2J\r\x9b31m\u202eabc\u2028\udcff :bomb: [red]x[/blue]\ttab\nline"
SPELT = (
    r"\x1b]0;title\x07\x1b[2J\r\x9b31m\u202eabc\u2028\udcff :bomb: [red]x[/blue]" + "\ttab\nline"
)


def test_text_from_outside_does_not_act_on_the_terminal(capsys):
    assert shown(ACTING) == SPELT
    assert shown("ü – 日本 🎬 [x]") == "ü – 日本 🎬 [x]"
    talk(ACTING, style="bold red")
    assert capsys.readouterr().err.expandtabs() == f"{SPELT}\n".expandtabs()


def test_tables_print_cells_and_titles_as_they_are(capsys):
    from rich.table import Table

    table = Table("[b]head[/b]\x1b", title="[nothing]\x1b[1m[/b]")
    table.add_row("[/closed]\x07 :smile:")
    for out, read in ((screen(), "out"), (console(), "err")):
        out.print(table)
        told = getattr(capsys.readouterr(), read)
        for text in (r"[b]head[/b]\x1b", r"[nothing]\x1b[1m[/b]", r"[/closed]\x07 :smile:"):
            assert text in told.replace("\n", "")


def test_a_bar_shows_its_text_as_it_is(monkeypatch):
    import io

    from forcing_kv.runtime_trt import console as module

    terminal = module._plain_console(stderr=True)
    terminal.file, terminal._force_terminal = io.StringIO(), True
    monkeypatch.setattr(module, "console", lambda: terminal)
    with progress("[hard]\x1b]0;x\x07", total=1) as task:
        task.describe("[/still]\x1b]0;y\x07")
        task.advance()
    told = terminal.file.getvalue()
    assert "\x1b]0;" not in told
    assert r"[/still]\x1b]0;y\x07" in told


def test_progress_is_silent_off_a_terminal(capsys):
    with progress("working [hard]", total=2) as task:
        task.advance()
        task.describe("still [working]")
    assert list(track(iter("abc"), "reading")) == ["a", "b", "c"]
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
