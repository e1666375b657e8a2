"""The command table of `fkv`, its help with nothing heavy installed, and its exit codes."""

import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

from forcing_kv.runtime_trt.console import project_version
from forcing_kv.runtime_trt.errors import BundleError
from forcing_kv.tools import cli


def raiser(error):
    def command() -> None:
        raise error

    return command


@pytest.fixture
def fkv(monkeypatch, capsys):
    """Runs `fkv go` with the given function as its command; returns exit code, stdout, stderr."""

    def run(function, *arguments):
        module = types.ModuleType("commands_of_this_test")
        module.go = function
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(cli, "COMMANDS", (cli.Command("plugins go", module.__name__, "go"),))
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["plugins", "go", *arguments])
        captured = capsys.readouterr()
        return exit_info.value.code, captured.out, captured.err

    monkeypatch.delenv("FKV_DEBUG", raising=False)
    return run


def test_every_help_works_with_heavy_packages_blocked(run_blocked):
    names = [command.name.split() for command in cli.COMMANDS]
    lines = [[], *names, *([name[0]] for name in names if len(name) == 2)]
    done = run_blocked(
        f"""
from forcing_kv.tools.cli import main
for words in {lines!r}:
    try:
        main([*words, "--help"])
    except SystemExit as stop:
        assert not stop.code, (words, stop.code)
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: fkv") == len(lines)


def test_every_command_says_what_it_does():
    for command in cli.COMMANDS:
        function = getattr(importlib.import_module(command.module), command.function)
        assert function.__doc__, command


def test_console_script_prints_the_version(tmp_path):
    script = Path(sys.executable).with_name("fkv")
    done = subprocess.run(
        [script, "--version"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == f"fkv {project_version()}\n"
    assert done.returncode == 0


def test_success_exits_with_0(fkv):
    def command() -> None:
        print("done")

    assert fkv(command) == (0, "done\n", "")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (BundleError("no manifest.json in [b]"), "Error: no manifest.json in [b]\n"),
        (ValueError("7 is odd"), "Error: 7 is odd (FKV_DEBUG=1 shows where)\n"),
        (FileNotFoundError(2, "No such file", "x.pt"), "Error: x.pt: No such file\n"),
        (
            OSError(28, "No space left on device"),
            "Error: No space left on device; free some, or choose another disk\n",
        ),
    ],
    ids=["ForcingKvError", "ValueError", "OSError", "a full disk"],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(fkv, error, message):
    assert fkv(raiser(error)) == (2, "", message)


def test_a_missing_package_names_its_extra(fkv, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)

    def command() -> None:
        import tensorrt_rtx  # noqa: F401

    code, _, message = fkv(command)
    assert code == 2
    assert "pip install 'forcing-kv[rtx]'" in message


def test_a_defect_shows_its_traceback_and_never_looks_like_a_failed_check(fkv):
    code, _, message = fkv(raiser(AssertionError("broken")))
    assert code == 70
    assert "Traceback" in message


def test_debug_shows_the_traceback_of_a_mistake(fkv, monkeypatch):
    monkeypatch.setenv("FKV_DEBUG", "1")
    code, _, message = fkv(raiser(BundleError("no manifest")))
    assert code == 2
    assert "Traceback" in message


def test_unknown_option_is_bad_use(fkv):
    assert fkv(raiser(AssertionError), "--no-such-option")[0] == 2
