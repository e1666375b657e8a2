"""The console command `fkv`: the table of its commands, and what happens to an error.

Adding a command takes a function and a line in `COMMANDS`:

- The function stands in a *light* module, which is loaded when the command is called:
  `export/commands/export.py`, `calibration/commands/heads.py`, or a module of `tools/`. It imports
  torch, onnx, matplotlib and the like inside its body, so that `fkv X --help` works with none of
  them installed. Its docstring is the help text, its first line the summary.
- Its parameters are frozen dataclasses, one a subject, whose fields are the flags
  (`export/request/flags.py`); a flag that is the command's own may be a parameter, documented under
  `Args`.
- Long flags carry units (`--timeout-s`). `--json` prints one object on stdout (`print_json`);
  everything else goes to stderr (`talk`, `progress`, `track`). All four live in
  `runtime_trt/console.py`. `--dry-run` wherever something is built or written.
- Exit codes are `ExitCode`: 0 good, 1 a check failed (`return ExitCode.CHECK_FAILED`),
  2 bad use. A user's mistake is raised as a `ForcingKvError` (or a ValueError): the boundary below
  prints its message and exits with 2. A missing optional package is turned into the name of the
  extra to install, and an error of the system is told with its file and what to do. Anything else
  is a defect: traceback and exit code 70, never 1. With FKV_DEBUG=1 every error shows its
  traceback. A process that a signal ends, or whose output nobody reads, exits with 128 and the
  signal's number (`tools/ending.py`): 130, 143, 141.

The layout: `demo`, `calibrate heads`, `export`, `build`, `run`, `verify`, `bench`, `inspect`,
`plan`, `eval`, `plugins list`.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NamedTuple

from cyclopts import App, CycloptsError, MissingArgumentError, UnusedCliTokensError

from forcing_kv.export.request.flags import MANNERS, OPTIONS
from forcing_kv.runtime_trt.console import ExitCode, PlainFormatter, project_version, shown, talk
from forcing_kv.runtime_trt.errors import (
    EXTRA_OF_MODULE,
    REMEDIES,
    ForcingKvError,
    explained,
    missing_dependency,
)
from forcing_kv.tools.ending import (
    OUTPUT_CLOSED,
    discard_output,
    ended_by_signals,
    fill_closed_descriptors,
    nobody_reads,
)


class Command(NamedTuple):
    """One line of the command table."""

    name: str
    """As typed after `fkv`: one word, or a group and a word."""
    function: str
    """`module:function`, in a light module."""


COMMANDS: tuple[Command, ...] = (
    Command("demo", "forcing_kv.tools.demo.command:demo"),
    Command("encode-prompt", "forcing_kv.tools.run.encode_prompt:encode_prompt"),
    Command("export", "forcing_kv.export.commands.export:export"),
    Command("add-decoder", "forcing_kv.export.commands.add_decoder:add_decoder"),
    Command("build", "forcing_kv.export.commands.build:build"),
    Command("run", "forcing_kv.tools.run.command:run"),
    Command("verify", "forcing_kv.export.commands.verify:verify"),
    Command("inspect", "forcing_kv.tools.inspect_bundle:inspect"),
    Command("selftest", "forcing_kv.tools.selftest:selftest"),
    Command("eval", "forcing_kv.tools.digits.evaluate:evaluate_command"),
    Command("plan", "forcing_kv.tools.plan.command:plan"),
    Command("calibrate heads", "forcing_kv.calibration.commands.heads:calibrate_heads"),
    Command("calibrate fp8", "forcing_kv.calibration.commands.fp8:calibrate_fp8"),
    Command("calibrate policy", "forcing_kv.calibration.commands.policy:calibrate_policy"),
    Command("bench step", "forcing_kv.tools.bench.cli:bench_step"),
    Command("bench chunk", "forcing_kv.tools.bench.cli:bench_chunk"),
    Command("bench rollout", "forcing_kv.tools.bench.cli:bench_rollout"),
    Command("bench ops", "forcing_kv.tools.bench.ops:bench_ops"),
    Command("bench load", "forcing_kv.tools.bench.cli:bench_load"),
    Command("bench suite", "forcing_kv.tools.bench.cli:bench_suite"),
    Command("bench report", "forcing_kv.tools.bench.cli:bench_report"),
    Command("plugins list", "forcing_kv.tools.plugins:list_plugins"),
)
"""Every command of `fkv`, in the order in which `fkv --help` lists them."""

GROUPS = {
    "bench": "Measure speed, behind a check that the results are right.",
    "calibrate": "Measure a model on real rollouts.",
    "plugins": "Look at the custom operators.",
}
"""First word of the two-word commands → what the group is for."""


def build_app(commands: Sequence[Command]) -> App:
    """Returns the application of the given commands, of which none is loaded."""
    app = App(
        "fkv",
        help="Compiled deployment of autoregressive video diffusion with Forcing-KV.",
        help_flags=("--help", "-h"),
        help_format="markdown",
        version=lambda: f"fkv {project_version()}",
        version_flags="--version",
        default_parameter=MANNERS,
        group_parameters=OPTIONS,
        print_error=False,
        exit_on_error=False,
    )
    for place, (name, function) in enumerate(commands):
        *group, word = name.split()
        parent = app
        if group:
            if group[0] not in app:
                app.command(App(group[0], help=GROUPS[group[0]], sort_key=place))
            parent = app[group[0]]
        parent.command(function, name=word, sort_key=place)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `fkv` and exits: the entry point of the console script.

    Args:
        arguments: What follows `fkv`; by default the arguments of this process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    fill_closed_descriptors()
    if logging.lastResort is not None:  # What prints warnings where nobody has set up more.
        logging.lastResort.setFormatter(PlainFormatter())
    with ended_by_signals() as told:
        code = _call(arguments, told)
    sys.exit(code)


def _call(arguments: Sequence[str], told: Sequence[int]) -> int:
    """Run a command; returns the exit code of the process."""
    try:
        return _attempt(arguments, told)
    except BaseException as error:
        if not nobody_reads(error):
            raise
        discard_output()
        return OUTPUT_CLOSED


def _attempt(arguments: Sequence[str], told: Sequence[int]) -> int:
    """Run a command and tell what goes wrong; returns its exit code.

    Args:
        told: the signal that has arrived, if one has; what goes wrong after it comes of it.
    """
    try:
        try:
            _run(build_app(COMMANDS), arguments)
        finally:
            sys.stdout.flush()  # Python's own flush would fail after the last word.
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (Exception, SystemExit) as error:
        if told:
            return 128 + told[0]
        if nobody_reads(error):
            raise
        if isinstance(error, SystemExit):
            return int(error.code or 0)
        try:
            return _report(error)
        except OSError as second:  # Such as a full disk under stderr.
            if nobody_reads(second):
                raise
            return ExitCode.BAD_USE
    return ExitCode.GOOD


def _run(app: App, arguments: Sequence[str]) -> None:
    if _load_what_is_listed(app, arguments):
        app.help_print(arguments)
        sys.exit(ExitCode.BAD_USE)
    app(arguments)


def _load_what_is_listed(app: App, arguments: Sequence[str]) -> bool:
    """Load every command of a group that is called without one: its help names their summaries.

    Returns:
        Whether a command is missing, and nothing else is wrong or asked for.
    """
    words, apps, rest = app.parse_commands(arguments)
    group = apps[sum(not word.startswith("-") for word in words)]
    if group.default_command is None:
        group.resolved_commands()
    return apps[-1].default_command is None and not rest


def _report(error: Exception) -> ExitCode:
    message = _user_message(error)
    if message is None or os.environ.get("FKV_DEBUG", "") not in ("", "0"):
        sys.stderr.write(shown("".join(traceback.format_exception(error))))
    if message is None:
        talk("This is a defect in forcing_kv, not in its use.", style="bold red")
        return ExitCode.INTERNAL
    talk(f"Error: {message}", style="bold red")
    return ExitCode.BAD_USE


def _user_message(error: Exception) -> str | None:
    """Returns what to tell a user who made a mistake, None where the mistake is not theirs."""
    if isinstance(error, CycloptsError):
        words = " ".join(("fkv", *(error.command_chain or ())))
        return f"{_bad_use(error)} (`{words} --help` lists what there is)"
    if isinstance(error, ForcingKvError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        distribution = error.name.partition(".")[0]
        if distribution in EXTRA_OF_MODULE and importlib.util.find_spec(distribution) is None:
            return str(missing_dependency(distribution))
        return None
    if isinstance(error, ValueError):
        return f"{error} (FKV_DEBUG=1 shows where)"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {explained(error)}"
    if isinstance(error, OSError) and error.errno in REMEDIES:
        return explained(error)  # A write names no file.
    if isinstance(error, MemoryError):
        said = f" ({error})" if str(error) else ""
        return f"not enough memory{said}; {REMEDIES[errno.ENOMEM]}"
    return None


def _bad_use(error: CycloptsError) -> str:
    """Returns what is wrong with the words of a call."""
    if isinstance(error, UnusedCliTokensError):
        return f"unexpected arguments {list(error.unused_tokens or ())}"
    if not isinstance(error, MissingArgumentError) or error.argument is None:
        return str(error)
    tokens = error.argument.tokens
    if option := error.keyword or next((t.keyword for t in reversed(tokens) if t.keyword), None):
        return f"{option} needs a value; one that begins with a dash is given as {option}=-x"
    unknown = [word for word in error.unused_tokens or () if word.startswith("--")]
    near = [word for word in unknown if get_close_matches(word, error.argument.names, 1)]
    found = f", and there is no {near[0]}" if near else ""
    return f"{error.argument.name} is required{found}"


if __name__ == "__main__":
    main()
