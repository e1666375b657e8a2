"""The console command `fkv`: the table of its commands, and what happens to an error.

Adding a command takes a function and a line in `COMMANDS`:

- The function is an ordinary typer command in a *light* module: `export/cli.py`,
  `calibration/cli.py`, or a module of `tools/`. It imports torch, onnx, matplotlib and the like
  inside its body, so that `fkv X --help` works with none of them installed. Its docstring is the
  help text, its first line the summary.
- Long flags carry units (`--timeout-s`). `--json` prints one object on stdout (`print_json`);
  everything else goes to stderr (`talk`, `progress`, `track`). All four live in
  `runtime_trt/console.py`. `--dry-run` wherever something is built or written.
- Exit codes are `ExitCode`: 0 good, 1 a check failed (`raise typer.Exit(ExitCode.CHECK_FAILED)`),
  2 bad use. A user's mistake is raised as a `ForcingKvError` (or a ValueError): the boundary below
  prints its message and exits with 2. A missing optional package is turned into the name of the
  extra to install. Anything else is a defect: traceback and exit code 70, never 1.
  With FKV_DEBUG=1 every error shows its traceback.

The layout: `demo`, `calibrate heads`, `export`, `build`, `run`, `verify`, `bench`, `inspect`,
`plan`, `eval`, `plugins list`.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import typer

from forcing_kv.runtime_trt.console import ExitCode, project_version, talk
from forcing_kv.runtime_trt.errors import EXTRA_OF_MODULE, ForcingKvError, missing_dependency


class Command(NamedTuple):
    """One line of the command table."""

    name: str
    """As typed after `fkv`: one word, or a group and a word."""
    module: str
    """Light module that holds the function."""
    function: str
    """The typer command in that module."""


COMMANDS: tuple[Command, ...] = (
    Command("demo", "forcing_kv.tools.demo", "demo"),
    Command("encode-prompt", "forcing_kv.tools.encode_prompt", "encode_prompt"),
    Command("export", "forcing_kv.export.cli", "export"),
    Command("add-decoder", "forcing_kv.export.decoder_cli", "add_decoder"),
    Command("build", "forcing_kv.export.build_cli", "build"),
    Command("run", "forcing_kv.tools.run", "run"),
    Command("verify", "forcing_kv.export.cli", "verify"),
    Command("inspect", "forcing_kv.tools.inspect", "inspect"),
    Command("selftest", "forcing_kv.tools.selftest", "selftest"),
    Command("eval", "forcing_kv.tools.digits.evaluate", "evaluate_command"),
    Command("plan", "forcing_kv.tools.plan", "plan"),
    Command("calibrate heads", "forcing_kv.calibration.cli", "calibrate_heads"),
    Command("calibrate fp8", "forcing_kv.calibration.fp8_cli", "calibrate_fp8"),
    Command("calibrate policy", "forcing_kv.calibration.policy_cli", "calibrate_policy"),
    Command("bench step", "forcing_kv.tools.bench.cli", "bench_step"),
    Command("bench chunk", "forcing_kv.tools.bench.cli", "bench_chunk"),
    Command("bench rollout", "forcing_kv.tools.bench.cli", "bench_rollout"),
    Command("bench ops", "forcing_kv.tools.bench.ops", "bench_ops"),
    Command("bench load", "forcing_kv.tools.bench.cli", "bench_load"),
    Command("bench suite", "forcing_kv.tools.bench.cli", "bench_suite"),
    Command("bench report", "forcing_kv.tools.bench.cli", "bench_report"),
    Command("plugins list", "forcing_kv.tools.plugins", "list_plugins"),
)
"""Every command of `fkv`, in the order in which `fkv --help` lists them."""

GROUPS = {
    "bench": "Measure speed, behind a check that the results are right.",
    "calibrate": "Measure a model on real rollouts.",
    "plugins": "Look at the custom operators.",
}
"""First word of the two-word commands → what the group is for."""


def build_app(commands: Sequence[Command]) -> typer.Typer:
    """Returns the typer application of the given commands."""
    app = _new_app(help="Compiled deployment of autoregressive video diffusion with Forcing-KV.")
    app.callback()(_root)
    groups: dict[str, typer.Typer] = {}
    for command in commands:
        *group, name = command.name.split()
        parent = app
        if group:
            parent = groups.get(group[0]) or _new_app(help=GROUPS[group[0]])
            if group[0] not in groups:
                groups[group[0]] = parent
                app.add_typer(parent, name=group[0])
        parent.command(name)(getattr(importlib.import_module(command.module), command.function))
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `fkv` and exits: the entry point of the console script.

    Args:
        arguments: What follows `fkv`; by default the arguments of this process.
    """
    try:
        build_app(COMMANDS)(args=arguments, prog_name="fkv")
    except Exception as error:
        sys.exit(_report(error))


def _report(error: Exception) -> ExitCode:
    message = _user_message(error)
    if message is None or os.environ.get("FKV_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    if message is None:
        talk("This is a defect in forcing_kv, not in its use.", style="bold red")
        return ExitCode.INTERNAL
    talk(f"Error: {message}", style="bold red")
    return ExitCode.BAD_USE


def _user_message(error: Exception) -> str | None:
    """Returns what to tell a user who made a mistake, None where the mistake is not theirs."""
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
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        # A write names no file.
        return f"{error.strerror}; free some, or choose another disk"
    return None


def _new_app(help: str) -> typer.Typer:
    return typer.Typer(
        help=help,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fkv {project_version()}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """The options of `fkv` itself; typer calls their callbacks."""


if __name__ == "__main__":
    main()
