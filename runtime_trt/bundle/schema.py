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

from forcing_kv.runtime_trt.bundle.hashes import open_regular
from forcing_kv.runtime_trt.errors import InputError

MAX_NBYTES = 64 << 20
"""Longest file that is read."""
MAX_DEPTH = 64
"""Most levels of lists and objects in one another; this project writes a dozen."""

_SHOWN = 60
"""Characters of a wrong value in a message."""
_MAX_PROBLEM = 500
"""Characters of what a type says of a value, which may quote it."""
_MAX_NAMES = 8
"""Unknown keys in a message."""
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
        InputError: missing, unreadable, no file, too long, or no JSON that this project writes.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MAX_NBYTES + 1)
    except OSError as error:
        raise unreadable(path, what, remedy, error) from error
    return parse_json_file(content, path, what, remedy)


def unreadable(path: Path, what: str, remedy: str, error: OSError) -> InputError:
    """The error of a file that cannot be read; arguments as of `read_json`."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: no such {what}; {remedy}")
    return InputError(f"{path}: cannot be read ({error.strerror or error}); {remedy}")


def parse_json_file(
    content: bytes, path: Path, what: str, remedy: str, max_nbytes: int | None = None
) -> Any:
    """Parse what was read of a JSON file; arguments and errors are those of `read_json`.

    Args:
        max_nbytes: most bytes that such a file has; `MAX_NBYTES` if None.
    """
    max_nbytes = MAX_NBYTES if max_nbytes is None else max_nbytes
    if len(content) > max_nbytes:
        raise InputError(f"{path}: longer than {max_nbytes >> 20} MB, so no {what}; {remedy}")
    try:
        return parse_json(content)
    except ValueError as error:
        raise InputError(f"{path}: not readable as a JSON {what} ({error}); {remedy}") from error


def parse_json(content: bytes | str) -> Any:
    """Parse JSON without what readers disagree about; a byte-order mark of UTF-8 is passed over.

    Raises:
        ValueError: malformed, not in UTF-8, nested deeper than `MAX_DEPTH`, a key twice in one
            object, NaN or an infinity, an integer beyond 64 bits, or half of a surrogate pair.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        found = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_number,
            parse_float=_number,
            parse_int=_integer,
        )
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not in UTF-8: byte {error.start} does not decode") from error
    _check_values(found)
    return found


def _check_values(value: Any) -> None:
    """Refuse deep nesting, which is safe to parse and not to walk, and texts that are none."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        for text in level:
            if isinstance(text, str) and not text.isascii():
                _require_text(text)
        holders = [each for each in level if isinstance(each, (dict, list))]
        if not holders:
            return
        level = [each for holder in holders for each in holder]
        level += [
            each for holder in holders if isinstance(holder, dict) for each in holder.values()
        ]
    raise ValueError(f"nested too deep; at most {MAX_DEPTH} levels are read")


def _require_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[error.start]!r} is half of a surrogate pair") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {_cut(repr(twice))} stands twice in one object")
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
        shown = [_cut(each) for each in sorted(unknown)[:_MAX_NAMES]]
        return _joined(where, holder, f"unknown keys {shown}; allowed are {known}")
    if error["type"] in ("value_error", "json_invalid"):
        return _joined(where, place, _cut(str(error["ctx"]["error"]), _MAX_PROBLEM))
    wanted = error.get("ctx", {}).get("expected") or _KINDS.get(error["type"], error["msg"])
    path = _dotted(place) or "the content"
    return _joined(where, [], f"{path} is {_cut(repr(error['input']))}; it must be {wanted}")


def _joined(where: str, place: list[Any], problem: str) -> str:
    return ": ".join(filter(None, [where, _dotted(place), problem]))


def _dotted(place: list[Any]) -> str:
    return ".".join(_cut(str(step)) for step in place)


def _cut(text: str, most: int = _SHOWN) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


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
