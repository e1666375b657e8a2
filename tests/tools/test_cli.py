"""The command table of `fkv`, its flags, its help with nothing heavy installed, its exit codes."""

import importlib
import inspect
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from forcing_kv.runtime_trt.console import project_version
from forcing_kv.runtime_trt.errors import BundleError
from forcing_kv.tools import cli

FLAGS = Path(__file__).with_name("flags.json")
"""Every command's flags, as one types them -> default. A flag that goes or changes is changed here
too, and is told in CHANGELOG.md."""


def command_function(command):
    module, _, name = command.function.partition(":")
    return getattr(importlib.import_module(module), name)


def flags_of(app, command):
    """What `FLAGS` holds of a command."""
    _, apps, _ = app.parse_commands(command.name.split())
    with app.app_stack(apps):
        arguments = apps[-1].assemble_argument_collection()
        return {" ".join(a.names): default_of(a) for a in arguments if a.show and a.name != "*"}


def default_of(argument):
    if isinstance(argument.show_default, str):
        return argument.show_default
    default = argument.field_info.default
    if default in (argument.field_info.empty, None, ()):
        return "required" if argument.required else None
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


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
        monkeypatch.setattr(cli, "COMMANDS", (cli.Command("plugins go", f"{module.__name__}:go"),))
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


def test_every_command_says_what_it_does_and_is_short():
    for command in cli.COMMANDS:
        function = command_function(command)
        assert function.__doc__, command
        assert len(inspect.getsourcelines(function)[0]) <= 40, command
        assert len(inspect.signature(function).parameters) <= 8, command


def test_no_flag_goes_unseen():
    app = cli.build_app(cli.COMMANDS)
    assert {each.name: flags_of(app, each) for each in cli.COMMANDS} == json.loads(
        FLAGS.read_text()
    )


def test_every_flag_is_documented():
    app = cli.build_app(cli.COMMANDS)
    for command in cli.COMMANDS:
        _, apps, _ = app.parse_commands(command.name.split())
        with app.app_stack(apps):
            for argument in apps[-1].assemble_argument_collection(parse_docstring=True):
                assert argument.parameter.help or not argument.show, (command.name, argument.names)


def test_every_whole_number_is_read_by_us():
    """cyclopts would round 1.5; see `Int` of `export/request/flags.py`."""
    app = cli.build_app(cli.COMMANDS)
    for command in cli.COMMANDS:
        _, apps, _ = app.parse_commands(command.name.split())
        with app.app_stack(apps):
            arguments = apps[-1].assemble_argument_collection()
        numbers = [a for a in arguments if a.show and "int" in str(a.hint)]
        assert all(a.parameter.converter for a in numbers), (command.name, numbers)


def test_a_command_loads_no_other(run_blocked):
    done = run_blocked(
        """
import sys
from forcing_kv.tools.cli import main
try:
    main(["inspect", "--help"])
except SystemExit:
    print(*sorted(name for name in sys.modules if name.startswith("forcing_kv.")))
"""
    )
    assert "forcing_kv.tools.inspect_bundle" in done.stdout
    assert "forcing_kv.tools.run.command" not in done.stdout
    assert "forcing_kv.calibration" not in done.stdout


def test_help_is_plain_text_of_80_columns_where_there_is_no_terminal(run_fkv):
    shown = run_fkv("export", "-h").out
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) == 80
    assert shown.index("─ Options ") < shown.index("─ Model ") < shown.index("─ Cache policy ")
    words = " ".join(shown.replace("│", " ").split())
    assert "[choices: float32, float16, bfloat16] [default: float32]" in words


@pytest.mark.parametrize("group", [(), ("bench",)])
def test_a_group_without_a_command_shows_its_help(run_fkv, group):
    done = run_fkv(*group)
    assert done.code == 2
    assert "─ Commands ─" in done.out
    assert done.out == run_fkv(*group, "--help").out


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("exprt",), 'Unknown command "exprt". Did you mean "export"?'),
        (("inspect", "b", "--jsn"), "Unknown option: --jsn. Did you mean --json?"),
        (("inspect", "b", "--no-json"), "Unknown option: --no-json."),
        (("inspect",), "Error: BUNDLE is required"),
        (("export",), "Error: --out is required"),
        (("export", "--fp8"), "--fp8 needs a value; one that begins with a dash is given as"),
        (("build", "b", "--backen", "inductor"), "--backend is required, and there is no --backen"),
        (("inspect", "b", "c"), "unexpected arguments ['c']"),
        (("run", "b", "--out", "o.mp4", "--seed=-1"), "give a whole number from 0 to 2**64 - 1"),
        (
            ("run", "b", "--out", "o.mp4", "--scale", "x"),
            "--scale is 'x'; give a whole number",
        ),
        (("export", "--out", "b", "--warmup", "hot"), 'Choose from: "exact", "steady".'),
        (("plan", "--num-chunks", "9" * 5000), "99...; give a whole number"),
        (("plan", "--latent-size", "9"), "--latent-size is '9'; give latent rows x columns"),
    ],
)
def test_bad_use_is_one_message_with_a_remedy(run_fkv, words, message):
    done = run_fkv(*words)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert done.err.startswith("Error: ")
    assert done.err.count("\n") == 1
    assert "--help` lists what there is" in done.err


def test_the_last_of_a_flag_given_twice_counts(fkv):
    def command(*, number: int = 0, words: tuple[str, ...] = ()) -> None:
        print(number, *words)

    given = ("--number", "1", "--words=-a", "--words", "b", "--number", "-2")
    assert fkv(command, *given) == (0, "-2 -a b\n", "")


def test_a_command_that_is_interrupted_exits_with_130(fkv):
    assert fkv(raiser(KeyboardInterrupt()))[0] == 130
