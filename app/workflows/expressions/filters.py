"""
The filters, tests and operators of templates: Jinja's own, with limits.

All work of one rendering is counted before it is done: loop iterations, visited parts of values, created characters.
No text is longer than MAX_LENGTH, including intermediate texts. Numbers in arithmetic have at most 1024 bits.
Attributes and methods of Python objects are not accessible.
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

_JINJA_FILTERS: Mapping[str, Any] = jinja_filters.FILTERS
_JINJA_TESTS: Mapping[str, Any] = jinja_tests.TESTS

#: Maximum iterations of all loops of one rendering.
MAX_ITERATIONS = 1_000_000
#: Maximum characters of one text.
MAX_LENGTH = 4_000_000
#: Maximum units of work of one rendering. One unit: a visited part of a value, a node of a loop's body, 8 characters.
MAX_WORK = 3_000_000
#: Maximum characters of a text for the filters whose time grows faster than linearly.
MAX_SLOW = 100_000
#: Maximum bits of an integer in arithmetic.
MAX_BITS = 1024


class LimitExceeded(TemplateError):
    """A template exceeds a limit or uses an unsupported operation."""


class _Budget:
    """The remaining work of one rendering."""

    def __init__(self) -> None:
        self.units, self.iterations = MAX_WORK, MAX_ITERATIONS


_BUDGET: ContextVar[_Budget] = ContextVar("work")


@contextmanager
def budgeted() -> Iterator[None]:
    """
    Open a budget for the work in the block.

    Filters fail outside of such a block, so that none is evaluated while a template is compiled.
    """
    token = _BUDGET.set(_Budget())
    try:
        yield
    finally:
        _BUDGET.reset(token)


def spend(units: int) -> None:
    """Charge work that is about to be done. Raises LimitExceeded when the budget is exhausted."""
    budget = _BUDGET.get()
    budget.units -= units
    if budget.units < 0:
        raise LimitExceeded(f"it needs more than {MAX_WORK} units of work")


def charge_text(length: int) -> None:
    """Charge a text of that length that is about to be created. Raises LimitExceeded when it is too long."""
    if length > MAX_LENGTH:
        raise LimitExceeded(f"a text is longer than {MAX_LENGTH} characters")
    spend(1 + (length >> 3))


def charge_value(value: Any) -> None:
    """Charge all parts of a value; a shared part is charged at each occurrence."""
    if isinstance(value, str):
        spend(1 + (len(value) >> 3))
    elif isinstance(value, Mapping):
        spend(1 + len(value))
        for name, item in value.items():
            charge_value(name)
            charge_value(item)
    elif isinstance(value, list | tuple):
        spend(1 + len(value))
        for item in value:
            charge_value(item)
    elif isinstance(value, Undefined):
        str(value)  # raises UndefinedError, which names the missing value
    else:
        spend(1)


def finalized(value: Any) -> Any:
    """Return the text that is printed for a value (Jinja's `finalize`)."""
    if isinstance(value, Undefined):
        return value
    return _text(value)


def _text(value: Any) -> str:
    if not isinstance(value, str | int | float | list | tuple | Mapping | None):
        raise LimitExceeded(f"a value of the type {type(value).__name__!r} cannot be printed")
    charge_value(value)
    return value if isinstance(value, str) else str(value)


def counted_iteration(items: Iterable[Any], weight: int) -> Iterator[Any]:
    """Yield the items of a loop and charge each with the weight of the loop's body."""
    budget = _BUDGET.get()
    for item in items:
        budget.iterations -= 1
        if budget.iterations < 0:
            raise LimitExceeded(f"the loops have more than {MAX_ITERATIONS} iterations")
        spend(1 + weight)
        yield item


def concatenated(parts: Iterable[Any]) -> str:
    """The operator `~`."""
    texts = [_text(part) if not isinstance(part, Undefined) else str(part) for part in parts]
    charge_text(sum(map(len, texts)))
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
    """
    Return the value of a chain of comparisons, such as `1 < x <= 3`.

    `operations` alternates between the name of an operator and its right operand.
    """
    for name, right in zip(operations[::2], operations[1::2], strict=True):
        _charge_comparison(left, right)
        if not _COMPARISONS[name](left, right):
            return False
        left = right
    return True


def _charge_comparison(left: Any, right: Any) -> None:
    """
    Charge a comparison that is about to be done.

    With a scalar on the left, only the length of the right side counts: its items are compared, but not traversed.
    """
    if isinstance(left, Mapping | list | tuple):
        charge_value(left)
        charge_value(right)
    else:
        spend(1 + (len(right) >> 3 if isinstance(right, str | list | tuple) else 0))


def calculated(sign: str, calculate: Callable[[], Any], *operands: Any) -> Any:
    """Return the result of an arithmetic operator; `+` also concatenates two strings or two lists."""
    spend(1)
    if all(isinstance(operand, int | float) for operand in operands):
        for operand in operands:
            if isinstance(operand, int) and operand.bit_length() > MAX_BITS:
                raise LimitExceeded(f"'{sign}' supports numbers of up to {MAX_BITS} bits")
        if sign == "**" and (abs(operands[1]) > 64 or abs(operands[0]) > 1e9):
            raise LimitExceeded("'**' supports exponents of up to 64 and bases of up to 1e9")
        return calculate()
    if any(isinstance(operand, Undefined) for operand in operands):
        return calculate()
    if sign == "+" and all(isinstance(operand, str) for operand in operands):
        charge_text(sum(map(len, operands)))
        return calculate()
    if sign == "+" and len(operands) == 2 and all(isinstance(operand, list) for operand in operands):
        spend(sum(map(len, operands)))
        return calculate()
    raise LimitExceeded(f"'{sign}' supports numbers only" + (", or two strings or lists" if sign == "+" else ""))


def _call_jinja(function: Callable[..., Any], context: Context, *arguments: Any, **named: Any) -> Any:
    """Call a Jinja filter and return its result; a lazy result becomes a list."""
    injected: Mapping[Any, Any] = {
        _PassArg.context: context,
        _PassArg.eval_context: context.eval_ctx,
        _PassArg.environment: context.environment,
    }
    first = _PassArg.from_obj(function)
    made = function(*(() if first is None else (injected[first],)), *arguments, **named)
    if isinstance(made, str):
        charge_text(len(made))
        return str(made)
    return list(made) if isinstance(made, Iterator) else made


def _deep(name: str) -> Callable[..., Any]:
    """Wrap a Jinja filter that may visit every nested part of its arguments."""

    @pass_context
    def bounded(context: Context, value: Any, *arguments: Any, **named: Any) -> Any:
        for each in (value, *arguments, *named.values()):
            charge_value(each)
        return _call_jinja(_JINJA_FILTERS[name], context, value, *arguments, **named)

    return bounded


def _shallow(name: str) -> Callable[..., Any]:
    """Wrap a Jinja filter that iterates over its value without visiting parts of the items."""

    @pass_context
    def bounded(context: Context, value: Any, *arguments: Any, **named: Any) -> Any:
        spend(1 + (len(value) if isinstance(value, str | list | tuple | Mapping) else 0))
        return _call_jinja(_JINJA_FILTERS[name], context, value, *arguments, **named)

    return bounded


def _slow(name: str) -> Callable[..., Any]:
    """Wrap a Jinja filter of texts whose time grows faster than linearly."""
    inner = _deep(name)

    @pass_context
    def bounded(context: Context, value: Any, *arguments: Any, **named: Any) -> Any:
        text = _text(value)
        if len(text) > MAX_SLOW:
            raise LimitExceeded(f"{name!r} supports texts of up to {MAX_SLOW} characters")
        return inner(context, text, *arguments, **named)

    return bounded


def _width(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value <= MAX_LENGTH:
        raise LimitExceeded(f"a width must be between 0 and {MAX_LENGTH}")
    return value


def _center(value: Any, width: Any = 80) -> str:
    text = _text(value)
    charge_text(max(len(text), _width(width)))
    return text.center(width)


def _indent(value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> Any:
    text = _text(value)
    by = len(width) if isinstance(width, str) else _width(width)
    charge_text(len(text) + by * (len(text.splitlines()) + 1))
    return str(_JINJA_FILTERS["indent"](text, width, first, blank))


def _replace(value: Any, old: Any, new: Any, count: Any = None) -> str:
    text, old, new = _text(value), _text(old), _text(new)
    found = text.count(old) if count is None else min(text.count(old), count)
    charge_text(len(text) + found * max(len(new) - len(old), 0))
    return str(text.replace(old, new, -1 if count is None else count))


def _split(value: Any, separator: Any = None) -> list[str]:
    """Return the parts of a text between separators; without a separator, its words."""
    text = _text(value)
    spend(len(text) >> 3 if separator is None else text.count(separator))
    return text.split(separator)


@pass_context
def _joined(context: Context, value: Any, between: Any = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = _call_jinja(_JINJA_FILTERS["map"], context, value, attribute=attribute)
    if not isinstance(value, str | list | tuple | Mapping):
        raise LimitExceeded("'join' needs a list")
    spend(len(value))
    texts, between = [_text(item) for item in value], _text(between)
    charge_text(sum(map(len, texts)) + len(between) * len(texts))
    return str(between.join(texts))


def _batch(value: Any, size: Any, fill: Any = None) -> list[Any]:
    spend(len(value) + _count(size))
    return list(_JINJA_FILTERS["batch"](value, size, fill))


def _slices(value: Any, number: Any, fill: Any = None) -> list[Any]:
    spend(len(value) + _count(number))
    return list(_JINJA_FILTERS["slice"](list(value), number, fill))


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise LimitExceeded("a number of items must be at least 1")
    return value


def _round(value: Any, precision: Any = 0, method: Any = "common") -> Any:
    if not isinstance(precision, int) or abs(precision) > 30:
        raise LimitExceeded("'round' supports up to 30 digits")
    return _JINJA_FILTERS["round"](calculated("+", lambda: value, value), precision, method)


@pass_context
def _sum(context: Context, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    if attribute is not None:
        value = _call_jinja(_JINJA_FILTERS["map"], context, value, attribute=attribute)
    total = start
    for item in value:
        if not isinstance(item, int | float):
            raise LimitExceeded("'sum' supports numbers only")
        total = calculated("+", partial(operator.add, total, item), total, item)
    return total


def as_json(value: Any, indent: int | None = None) -> str:
    """
    Return a value as JSON, with the order of keys kept and non-ASCII characters unescaped.

    Jinja's own filter sorts the keys and escapes characters for HTML.
    """
    if indent is not None and not 0 <= indent <= 16:
        raise LimitExceeded("'tojson' indents by at most 16")
    charge_value(value)
    if indent is None:
        made = json.dumps(value, ensure_ascii=False)
        charge_text(len(made))
        return made
    parts: list[str] = []
    for part in json.JSONEncoder(ensure_ascii=False, indent=indent).iterencode(value):
        charge_text(len(part))
        parts.append(part)
    return "".join(parts)


def _escaped(value: Any) -> str:
    text = _text(value)
    charge_text(len(text))
    return str(_JINJA_FILTERS["forceescape"](text))


#: The filters of templates. Not supported: `attr`, `format`, `pprint`, `random`, `urlize`, `xmlattr`.
FILTERS: Mapping[str, Callable[..., Any]] = {
    **{name: _JINJA_FILTERS[name] for name in ("abs", "count", "d", "default", "first", "last", "length")},
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
        _charge_comparison(value, arguments[0] if arguments else None)
        return _JINJA_TESTS[name](value, *arguments)

    return bounded


#: Tests that visit no part of a value.
_CONSTANT_TIME = frozenset(
    {"defined", "undefined", "filter", "test", "none", "boolean", "false", "true", "integer", "float", "string"}
    | {"mapping", "number", "sequence", "iterable", "sameas", "callable"}
)
#: The tests that a template can use with `is`.
TESTS: Mapping[str, Callable[..., Any]] = {
    name: function if name in _CONSTANT_TIME else _test(name) for name, function in _JINJA_TESTS.items()
}
