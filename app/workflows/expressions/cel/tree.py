"""
The tree of an expression: what its text says, part by part, with the place of each part.

Google's parser reads the text and expands the macros; the tree is decoded from the form in which the parser stores it
(protobuf, `cel.expr.ParsedExpr` of cel-spec's syntax.proto).
What JSON cannot hold (bytes, unsigned integers, messages) is refused here, by name.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from cel_expr_python import cel
from cel_expr_python.ext import ext_optional, ext_strings

#: Characters of one expression.
MAX_LENGTH = 20_000

#: The operators that the parser writes as calls, as people write them.
OPERATORS: Mapping[str, str] = {
    **{f"_{sign}_": sign for sign in ("+", "-", "*", "/", "%", "==", "!=", "<", "<=", ">", ">=", "&&", "||")},
    "!_": "!",
    "-_": "-",
    "_?_:_": "?:",
    "_[_]": "[]",
    "@in": "in",
    "_?._": ".?",
    "_[?_]": "[?]",
}


class Malformed(Exception):
    """The text is no expression, or one that is not offered. Lines and characters are counted from 1."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        super().__init__("; ".join(fault.message for fault in faults))


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a text, and its place."""

    message: str
    line: int = 1
    character: int = 1


@dataclass(frozen=True, slots=True)
class Constant:
    """A literal."""

    at: int
    value: bool | int | float | str | None


@dataclass(frozen=True, slots=True)
class Name:
    """A variable, or the name of a type."""

    at: int
    name: str


@dataclass(frozen=True, slots=True)
class Field:
    """`operand.name`, or `has(operand.name)` where it is only tested."""

    at: int
    operand: Node
    name: str
    tested: bool


@dataclass(frozen=True, slots=True)
class Call:
    """A function or operator on its arguments; the target of a method is the first of them."""

    at: int
    function: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Items:
    """A list as it is written; the elements at `optional` stand there only if they have a value."""

    at: int
    elements: tuple[Node, ...]
    optional: frozenset[int]


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of a map as it is written."""

    key: Node
    value: Node
    optional: bool


@dataclass(frozen=True, slots=True)
class Entries:
    """A map as it is written."""

    at: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Loop:
    """What a macro stands for: `accumulator` goes through `step` for each item of `range` while `condition` holds."""

    at: int
    variable: str
    range: Node
    accumulator: str
    start: Node
    condition: Node
    step: Node
    result: Node


Node: TypeAlias = Constant | Name | Field | Call | Items | Entries | Loop


def parse(text: str) -> Node:
    """The tree of an expression. Raises Malformed."""
    if len(text) > MAX_LENGTH:
        raise Malformed([Fault(f"it is longer than {MAX_LENGTH} characters")])
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Malformed([Fault("half a character (a lone surrogate)", *place(text, error.start))]) from None
    try:
        stored = environment().compile(text, disable_check=True).serialize()
    except (RuntimeError, ValueError) as error:
        raise Malformed(faults(str(error))) from None
    # An Any: its field 2 holds the ParsedExpr.
    parsed = _message(_one(_message(stored), 2))
    return _Reader(text, _message(_one(parsed, 3, b""))).node(_one(parsed, 2))


@lru_cache(maxsize=256)
def environment(variables: frozenset[tuple[str, str]] = frozenset()) -> cel.Env:
    """An environment of the library in which these names have these types (a key of `TYPES`)."""
    return cel.NewEnv(
        variables={name: TYPES[kind] for name, kind in variables},
        extensions=[ext_strings.ExtStrings(), ext_optional.ExtOptional()],
    )


#: Types of names, as the library knows them. A number of JSON may be an int or a double, so it is `dyn`.
TYPES: Mapping[str, cel.Type] = {
    "dyn": cel.Type.DYN,
    "bool": cel.Type.BOOL,
    "int": cel.Type.INT,
    "string": cel.Type.STRING,
    "timestamp": cel.Type.TIMESTAMP,
    "duration": cel.Type.DURATION,
    "list": cel.Type.List(cel.Type.DYN),
    "map": cel.Type.Map(cel.Type.STRING, cel.Type.DYN),
    **{
        f"list of {kind.name().lower()}": cel.Type.List(kind) for kind in (cel.Type.BOOL, cel.Type.INT, cel.Type.STRING)
    },
}


def faults(told: str) -> list[Fault]:
    """What the library says is wrong, in plainer words."""
    found = [Fault(_plainer(message), int(line), int(column)) for line, column, message in _FAULT.findall(told)]
    if "recursion" in told:
        return [Fault("it is nested deeper, or chained longer, than 32")]
    return found[:3] or [Fault(told.splitlines()[0])]


_FAULT = re.compile(r"ERROR: <input>:(\d+):(\d+): (.*)")
_OVERLOAD = re.compile(r"found no matching overload for '(.*)' applied to '(.*)'")
_UNEXPECTED = re.compile(
    r"(?:mismatched input|extraneous input|no viable alternative at input|token recognition error at:)"
    r" '(.*?)'(?: expecting.*)?$"
)
_SELECT = re.compile(r"expression of type '(.*)' cannot be the operand of a select operation")


