"""
Conditions, and other expressions in CEL: what decides whether a step runs, what a map goes over, what a run gives.

An expression sees the data that it is given and nothing else: no clock, no files, no network; it changes nothing.
`check` finds at submission what would fail at run time: a name that nothing has, a text compared with a number,
a condition that is none. `evaluate` gives plain JSON, with the order of keys as it was, or fails the step.
An expression is bounded: its length, its work, the texts and the result that it makes. A bare path, such as
`steps.draft.output`, is passed as it is, however large.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from app.kernel.errors import FailureReason, Problem, StepFailure
from app.workflows.expressions import plain
from app.workflows.expressions.cel import tree
from app.workflows.expressions.cel.functions import FUNCTIONS
from app.workflows.expressions.cel.program import SPECIAL, Frame, Part, compiled
from app.workflows.expressions.cel.tree import Call, Constant, Entries, Fault, Field, Items, Loop, Malformed, Name, Node
from app.workflows.expressions.cel.values import KINDS, NAMES, Bound, Budget, NoValue, named, told
from app.workflows.expressions.plain import NotPlain
from app.workflows.expressions.shapes import below, name_problems, roots_of
from app.workflows.expressions.templates import Scope

#: What an expression is asked for. A time is an instant: a timestamp, or a text such as `2026-11-21T09:00:00Z`.
Wanted = Literal["bool", "string", "list", "time", "any"]


def check(expression: str, where: str, scope: Scope, *, wanted: Wanted = "bool") -> list[Problem]:
    """
    What is wrong with an expression: its syntax, a function or name that nothing has, types that do not fit.

    Where `scope.inputs` maps names to JSON Schemas, the types of the inputs are checked too.
    """
    try:
        return _problems(expression, where, scope, wanted)
    except Malformed as error:
        return [_problem(where, expression, fault, _SYNTAX) for fault in error.faults]
    except RecursionError:
        return [Problem(where, "the expression is nested too deep", "fewer brackets in one another")]


def _problems(expression: str, where: str, scope: Scope, wanted: Wanted) -> list[Problem]:
    """As `check`. Raises Malformed."""
    node = tree.parse(expression)
    references = list(_references(node))
    paths = [reference.path for reference in references]
    problems = [*_function_problems(node, where, expression), *name_problems(paths, where, scope)]
    if problems:
        return problems
    try:
        checked = tree.environment(_declared(references, scope)).compile(expression)
    except (RuntimeError, ValueError) as error:
        return [_problem(where, expression, fault, _TYPES) for fault in tree.faults(str(error))]
    return _result_problems(checked.return_type().name(), where, wanted)


def evaluate(expression: str, data: Mapping[str, Any], *, wanted: Wanted = "any") -> Any:
    """
    The value of an expression over `inputs`, `steps` and what else `data` holds: plain JSON, which shares its parts
    with the data; an aware datetime where a time is wanted.

    Raises StepFailure with the reason `template_error` when a name is not there, an operation fails, a bound is met,
    or the value is not what is wanted.
    """
    try:
        program, is_path = _program(expression)
        work = Budget()
        value = program(Frame(dict(data), work))
        if wanted == "time":
            return _instant(value)
        if wanted != "any" and told(value) != wanted:
            raise _unwanted(value, wanted)
        if not (is_path and type(value) in (str, dict, list)):
            plain.require(value, work.spend)
    except (Malformed, NoValue, Bound, NotPlain) as error:
        raise _failure(expression, str(error)) from error
    except (RecursionError, MemoryError) as error:
        raise _failure(expression, "it is nested too deep, or too large") from error
    except (ArithmeticError, TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        # What neither the functions nor the library foresee: a failure of the step, never of its worker.
        raise _failure(expression, f"{type(error).__name__}: {str(error)[:200]}") from error
    return value


def evaluate_bool(expression: str, data: Mapping[str, Any]) -> bool:
    """Whether a condition holds. Raises StepFailure as `evaluate` does."""
    return bool(evaluate(expression, data, wanted="bool"))


@lru_cache(maxsize=1024)
def _program(expression: str) -> tuple[Part, bool]:
    """The program, and whether the expression is a bare path."""
    node = tree.parse(expression)
    return compiled(node), _path(node) is not None


def _unwanted(value: Any, wanted: Wanted) -> NoValue:
    return NoValue(f"it gives {named(value)} where {_WANTED[wanted]} is wanted")


def _instant(value: Any) -> datetime:
    if type(value) is str:
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise NoValue(f"it gives {value[:100]!r}, which is no instant such as '2026-11-21T09:00:00Z'") from None
    if type(value) is not datetime:
        raise _unwanted(value, "time")
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def _failure(expression: str, reason: str) -> StepFailure:
    return StepFailure(FailureReason.TEMPLATE_ERROR, unworkable(expression, reason))


def unworkable(expression: str, reason: str) -> str:
    """The message of an expression that has no value."""
    shown = expression if len(expression) <= 200 else f"{expression[:199]}…"
    return f"the expression `{shown}` cannot be worked out: {reason}"


_INSTEAD = "write string(…) for a timestamp or duration, and .orValue(…) after an optional"
_SYNTAX = "CEL: == != < && || ! ?: in, texts in quotes, has(x.y), list.filter(i, …)"
_TYPES = "values of one type; int(…), double(…) and string(…) convert"


def _problem(where: str, expression: str, fault: Fault, accepted: str) -> Problem:
    line = f"line {fault.line}, " if "\n" in expression else ""
    return Problem(where, f"{line}character {fault.character} of the expression: {fault.message}", accepted)


def _result_problems(type_name: str, where: str, wanted: Wanted) -> list[Problem]:
    kind = type_name.partition("<")[0].lower()
    if wanted == "any":
        if not _NO_JSON.search(type_name):
            return []
        return [Problem(where, f"the expression gives {NAMES.get(kind, kind)}, which is no JSON", _INSTEAD)]
    if kind in ("dyn", wanted) or (wanted == "time" and kind in ("timestamp", "string")):
        return []
    message = f"the expression gives {NAMES.get(kind, kind)} where {_WANTED[wanted]} is wanted"
    return [Problem(where, message, _EXAMPLES[wanted])]


_WANTED: Mapping[Wanted, str] = {
    "bool": "true or false",
    "string": "a text",
    "list": "a list",
    "time": "an instant",
    "any": "a value",
}
_EXAMPLES: Mapping[Wanted, str] = {
    "bool": "a condition, such as inputs.score > 3",
    "string": "a text, such as string(inputs.id)",
    "list": "a list, such as inputs.items or steps.a.output.filter(i, i.ok)",
    "time": "an instant, such as timestamp(inputs.begin) + duration('1h')",
}
#: Types of results that cannot be written as JSON.
_NO_JSON = re.compile(r"TIMESTAMP|DURATION|TYPE<|TYPE$|optional_type|MAP<(?!STRING|DYN)")

#: How macros are written: what is written otherwise looks like a function that is not there.
_MACROS: Mapping[str, str] = {
    "has": "has(inputs.x)",
    **{name: f"list.{name}(x, condition)" for name in ("all", "exists", "exists_one", "filter")},
    "map": "list.map(x, value) or list.map(x, condition, value)",
    **{name: f"optional.{name}(x, value)" for name in ("optMap", "optFlatMap")},
}


def _function_problems(node: Node, where: str, expression: str) -> Iterator[Problem]:
    for part in _parts(node):
        if isinstance(part, Call) and part.function not in FUNCTIONS and part.function not in SPECIAL:
            fault = Fault(f"there is no function {part.function!r}", *tree.place(expression, part.at))
            names = [name for name in FUNCTIONS if name.isalpha()]
            close = difflib.get_close_matches(part.function, [*names, *_MACROS], n=1)
            accepted = _MACROS.get(part.function) or ", ".join(names) + (
                f"; did you mean {close[0]!r}?" if close else ""
            )
            yield _problem(where, expression, fault, accepted)


class _Reference(NamedTuple):
    """One use of a name that no macro has set, with the fields that are asked of it: `('inputs', 'order', 'id')`."""

    path: tuple[str, ...]
    #: How many parts of the path are written with dots, from the left.
    dotted: int
    #: Whether `has` asks for it.
    tested: bool


def _references(node: Node, bound: frozenset[str] = frozenset()) -> Iterator[_Reference]:
    path = _path(node)
    if path is not None:
        if path[0] not in bound and not (len(path) == 1 and path[0] in KINDS):
            yield _Reference(path, _dotted(node), isinstance(node, Field) and node.tested)
        return
    if isinstance(node, Loop):
        inner = bound | {node.variable, node.accumulator}
        for part, names in ((node.range, bound), (node.start, bound), (node.condition, inner), (node.step, inner)):
            yield from _references(part, names)
        yield from _references(node.result, inner)
        return
    for child in _children(node):
        yield from _references(child, bound)


def _path(node: Node) -> tuple[str, ...] | None:
    """The names along a bare path; None for any other expression."""
    match node:
        case Name(name=name):
            return (name,)
        case Field(operand=operand, name=name):
            above = _path(operand)
        case Call(function="_[_]" | "_?._" | "_[?_]", arguments=(operand, Constant(value=str(name)))):
            above = _path(operand)
        case _:
            return None
    return None if above is None else (*above, name)


def _dotted(node: Node) -> int:
    """How many parts of a bare path are written with dots, from the left."""
    dots = []
    while isinstance(node, Field | Call):
        dots.append(isinstance(node, Field))
        node = node.operand if isinstance(node, Field) else node.arguments[0]
    return 1 + sum(1 for _ in takewhile(bool, reversed(dots)))


def _parts(node: Node) -> Iterator[Node]:
    yield node
    for child in _children(node):
        yield from _parts(child)


def _children(node: Node) -> tuple[Node, ...]:
    match node:
        case Field(operand=operand):
            return (operand,)
        case Call(arguments=arguments):
            return arguments
        case Items(elements=elements):
            return elements
        case Entries(entries=entries):
            return tuple(part for entry in entries for part in (entry.key, entry.value))
        case Loop():
            return (node.range, node.start, node.condition, node.step, node.result)
    return ()


def _declared(references: list[_Reference], scope: Scope) -> frozenset[tuple[str, str]]:
    """
    The names that the type checker is told of: the roots, and what is known of the fields that are asked for.

    A field has a type by being declared as a name with dots. The checker would take `has(a.b)` for such a name, so
    what `has` asks for stays of any type.
    """
    roots = roots_of(scope)
    declared = {root: shape.type for root, shape in roots.items()}
    tested = {".".join(reference.path) for reference in references if reference.tested}
    for reference in references:
        shape = roots[reference.path[0]]
        for i in range(1, reference.dotted):
            found = below(reference.path[:i], reference.path[i], shape, scope)
            assert found is not None, "the names were checked before"
            shape = found
            name = ".".join(reference.path[: i + 1])
            if shape.type != "dyn" and name not in tested:
                declared[name] = shape.type
    return frozenset(declared.items())
