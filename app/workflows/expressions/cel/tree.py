"""
The syntax tree of an expression, with the position of each node.

Google's parser parses the text and expands the macros. The tree is decoded from the parser's serialised output
(protobuf, `cel.expr.ParsedExpr` of cel-spec's syntax.proto).
Literals that JSON cannot represent (bytes, unsigned integers, messages) are rejected here.
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

from app.workflows.expressions.cel.signatures import declarations

#: The function that `list.sortBy(x, key)` calls with a list of pairs: each item and its key.
SORTED_PAIRS = "@sortedPairs"
#: Maximum characters of one expression.
MAX_LENGTH = 20_000

#: The operators by the function names that the parser gives them.
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
    """The text is not a supported expression."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        super().__init__("; ".join(fault.message for fault in faults))


@dataclass(frozen=True, slots=True)
class Fault:
    """One error in the text of an expression. Lines and characters are counted from 1."""

    message: str
    line: int = 1
    character: int = 1


@dataclass(frozen=True, slots=True)
class Constant:
    """A literal."""

    offset: int
    value: bool | int | float | str | None


@dataclass(frozen=True, slots=True)
class Identifier:
    """A variable, or the name of a type."""

    offset: int
    name: str


@dataclass(frozen=True, slots=True)
class Select:
    """`operand.name`, or `has(operand.name)` when `test_only` is set."""

    offset: int
    operand: Node
    name: str
    test_only: bool


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a function or an operator. The target of a method call is the first argument."""

    offset: int
    function: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class ListLiteral:
    """A list literal. The elements at the indices in `optional` are left out when they have no value."""

    offset: int
    elements: tuple[Node, ...]
    optional: frozenset[int]


@dataclass(frozen=True, slots=True)
class MapEntry:
    """One entry of a map literal."""

    key: Node
    value: Node
    optional: bool


@dataclass(frozen=True, slots=True)
class MapLiteral:
    """A map literal."""

    offset: int
    entries: tuple[MapEntry, ...]


@dataclass(frozen=True, slots=True)
class Comprehension:
    """An expanded macro: `accumulator` is updated by `step` for each item of `range` while `condition` holds."""

    offset: int
    variable: str
    range: Node
    accumulator: str
    start: Node
    condition: Node
    step: Node
    result: Node


Node: TypeAlias = Constant | Identifier | Select | Call | ListLiteral | MapLiteral | Comprehension


def parse(text: str) -> Node:
    """Return the tree of an expression. Raises Malformed."""
    if len(text) > MAX_LENGTH:
        raise Malformed([Fault(f"it is longer than {MAX_LENGTH} characters")])
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Malformed([Fault("a lone surrogate is not allowed", *position(text, error.start))]) from None
    try:
        stored = environment().compile(text, disable_check=True).serialize()
    except (RuntimeError, ValueError) as error:
        raise Malformed(faults(str(error))) from None
    # The outer message is an Any; its field 2 is the ParsedExpr.
    parsed = _message(_first(_message(stored), 2))
    return _Decoder(text, _message(_first(parsed, 3, b""))).node(_first(parsed, 2))


@lru_cache(maxsize=256)
def environment(variables: frozenset[tuple[str, str]] = frozenset()) -> cel.Env:
    """Return a library environment in which these variables have these types (keys of `TYPES`)."""
    return cel.NewEnv(
        variables={name: TYPES[kind] for name, kind in variables},
        extensions=[ext_strings.ExtStrings(), ext_optional.ExtOptional()],
        functions=declarations(),
    )


#: The library's types of variables. A JSON number may be an int or a double, so it is `dyn`.
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


def faults(report: str) -> list[Fault]:
    """Return the errors in the library's report, in plain words."""
    found = [Fault(_simplified(message), int(line), int(column)) for line, column, message in _FAULT.findall(report)]
    if "recursion" in report:
        return [Fault("it is nested deeper, or its chain is longer, than 32")]
    return found[:3] or [Fault(report.splitlines()[0])]


_FAULT = re.compile(r"ERROR: <input>:(\d+):(\d+): (.*)")
_OVERLOAD = re.compile(r"found no matching overload for '(.*)' applied to '(.*)'")
_UNEXPECTED = re.compile(
    r"(?:mismatched input|extraneous input|no viable alternative at input|token recognition error at:)"
    r" '(.*?)'(?: expecting.*)?$"
)
_SELECT = re.compile(r"expression of type '(.*)' cannot be the operand of a select operation")


def _simplified(message: str) -> str:
    message = message.removeprefix("Syntax error: ").removesuffix(" [INVALID_ARGUMENT]")
    if "input '<EOF>'" in message:
        return "it ends too early"
    if found := _UNEXPECTED.match(message):
        return f"{found[1].strip()!r} is not expected here"
    if found := _OVERLOAD.search(message):
        given = found[2].replace("null_type", "null")
        return f"'{OPERATORS.get(found[1], found[1])}' does not accept {given}"
    if found := _SELECT.search(message):
        return f"a value of the type {found[1]} has no fields"
    if message.startswith("undeclared reference to"):
        return message.partition(" (in container")[0].replace("undeclared reference to", "there is no")
    return message


