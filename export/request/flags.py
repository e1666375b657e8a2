"""How the fields of frozen dataclasses become the flags of commands.

A command takes one dataclass a subject. A field is a flag, the docstring under it the help, its
type the check, its default the default; `@flags(PANEL)` puts them into a panel of the help:

    @flags(MODEL)
    @dataclass(frozen=True, kw_only=True)
    class ModelOptions:
        chunk_frames: PositiveInt | None = None
        "Latent frames a chunk."

cyclopts does the work. Here are the few types and manners that it leaves to us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeVar, get_type_hints

from cyclopts import CoercionError, Group, Parameter, Token
from cyclopts.validators import Number
from docstring_parser import parse_from_object

from forcing_kv.runtime_trt.errors import InputError, shown
from forcing_kv.runtime_trt.rollout.arguments import check_seed, check_threads
from forcing_kv.runtime_trt.rollout.resolution import RESOLUTIONS, parse_latent_size

C = TypeVar("C")
T = TypeVar("T", int, float)


def _shown(default: Any) -> str | None:
    """What the help says of a default; a flag that is off and an empty list go without saying."""
    if default is None or default is False or default == () or default == {}:
        return None
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


MANNERS = Parameter(
    negative_bool=(),
    negative_iterable=(),
    negative_none=(),
    show_default=_shown,
    allow_repeating=True,
)
"""Of every flag: no `--no-` form unless its type is `YesNo`; the last of several wins."""

OPTIONS = Group.create_default_parameters("Options")
"""Panel of the flags that name no other."""


def panel(title: str) -> Group:
    """A panel of the help, below those that were made before it."""
    return Group.create_ordered(title)


def flags(group: Group | None = None) -> Callable[[type[C]], type[C]]:
    """Decorator of a dataclass whose fields are flags; subclasses keep the panel."""
    mark = Parameter(name="*") if group is None else Parameter(name="*", group=group)

    def decorate(cls: type[C]) -> type[C]:
        # cyclopts reads the annotations of `__init__` with the names of the class's module, but
        # inherited ones were written in another.
        cls.__init__.__annotations__ = get_type_hints(cls, include_extras=True)
        return mark(cls)

    return decorate


def between(least: float, most: float | None = None) -> Parameter:
    """The range of a whole number, or of a share, both ends included; the help shows it."""
    shown = f"NUMBER>={least:g}" if most is None else f"{least:g}..{most:g}"
    return Parameter(validator=Number(gte=least, lte=most), metavar=shown)


def _whole(token: Token) -> int:
    try:
        return int(token.value)
    except ValueError as error:
        message = f"{token.keyword} is {shown(token.value)}; give a whole number"
        raise CoercionError(message) from error


# cyclopts itself would round 1.5.
Int = Annotated[int, Parameter(converter=lambda _, tokens: _whole(tokens[-1]))]
Ints = Annotated[tuple[int, ...], Parameter(converter=lambda _, tokens: tuple(map(_whole, tokens)))]
"""A flag to be repeated."""
PositiveInt = Annotated[Int, between(1)]
Natural = Annotated[Int, between(0)]
Seed = Annotated[Int, Parameter(validator=lambda _, seed: check_seed(seed), metavar="0..2**64-1")]
"""A key of the noise generator."""
Threads = Annotated[
    Int, Parameter(validator=lambda _, count: check_threads(count, "it"), metavar="NUMBER>=0")
]
"""CPU threads; 0 is an automatic choice."""
YesNo = Annotated[bool, Parameter(negative_bool="no-")]
"""A flag with a `--no-` form."""
Json = Annotated[bool, Parameter(name="--json")]
"""Field `as_json`."""
Computed = Parameter(parse=False)
"""Marks a field that no flag sets."""


def _file(_: Any, tokens: Sequence[Token]) -> Path:
    option, text = tokens[-1].keyword, tokens[-1].value
    if text.endswith(("/", "/.")):
        raise CoercionError(f"{option} is {text!r}, which names a folder; name a file")
    return Path(text)


File = Annotated[Path, Parameter(converter=_file)]
"""A file to write: `Path` alone would drop a slash at its end."""


def _list_of(number: Callable[[str], T], kind: str, _: Any, tokens: Sequence[Token]) -> Any:
    option, text = tokens[-1].keyword, tokens[-1].value
    try:
        return tuple(number(part) for part in text.split(","))
    except ValueError as error:
        raise CoercionError(f"{option} is {shown(text)}; give {kind} such as 0,3,5") from error


def _size(_: Any, tokens: Sequence[Token]) -> tuple[int, int]:
    try:
        return parse_latent_size(tokens[-1].keyword or "latent size", tokens[-1].value)
    except InputError as error:
        raise CoercionError(str(error)) from error


def _shown_size(size: tuple[int, int] | None) -> str | None:
    names = {value: name for name, value in RESOLUTIONS.items()}
    return None if size is None else names.get(size, f"{size[0]}x{size[1]}")


Integers = Annotated[
    tuple[int, ...],
    Parameter(converter=partial(_list_of, int, "integers"), n_tokens=1, metavar="INT,..."),
]
"""A list in one word, such as `0,3,5`."""
Numbers = Annotated[
    tuple[float, ...],
    Parameter(converter=partial(_list_of, float, "numbers"), n_tokens=1, metavar="FLOAT,..."),
]
LatentSize = Annotated[
    tuple[int, int],
    Parameter(converter=_size, n_tokens=1, metavar="SIZE", show_default=_shown_size),
]
"""The size of a frame, as `parse_latent_size` reads it: latent rows and columns."""


def changes_of(cls: type, flag: Callable[[str], str]) -> Any:
    """The fields of a dataclass as flags without a default, which give the changes alone.

    Args:
        flag: name of a field -> what its flag is made of.

    Returns:
        A type that is a dictionary of the fields that were given.
    """
    docs = {each.arg_name: each.description for each in parse_from_object(cls).params}
    types = {
        name: Annotated[
            Int if hint is int else hint,
            Parameter(
                name=f"--{flag(name).replace('_', '-')}", help=docs[name], negative_bool="no-"
            ),
        ]
        for name, hint in get_type_hints(cls).items()
    }
    return TypedDict(f"{cls.__name__}Changes", types, total=False)  # type: ignore[operator]


def given(options: Any) -> list[str]:
    """Flags of a dataclass whose value is not the default, as one types them."""
    return [_flag(field, options) for field in fields(options) if _is_changed(field, options)]


def _is_changed(field: Field[Any], options: Any) -> bool:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return bool(getattr(options, field.name) != default)


def _flag(field: Field[Any], options: Any) -> str:
    negated = getattr(options, field.name) is False
    return f"--{'no-' if negated else ''}{field.name.replace('_', '-')}"
