"""The command table of `fkv`, its flags, its help with nothing heavy installed, its exit codes."""

import errno
import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
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
        (
            OSError(errno.EFBIG, "File too large", "b/weights.bin"),
            (
                "Error: b/weights.bin: File too large; choose another file system, or raise "
                "`ulimit -f`\n"
            ),
        ),
        (
            MemoryError("9 GiB are too many"),
            (
                "Error: not enough memory (9 GiB are too many); close other programs, or use a "
                "machine with more memory\n"
            ),
        ),
    ],
    ids=["ForcingKvError", "ValueError", "OSError", "a full disk", "a large file", "MemoryError"],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(fkv, error, message):
    assert fkv(raiser(error)) == (2, "", message)


SYSTEM_ERRORS = (
    "EFBIG", "ENOSPC", "EDQUOT", "EROFS", "EACCES", "EMFILE", "ENFILE", "ENAMETOOLONG", "ELOOP",
    "EIO", "EISDIR", "ENOTDIR", "EPERM", "ETXTBSY", "ENOMEM", "EBUSY", "ESTALE",
)  # fmt: skip


def test_errors_of_the_system_are_no_defects_of_ours(fkv):
    for name in SYSTEM_ERRORS:
        number = getattr(errno, name)
        code, _, message = fkv(raiser(OSError(number, os.strerror(number))))
        assert (code, message.count("\n")) == (2, 1), name
        assert message.startswith(f"Error: {os.strerror(number)}; "), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unwinds_what_runs_and_further_ones_do_not_disturb(fkv, number):
    unwound = []

    def command() -> None:
        try:
            signal.raise_signal(number)
            unwound.append("too far")
        finally:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            unwound.append("removed")

    asked = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    earlier = {each: signal.signal(each, signal.SIG_DFL) for each in asked}
    try:
        assert fkv(command) == (128 + number, "", "")
        assert [signal.getsignal(each) for each in asked] == [signal.SIG_DFL] * 3
    finally:
        for each, handler in earlier.items():
            signal.signal(each, handler)
    assert unwound == ["removed"]


def test_what_a_library_makes_of_a_signal_is_not_told_as_an_error(fkv):
    """An import that is interrupted says that its package is broken."""

    def command() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            raise ImportError("reinstall it") from error

    assert fkv(command) == (143, "", "")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_a_finaliser_swallows_is_told_again(fkv):
    class Swallows:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    reached = []

    def command() -> None:
        Swallows()
        reached.append("further")
        try:
            time.sleep(20)
        finally:
            time.sleep(0.5)  # It is told again meanwhile.
            reached.append("removed")

    assert fkv(command)[0] == 143
    assert reached == ["further", "removed"]


def test_a_signal_that_is_ignored_stays_so(fkv):
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert fkv(lambda: signal.raise_signal(signal.SIGHUP))[0] == 0
    finally:
        signal.signal(signal.SIGHUP, earlier)


def shell(command):
    script = Path(sys.executable).with_name("fkv")
    return subprocess.run(
        ["bash", "-c", command, "bash", script], capture_output=True, text=True, check=False
    )


def test_output_that_nobody_reads_ends_a_command_quietly():
    """As other tools of Unix end, whoever has printed."""
    done = shell('"$1" --help | true; "$1" plan --json | true; echo "${PIPESTATUS[0]}"')
    assert done.stdout == "141\n"
    assert "Broken pipe" not in done.stderr
    assert "Error" not in done.stderr


def test_output_that_cannot_be_written_is_said():
    done = shell('"$1" --version >&-; echo "$?"; "$1" --help >/dev/full; echo "$?"')
    assert done.stdout == "2\n2\n"
    assert done.stderr.splitlines() == [
        "Error: standard output is closed, and this command prints there; open it",
        "Error: No space left on device; free some, or choose another disk",
    ]


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