class _Decoder:
    """Decodes the serialised tree. The field numbers are those of syntax.proto."""

    def __init__(self, text: str, source: _Message) -> None:
        self._text = text
        entries = (_message(entry) for entry in source.get(4, ()))
        self._offsets = {_first(entry, 1, 0): _first(entry, 2, 0) for entry in entries}

    def node(self, stored: bytes) -> Node:
        message = _message(stored)
        offset = self._offsets.get(_first(message, 2, 0), 0)
        kind = next((number for number in (3, 4, 5, 6, 7, 8, 9) if number in message), 0)
        part = _message(_first(message, kind, b""))
        match kind:
            case 3:
                return Constant(offset, self._constant(part, offset))
            case 4:
                return Identifier(offset, _text(part, 1))
            case 5:
                return Select(offset, self.node(_first(part, 1)), _text(part, 2), bool(_first(part, 3, 0)))
            case 6:
                return self._call(part, offset)
            case 7:
                return ListLiteral(offset, self._nodes(part, 1), frozenset(_packed(part, 2)))
            case 8 if not part.get(1):
                return MapLiteral(offset, tuple(self._entry(_message(entry)) for entry in part.get(2, ())))
            case 8:
                raise self._unsupported(
                    offset, f"messages such as {_text(part, 1)!r} are not supported: the data is JSON"
                )
            case 9:
                head = (_text(part, 1), self.node(_first(part, 2)), _text(part, 3))
                return Comprehension(offset, *head, *(self.node(_first(part, number)) for number in (4, 5, 6, 7)))
        raise AssertionError(f"no expression has the kind {kind}")

    def _nodes(self, part: _Message, number: int) -> tuple[Node, ...]:
        return tuple(self.node(stored) for stored in part.get(number, ()))

    def _call(self, part: _Message, offset: int) -> Node:
        name, arguments = _text(part, 2), self._nodes(part, 3)
        if 1 in part:
            target = self.node(_first(part, 1))
            if isinstance(target, Identifier) and target.name == "optional":
                return Call(offset, f"optional.{name}", arguments)
            arguments = (target, *arguments)
        if name == "sortBy":
            return self._sort_by(arguments, offset)
        return Call(offset, name, arguments)

    def _sort_by(self, arguments: tuple[Node, ...], offset: int) -> Call:
        """Expand the macro `list.sortBy(x, key)`: the pairs of each item and its key are sorted."""
        match arguments:
            case (of, Identifier(name=variable) as item, key):
                pass
            case _:
                raise self._unsupported(offset, "'sortBy' is written as list.sortBy(x, key)")
        result = Identifier(offset, "@pairs")
        pair = ListLiteral(offset, (ListLiteral(offset, (item, key), frozenset()),), frozenset())
        append, empty = Call(offset, "_+_", (result, pair)), ListLiteral(offset, (), frozenset())
        pairs = Comprehension(offset, variable, of, "@pairs", empty, Constant(offset, True), append, result)
        return Call(offset, SORTED_PAIRS, (pairs,))

    def _entry(self, part: _Message) -> MapEntry:
        return MapEntry(self.node(_first(part, 3)), self.node(_first(part, 4)), bool(_first(part, 5, 0)))

    def _constant(self, part: _Message, offset: int) -> bool | int | float | str | None:
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
                raise self._unsupported(offset, "unsigned integers are not supported: write 3 instead of 3u")
            case 5:
                return float(struct.unpack("<d", value)[0])
            case 6:
                return str(value, "utf-8")
        raise self._unsupported(offset, "bytes are not supported: the data is JSON")

    def _unsupported(self, offset: int, message: str) -> Malformed:
        return Malformed([Fault(message, *position(self._text, offset))])


def position(text: str, offset: int) -> tuple[int, int]:
    """Return the line and the character of an offset, both counted from 1."""
    before = text[:offset]
    return before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1


#: The fields of a protobuf message by number, each with its values in order.
_Message: TypeAlias = dict[int, list[Any]]


def _message(stored: bytes) -> _Message:
    """Decode a protobuf message: varints as int, all other types as bytes."""
    fields: _Message = {}
    offset = 0
    while offset < len(stored):
        tag, offset = _varint(stored, offset)
        match tag & 7:
            case 0:
                value: int | bytes
                value, offset = _varint(stored, offset)
            case 1:
                value, offset = stored[offset : offset + 8], offset + 8
            case 2:
                length, offset = _varint(stored, offset)
                value, offset = stored[offset : offset + length], offset + length
            case _:
                value, offset = stored[offset : offset + 4], offset + 4
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _varint(stored: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    while stored[offset] & 0x80:
        value |= (stored[offset] & 0x7F) << shift
        offset, shift = offset + 1, shift + 7
    return value | stored[offset] << shift, offset + 1


def _first(fields: _Message, number: int, default: Any = None) -> Any:
    return fields[number][0] if number in fields else default


def _text(fields: _Message, number: int) -> str:
    return str(_first(fields, number, b""), "utf-8")


def _packed(fields: _Message, number: int) -> Iterator[int]:
    """Yield the items of a packed repeated integer field."""
    for run in fields.get(number, ()):
        offset = 0
        while offset < len(run):
            value, offset = _varint(run, offset)
            yield value
