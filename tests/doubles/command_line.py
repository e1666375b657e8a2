"""`fkv` in this process: what it printed and returned. A user's mistake is raised, not printed."""

import contextlib
import io
from typing import NamedTuple

from cyclopts import CycloptsError

from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.tools import cli


class Done(NamedTuple):
    """What one call of `fkv` did."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def fkv(*arguments: object) -> Done:
    """Call a command; everything but its exit is raised, after what it had printed is shown."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.build_app(cli.COMMANDS)([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    except Exception as error:
        print(out.getvalue(), err.getvalue())
        if isinstance(error, CycloptsError):
            raise InputError(str(error)) from error
        raise
    return Done(code, out.getvalue(), err.getvalue())
