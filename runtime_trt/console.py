"""How every command talks: messages and progress to stderr, one JSON object to stdout.

It stands on the ground floor because commands live in several packages. `rich` is imported on first
use, so that a process that only runs a bundle does not load it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

T = TypeVar("T")


class ExitCode(IntEnum):
    """Exit codes of every command, which returns one or none."""

    GOOD = 0
    """It did what it was asked to."""
    CHECK_FAILED = 1
    """It ran, and what it checked is not within tolerance."""
    BAD_USE = 2
    """Wrong options, wrong files, or something missing on this machine."""
    INTERNAL = 70
    """A defect of the project itself; the traceback says where."""


def project_version() -> str:
    """Returns the version as pyproject.toml states it, such as "0.1.0"."""
    from importlib.metadata import version

    return version("forcing-kv")


_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that act on a terminal, turn the text around, or are none; not tab and newline."""


def shown(text: str) -> str:
    r"""Returns text from outside as a terminal may get it: what would act is spelt, as `\x1b`."""
    return _ACTING.sub(lambda found: ascii(found[0])[1:-1], text)


@cache
def console() -> Console:
    """Returns the console on stderr, for tables and styled text; most callers want `talk`."""
    return _plain_console(stderr=True)


def screen() -> Console:
    """Returns a console on stdout, for what a command was asked to show."""
    return _plain_console()


def _plain_console(*, stderr: bool = False) -> Console:
    """A console that prints every text as it is: no markup, no emoji names, and as `shown`.

    That goes for the cells and titles of tables too; `rich.text.Text` is left alone.
    """
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(shown(text), **options | {"markup": False, "emoji": False})

    return PlainConsole(stderr=stderr, highlight=False, markup=False, emoji=False)


def talk(message: str, *, style: str | None = None) -> None:
    """Prints a message for the person at the terminal.

    Args:
        message: Printed as it is, but for what acts on a terminal (`shown`): brackets are not
            markup, and long lines are left to the terminal.
        style: A `rich` style such as "green" or "bold red", dropped where there is no terminal.
    """
    console().print(message, style=style, soft_wrap=True)


class PlainFormatter(logging.Formatter):
    """Log messages as `talk` prints them."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def print_json(record: Any) -> None:
    """Prints the one JSON object of a command that was called with `--json`.

    Args:
        record: JSON types, paths, and numpy scalars and arrays.

    Raises:
        ValueError: A number is NaN or infinite; JSON has no such number, so report it as null.
    """
    text = json.dumps(record, indent=2, allow_nan=False, default=_plain)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"no JSON form for {type(value).__name__}")


class Task:
    """One bar of `progress`; every method is cheap and does nothing where no bar is shown."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def advance(self, amount: float = 1) -> None:
        self._bars.advance(self._task, amount)

    def describe(self, description: str) -> None:
        """Replaces the text before the bar, such as the name of the graph being written."""
        self._bars.update(self._task, description=shown(description))


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[Task]:
    """Shows a progress bar on stderr while the block runs; silent where stderr is no terminal.

    Args:
        description: What is being done, a few words.
        total: Amount at which the bar is full; None shows a bar without an end.

    Yields:
        The bar, to be advanced by the block.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    quiet = not console().is_terminal
    with Progress(*columns, console=console(), disable=quiet) as bars:
        yield Task(bars, bars.add_task(shown(description), total=total))


def track(items: Iterable[T], description: str, total: float | None = None) -> Iterator[T]:
    """Iterates over `items` with a progress bar, as `progress` does.

    Args:
        items: What to iterate over; its length gives the total where it has one.
        description: What is being done, a few words.
        total: Number of items, for iterables without a length.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(description, total) as task:
        for item in items:
            yield item
            task.advance()
