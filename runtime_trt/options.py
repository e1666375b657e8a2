"""Values of command-line options."""

from __future__ import annotations

from forcing_kv.runtime_trt.errors import InputError


def parse_size(option: str, text: str) -> tuple[int, int]:
    """Read `ROWSxCOLUMNS`.

    Raises:
        InputError: another form.
    """
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise InputError(f"{option} is {text!r}; give rows x columns such as 60x104")
    return int(rows), int(columns)
