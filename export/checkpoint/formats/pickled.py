"""Pickles of `torch.save`, read as data: nothing is imported and nothing is called.

Opcodes work on plain values here. A global stays a name, and what a pickle makes by calling one is
what the reader of the file makes of that name and its arguments.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

MAX_OPCODES = 3_000_000
"""Where reading stops; a model's optimizer, averages and weights have some 100,000."""


@dataclass(frozen=True)
class Named:
    """A class or a function, by name."""

    name: str
    """Dotted, such as `torch._utils._rebuild_tensor_v2`."""

    @property
    def what(self) -> str:
        """What it is, for people."""
        return f"the name {self.name}"


@dataclass(frozen=True)
class Other:
    """Anything that is neither a tensor nor plain data."""

    what: str
    """What it is, for people, such as `an object of class argparse.Namespace`."""
    remedy: str = ""
    """What to do about it; empty for what does no harm beside weights."""


class Maker(Protocol):
    """What a file makes of its pickle's calls."""

    def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """What calling a global gives: a value, or `Other`."""

    def refer(self, key: Any) -> Any:
        """What a persistent id stands for."""


def read_pickle(stream: BinaryIO, maker: Maker) -> Any:
    """Read one pickle, in time and memory that its length bounds.

    Returns:
        Dicts (with their text keys alone), lists, tuples, numbers, texts, `Named`, `Other`, and
        what the maker made.

    Raises:
        ValueError: damaged, or more than weights need: too long, or opcodes of other programs.
    """
    machine = _Machine(maker)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count >= MAX_OPCODES:
                raise ValueError(f"the pickle has more than {MAX_OPCODES:,} opcodes")
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError("the pickle is damaged") from error
    raise ValueError("the pickle has no end")


_MARK = Named("(mark)")
_IGNORED = {"PROTO", "FRAME"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_ARGUMENTS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
"""Opcodes that push what they carry."""
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self, maker: Maker) -> None:
        self.maker = maker
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        if name in _ARGUMENTS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in _TUPLES:
            self.stack.append(tuple(self._last(_TUPLES[name])))
        elif name == "GLOBAL":
            self.stack.append(_named(*argument.split(" ", 1)))
        elif name not in _IGNORED:
            if (method := _METHODS.get(name)) is None:
                raise ValueError(f"the pickle has opcode {name}, which no weights need")
            method(self)

    def _last(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise IndexError
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _marked(self) -> list[Any]:
        """What stands above the last mark, which is taken too."""
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise IndexError
        taken = self.stack[place + 1 :]
        del self.stack[place:]
        return taken

    def _called(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, Other):
            return function
        if not isinstance(function, Named) or not isinstance(arguments, tuple):
            raise TypeError
        return self.maker.call(function.name, arguments)

    def _put(self, items: list[Any]) -> None:
        """Names and values by turns, into the dict below them."""
        holder = self.stack[-1]
        if isinstance(holder, Other):
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(holder, dict):
                raise TypeError
            if isinstance(key, str):
                if key in holder:
                    raise ValueError(f"entry {key!r} stands twice in one dict")
                holder[key] = value

    def _append(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)
        elif not isinstance(self.stack[-1], Other):
            raise TypeError

    def global_from_stack(self) -> None:
        module, name = self._last(2)
        self.stack.append(_named(str(module), str(name)))

    def reduce(self) -> None:
        function, arguments = self._last(2)
        self.stack.append(self._called(function, arguments))

    def new_with_keywords(self) -> None:
        function, arguments, _ = self._last(3)
        self.stack.append(self._called(function, arguments))

    def call_marked(self) -> None:
        function, *arguments = self._marked()
        self.stack.append(self._called(function, tuple(arguments)))

    def set_from_marked(self) -> None:
        self._marked()
        self.stack.append(Other("a set"))

    def dict_from_marked(self) -> None:
        items = self._marked()
        self.stack.append({})
        self._put(items)


def _named(module: str, name: str) -> Named:
    return Named(f"{module.replace('__builtin__', 'builtins')}.{name}")


_METHODS: dict[str, Callable[[_Machine], Any]] = {
    "EMPTY_DICT": lambda self: self.stack.append({}),
    "EMPTY_LIST": lambda self: self.stack.append([]),
    "EMPTY_SET": lambda self: self.stack.append(Other("a set")),
    "DUP": lambda self: self.stack.append(self.stack[-1]),
    "POP": lambda self: self.stack.pop(),
    "POP_MARK": lambda self: self._marked(),
    "TUPLE": lambda self: self.stack.append(tuple(self._marked())),
    "LIST": lambda self: self.stack.append(self._marked()),
    "DICT": _Machine.dict_from_marked,
    "FROZENSET": _Machine.set_from_marked,
    "SETITEM": lambda self: self._put(self._last(2)),
    "SETITEMS": lambda self: self._put(self._marked()),
    "APPEND": lambda self: self._append(self._last(1)),
    "APPENDS": lambda self: self._append(self._marked()),
    "ADDITEMS": lambda self: self._append(self._marked()),
    # What a state would add to an object is no weight: an OrderedDict's `_metadata`, for one.
    "BUILD": lambda self: self.stack.pop(),
    "STACK_GLOBAL": _Machine.global_from_stack,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.new_with_keywords,
    "OBJ": _Machine.call_marked,
    "BINPERSID": lambda self: self.stack.append(self.maker.refer(self.stack.pop())),
}
