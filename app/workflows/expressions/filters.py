"""
The filters, tests and operators of templates: Jinja's own, with bounds.

All work of one rendering is counted before it is done: turns of loops, parts of values, characters that are made.
No text is longer than MAX_LENGTH, wherever it is kept. Numbers in arithmetic have at most 1024 bits.
Attributes and methods of Python's objects are never reached.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from jinja2 import TemplateError, Undefined, pass_context
from jinja2 import filters as jinja_filters
from jinja2 import tests as jinja_tests
from jinja2.runtime import Context
from jinja2.utils import _PassArg

_JINJAS: Mapping[str, Any] = jinja_filters.FILTERS
_JINJAS_TESTS: Mapping[str, Any] = jinja_tests.TESTS

#: Turns of all loops of one rendering.
MAX_TURNS = 1_000_000
#: Characters of one text.
MAX_LENGTH = 4_000_000
#: Units of work of one rendering: a part of a value that is looked at, a part of a loop's body, eight characters.
MAX_WORK = 3_000_000
#: Characters of a text for the filters whose time grows faster than the text.
MAX_SLOW = 100_000
#: Bits of a number in arithmetic.
MAX_BITS = 1024


class OverBound(TemplateError):
    """A template wants too much."""


class _Work:
    """What is left of the work that one rendering may do."""

    def __init__(self) -> None:
        self.units, self.turns = MAX_WORK, MAX_TURNS


_WORK: ContextVar[_Work] = ContextVar("work")


@contextmanager
def counted() -> Iterator[None]:
    """Inside, all work is counted. Outside, no filter works: none is worked out while a template is compiled."""
    token = _WORK.set(_Work())
    try:
        yield
    finally:
        _WORK.reset(token)


def spend(units: int) -> None:
    """Count what is about to be done. Raises Bound when it is too much."""
    work = _WORK.get()
    work.units -= units
    if work.units < 0:
        raise OverBound(f"it takes more than {MAX_WORK} steps of work")


def require_room(length: int) -> None:
    """Before a text of that length is made."""
    if length > MAX_LENGTH:
        raise OverBound(f"a text is longer than {MAX_LENGTH} characters")
    spend(1 + (length >> 3))


def weigh(value: Any) -> None:
    """Count all parts of a value, one as often as it stands there."""
    if isinstance(value, str):
        spend(1 + (len(value) >> 3))
    elif isinstance(value, Mapping):
        spend(1 + len(value))
        for name, item in value.items():
            weigh(name)
            weigh(item)
    elif isinstance(value, list | tuple):
        spend(1 + len(value))
        for item in value:
            weigh(item)
    elif isinstance(value, Undefined):
        str(value)  # which says what is not there
    else:
        spend(1)


def written(value: Any) -> Any:
    """What stands in the text for a value."""
    if isinstance(value, Undefined):
        return value
    return _text(value)


def _text(value: Any) -> str:
    if not isinstance(value, str | int | float | list | tuple | Mapping | None):
        raise OverBound(f"{type(value).__name__!r} is no value that can be written")
    weigh(value)
    return value if isinstance(value, str) else str(value)


def turned(items: Iterable[Any], weight: int) -> Iterator[Any]:
    """The items of a loop, each counted with the parts of its body."""
    work = _WORK.get()
    for item in items:
        work.turns -= 1
        if work.turns < 0:
            raise OverBound(f"the loops turn more than {MAX_TURNS} times")
        spend(1 + weight)
        yield item


def joined(parts: Iterable[Any]) -> str:
    """The operator `~`."""
    texts = [_text(part) if not isinstance(part, Undefined) else str(part) for part in parts]
    require_room(sum(map(len, texts)))
    return "".join(texts)


def sliced(value: Any, start: Any, stop: Any, step: Any) -> Any:
    """`value[start:stop:step]`."""
    if isinstance(value, str | list | tuple):
        spend(1 + (len(value) >> 3))
    return value[start:stop:step]


_COMPARISONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "gteq": operator.ge,
    "lt": operator.lt,
    "lteq": operator.le,
    "in": lambda item, of: item in of,
    "notin": lambda item, of: item not in of,
}


def compared(left: Any, *operations: Any) -> bool:
    """A chain of comparisons, such as `1 < x <= 3`: the operator and the right side of each."""
    for name, right in zip(operations[::2], operations[1::2], strict=True):
        _weigh_both(left, right)
        if not _COMPARISONS[name](left, right):
            return False
        left = right
    return True


def _weigh_both(left: Any, right: Any) -> None:
    """Before two values are compared: a list of texts is not looked into for a text, only along."""
    if isinstance(left, Mapping | list | tuple):
        weigh(left)
        weigh(right)
    else:
        spend(1 + (len(right) >> 3 if isinstance(right, str | list | tuple) else 0))


def calculated(sign: str, calculate: Callable[[], Any], *operands: Any) -> Any:
    """Arithmetic; `+` puts texts and lists together too."""
    spend(1)
    if all(isinstance(operand, int | float) for operand in operands):
        for operand in operands:
            if isinstance(operand, int) and operand.bit_length() > MAX_BITS:
                raise OverBound(f"'{sign}' is offered for numbers of up to {MAX_BITS} bits")
        if sign == "**" and (abs(operands[1]) > 64 or abs(operands[0]) > 1e9):
            raise OverBound("'**' is offered for small numbers only")
        return calculate()
    if any(isinstance(operand, Undefined) for operand in operands):
        return calculate()
    if sign == "+" and all(isinstance(operand, str) for operand in operands):
        require_room(sum(map(len, operands)))
        return calculate()
    if sign == "+" and len(operands) == 2 and all(isinstance(operand, list) for operand in operands):
        spend(sum(map(len, operands)))
        return calculate()
    raise OverBound(f"'{sign}' is offered for numbers only" + (", or for two texts or lists" if sign == "+" else ""))


def _jinjas(function: Callable[..., Any], context: Context, *arguments: Any, **named: Any) -> Any:
    """What a filter of Jinja gives: what it would give one by one, it gives as a list."""
    handed: Mapping[Any, Any] = {
        _PassArg.context: context,
        _PassArg.eval_context: context.eval_ctx,
        _PassArg.environment: context.environment,
    }
    first = _PassArg.from_obj(function)
    made = function(*(() if first is None else (handed[first],)), *arguments, **named)
    if isinstance(made, str):
        require_room(len(made))
        return str(made)
    return list(made) if isinstance(made, Iterator) else made


def _deep(name: str) -> Callable[..., Any]:
    """A filter that may look at every part of its value."""

    @pass_context
    def bounded(context: Context, value: Any, *arguments: Any, **named: Any) -> Any:
        for each in (value, *arguments, *named.values()):
            weigh(each)
        return _jinjas(_JINJAS[name], context, value, *arguments, **named)

    return bounded


def _shallow(name: str) -> Callable[..., Any]:
    """A filter that goes along its value, and does not look into the items itself."""

    @pass_context
    def bounded(context: Context, value: Any, *arguments: Any, **named: Any) -> Any:
        spend(1 + (len(value) if isinstance(value, str | list | tuple | Mapping) else 0))
        return _jinjas(_JINJAS[name], context, value, *arguments, **named)

    return bounded


def _slow(name: str) -> Callable[..., Any]:
    """A filter of texts whose time grows faster than the text."""
    inner = _deep(name)

    @pass_context
    def bounded(context: Context, value: Any, *arguments: Any, **named: Any) -> Any:
        text = _text(value)
        if len(text) > MAX_SLOW:
            raise OverBound(f"{name!r} is offered for texts of up to {MAX_SLOW} characters")
        return inner(context, text, *arguments, **named)

    return bounded


def _width(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value <= MAX_LENGTH:
        raise OverBound(f"a width lies between 0 and {MAX_LENGTH}")
    return value


def _center(value: Any, width: Any = 80) -> str:
    text = _text(value)
    require_room(max(len(text), _width(width)))
    return text.center(width)


def _indent(value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> Any:
    text = _text(value)
    by = len(width) if isinstance(width, str) else _width(width)
    require_room(len(text) + by * (len(text.splitlines()) + 1))
    return str(_JINJAS["indent"](text, width, first, blank))


def _replace(value: Any, old: Any, new: Any, count: Any = None) -> str:
    text, old, new = _text(value), _text(old), _text(new)
    found = text.count(old) if count is None else min(text.count(old), count)
    require_room(len(text) + found * max(len(new) - len(old), 0))
    return str(text.replace(old, new, -1 if count is None else count))


def _split(value: Any, separator: Any = None) -> list[str]:
    """The parts of a text between separators; its words without one."""
    text = _text(value)
    spend(len(text) >> 3 if separator is None else text.count(separator))
    return text.split(separator)


@pass_context
def _joined(context: Context, value: Any, between: Any = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = _jinjas(_JINJAS["map"], context, value, attribute=attribute)
    if not isinstance(value, str | list | tuple | Mapping):
        raise OverBound("'join' takes a list")
    spend(len(value))
    texts, between = [_text(item) for item in value], _text(between)
    require_room(sum(map(len, texts)) + len(between) * len(texts))
    return str(between.join(texts))


def _batch(value: Any, size: Any, fill: Any = None) -> list[Any]:
    spend(len(value) + _count(size))
    return list(_JINJAS["batch"](value, size, fill))


def _slices(value: Any, number: Any, fill: Any = None) -> list[Any]:
    spend(len(value) + _count(number))
    return list(_JINJAS["slice"](list(value), number, fill))


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise OverBound("a number of items is at least 1")
    return value


def _round(value: Any, precision: Any = 0, method: Any = "common") -> Any:
    if not isinstance(precision, int) or abs(precision) > 30:
        raise OverBound("'round' takes up to 30 digits")
    return _JINJAS["round"](calculated("+", lambda: value, value), precision, method)


@pass_context
def _sum(context: Context, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    if attribute is not None:
        value = _jinjas(_JINJAS["map"], context, value, attribute=attribute)
    total = start
    for item in value:
        if not isinstance(item, int | float):
            raise OverBound("'sum' is offered for numbers only")
        total = calculated("+", partial(operator.add, total, item), total, item)
    return total


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON as people write it: in the order that is there, in plain characters. Jinja's own is made for HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise OverBound("'tojson' indents by 16 at the most")
    weigh(value)
    if indent is None:
        made = json.dumps(value, ensure_ascii=False)
        require_room(len(made))
        return made
    parts: list[str] = []
    for part in json.JSONEncoder(ensure_ascii=False, indent=indent).iterencode(value):
        require_room(len(part))
        parts.append(part)
    return "".join(parts)


def _escaped(value: Any) -> str:
    text = _text(value)
    require_room(len(text))
    return str(_JINJAS["forceescape"](text))


#: What templates may use. Not offered: `attr`, `format`, `pprint`, `random`, `urlize`, `xmlattr`.
FILTERS: Mapping[str, Callable[..., Any]] = {
    **{name: _JINJAS[name] for name in ("abs", "count", "d", "default", "first", "last", "length")},
    **{name: _shallow(name) for name in ("items", "list", "map", "reject", "rejectattr", "reverse")},
    **{name: _shallow(name) for name in ("select", "selectattr")},
    **{name: _deep(name) for name in ("capitalize", "dictsort", "filesizeformat", "float", "groupby", "int")},
    **{name: _deep(name) for name in ("lower", "max", "min", "sort", "title", "trim", "truncate", "unique")},
    **{name: _deep(name) for name in ("upper", "urlencode", "wordcount")},
    **{name: _slow(name) for name in ("striptags", "wordwrap")},
    **dict.fromkeys(("e", "escape", "forceescape"), _escaped),
    **dict.fromkeys(("safe", "string"), _text),
    "batch": _batch,
    "center": _center,
    "indent": _indent,
    "join": _joined,
    "replace": _replace,
    "round": _round,
    "slice": _slices,
    "split": _split,
    "sum": _sum,
    "tojson": as_json,
}


def _test(name: str) -> Callable[..., Any]:
    def bounded(value: Any, *arguments: Any) -> Any:
        _weigh_both(value, arguments[0] if arguments else None)
        return _JINJAS_TESTS[name](value, *arguments)

    return bounded


#: Tests that look at no part of a value.
_HARMLESS = frozenset(
    {"defined", "undefined", "filter", "test", "none", "boolean", "false", "true", "integer", "float", "string"}
    | {"mapping", "number", "sequence", "iterable", "sameas", "callable"}
)
#: What can be asked with `is`.
TESTS: Mapping[str, Callable[..., Any]] = {
    name: function if name in _HARMLESS else _test(name) for name, function in _JINJAS_TESTS.items()
}