def _plainer(message: str) -> str:
    message = message.removeprefix("Syntax error: ").removesuffix(" [INVALID_ARGUMENT]")
    if "input '<EOF>'" in message:
        return "it ends too early"
    if found := _UNEXPECTED.match(message):
        return f"{found[1].strip()!r} is not expected here"
    if found := _OVERLOAD.search(message):
        given = found[2].replace("null_type", "null")
        return f"'{OPERATORS.get(found[1], found[1])}' does not take {given}"
    if found := _SELECT.search(message):
        return f"a value of the type {found[1]} has no fields"
    if message.startswith("undeclared reference to"):
        return message.partition(" (in container")[0].replace("undeclared reference to", "there is no")
    return message


class _Reader:
    """Decodes the stored form. Numbers of fields are those of syntax.proto."""

    def __init__(self, text: str, source: _Message) -> None:
        self._text = text
        entries = (_message(entry) for entry in source.get(4, ()))
        self._places = {_one(entry, 1, 0): _one(entry, 2, 0) for entry in entries}

    def node(self, stored: bytes) -> Node:
        message = _message(stored)
        at = self._places.get(_one(message, 2, 0), 0)
        kind = next((number for number in (3, 4, 5, 6, 7, 8, 9) if number in message), 0)
        part = _message(_one(message, kind, b""))
        match kind:
            case 3:
                return Constant(at, self._constant(part, at))
            case 4:
                return Name(at, _text(part, 1))
            case 5:
                return Field(at, self.node(_one(part, 1)), _text(part, 2), bool(_one(part, 3, 0)))
            case 6:
                return self._call(part, at)
            case 7:
                return Items(at, self._nodes(part, 1), frozenset(_packed(part, 2)))
            case 8 if not part.get(1):
                return Entries(at, tuple(self._entry(_message(entry)) for entry in part.get(2, ())))
            case 8:
                raise self._refused(at, f"messages such as {_text(part, 1)!r} are not offered: the data is JSON")
            case 9:
                head = (_text(part, 1), self.node(_one(part, 2)), _text(part, 3))
                return Loop(at, *head, *(self.node(_one(part, number)) for number in (4, 5, 6, 7)))
        raise AssertionError(f"no expression has the kind {kind}")

    def _nodes(self, part: _Message, number: int) -> tuple[Node, ...]:
        return tuple(self.node(stored) for stored in part.get(number, ()))

    def _call(self, part: _Message, at: int) -> Call:
        name, arguments = _text(part, 2), self._nodes(part, 3)
        if 1 in part:
            target = self.node(_one(part, 1))
            if isinstance(target, Name) and target.name == "optional":
                return Call(at, f"optional.{name}", arguments)
            arguments = (target, *arguments)
        return Call(at, name, arguments)

    def _entry(self, part: _Message) -> Entry:
        return Entry(self.node(_one(part, 3)), self.node(_one(part, 4)), bool(_one(part, 5, 0)))

    def _constant(self, part: _Message, at: int) -> bool | int | float | str | None:
        ((number, values),) = part.items()
        value = values[0]
        match number:
            case 1:
                return None
            case 2:
                return bool(value)
            case 3:
                return int(value) - (1 << 64) if value >= 1 << 63 else int(value)
            case 4:
                raise self._refused(at, "unsigned integers are not offered: write 3 instead of 3u")
            case 5:
                return float(struct.unpack("<d", value)[0])
            case 6:
                return str(value, "utf-8")
        raise self._refused(at, "bytes are not offered: the data is JSON")

    def _refused(self, at: int, message: str) -> Malformed:
        return Malformed([Fault(message, *place(self._text, at))])


def place(text: str, at: int) -> tuple[int, int]:
    """Line and character, each from 1, of an offset."""
    before = text[:at]
    return before.count("\n") + 1, at - (before.rfind("\n") + 1) + 1


#: The fields of a message by number, each with its values in order.
_Message: TypeAlias = dict[int, list[Any]]


def _message(stored: bytes) -> _Message:
    """The fields of a protobuf message: varints as int, everything else as bytes."""
    fields: _Message = {}
    at = 0
    while at < len(stored):
        tag, at = _varint(stored, at)
        match tag & 7:
            case 0:
                value: int | bytes
                value, at = _varint(stored, at)
            case 1:
                value, at = stored[at : at + 8], at + 8
            case 2:
                length, at = _varint(stored, at)
                value, at = stored[at : at + length], at + length
            case _:
                value, at = stored[at : at + 4], at + 4
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _varint(stored: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while stored[at] & 0x80:
        value |= (stored[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | stored[at] << shift, at + 1


def _one(fields: _Message, number: int, default: Any = None) -> Any:
    return fields[number][0] if number in fields else default


def _text(fields: _Message, number: int) -> str:
    return str(_one(fields, number, b""), "utf-8")


def _packed(fields: _Message, number: int) -> Iterator[int]:
    """Repeated integers, which are stored as one run of varints."""
    for run in fields.get(number, ()):
        at = 0
        while at < len(run):
            value, at = _varint(run, at)
            yield value
