"""JSON files as frozen dataclasses, checked by pydantic: one clear error, or the whole content.

pydantic is imported when something is read, so that neither `--help` nor an import pays for it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, cast, get_args, get_type_hints

from forcing_kv.runtime_trt.errors import InputError

MAX_NBYTES = 64 << 20
"""Longest file that is read; a bundle's manifest has a few hundred kilobytes."""

_SHOWN = 60
"""Characters of a wrong value in a message."""
_T = TypeVar("_T")
_KINDS = {
    "bool_type": "true or false",
    "dataclass_type": "an object",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "an integer",
    "string_type": "a text",
    "tuple_type": "a list",
}
"""What pydantic's kinds of errors ask for."""


def read_json(path: Path, what: str, remedy: str) -> Any:
    """Parse a JSON file.

    Args:
        what: what it should be, for messages.
        remedy: what to do without it.

    Raises:
        InputError: missing, unreadable, too long, or no JSON that this project writes.
    """
    try:
        if path.stat().st_size > MAX_NBYTES:
            raise InputError(f"{path}: longer than {MAX_NBYTES >> 20} MB, so no {what}; {remedy}")
        return parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such {what}; {remedy}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not readable as a JSON {what} ({error}); {remedy}") from error


def parse_json(content: bytes | str) -> Any:
    """Parse JSON without what readers disagree about.

    Raises:
        ValueError: malformed, nested too deep, a key twice in one object, NaN or an infinity, or
            an integer beyond 64 bits.
    """
    try:
        return json.loads(
            content,
            object_pairs_hook=_object,
            parse_constant=_number,
            parse_float=_number,
            parse_int=_integer,
        )
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {twice!r} stands twice in one object")
    return found


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (value := int(text)) < 2**63:
        raise ValueError(f"integer {text[:20]}... is beyond 64 bits")
    return value


def load_as(
    kind: type[_T], data: Any, where: str = "", *, unknown: Literal["forbid", "ignore"] = "forbid"
) -> _T:
    """Check parsed JSON against a type and build it.

    Args:
        kind: a dataclass, or lists and mappings of them. Nothing is converted but lists to tuples
            and integers to floats.
        where: its name, which begins every message.
        unknown: what to do with keys that are no fields.

    Raises:
        InputError: the first entry that does not fit, by its dotted path.
    """
    from pydantic import ValidationError

    try:
        # As text, since only then does strict checking take a list for a tuple.
        text = json.dumps(data, allow_nan=False)
        loaded: _T = _adapter(cast(Any, kind)).validate_json(text, strict=True, extra=unknown)
    except ValidationError as error:
        raise InputError(_message(kind, error.errors(include_url=False), where)) from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{where}: {error}" if where else str(error)) from error
    return loaded


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _message(kind: Any, errors: list[Any], where: str) -> str:
    """The first of pydantic's errors, in our words."""
    error = errors[0]
    place = list(error["loc"])
    if error["type"] in ("missing", "unexpected_keyword_argument"):
        *holder, name = place
        if not is_dataclass(within := _kind_at(kind, holder)):
            return _joined(where, holder, f"entry {name} of the list is missing")
        known = [field.name for field in fields(within)]
        if error["type"] == "missing":
            return _joined(where, holder, f"entry {name!r} is missing; the fields are {known}")
        names = [each["loc"][-1] for each in errors if each["type"] == error["type"]]
        unknown = [each for each in names if each not in known]
        return _joined(where, holder, f"unknown keys {sorted(unknown)}; allowed are {known}")
    if error["type"] in ("value_error", "json_invalid"):
        return _joined(where, place, str(error["ctx"]["error"]))
    wanted = error.get("ctx", {}).get("expected") or _KINDS.get(error["type"], error["msg"])
    value = repr(error["input"])
    value = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
    path = ".".join(map(str, place)) or "the content"
    return _joined(where, [], f"{path} is {value}; it must be {wanted}")


def _joined(where: str, place: list[Any], problem: str) -> str:
    return ": ".join(filter(None, [where, ".".join(map(str, place)), problem]))


def _kind_at(kind: Any, place: list[Any]) -> Any:
    """The dataclass at a place within a type."""
    for step in place:
        kind = get_type_hints(kind)[step] if is_dataclass(kind) else _held(kind)
        if NoneType in get_args(kind):
            kind = _held(kind)
    return kind


def _held(kind: Any) -> Any:
    """What a list, a mapping or an optional type holds."""
    return [each for each in get_args(kind) if each not in (NoneType, ...)][-1]
