"""
CEL expressions of a workflow: the conditions of steps, the list of a map, the outputs of a run.

An expression reads only the data that is passed in: no clock, no files, no network. It has no side effects.
`check` finds at submission what would fail at run time: an unknown name, a string compared with a number, a condition
that is not boolean.
`evaluate` returns plain JSON, with the order of keys kept, or fails the step.
Limits apply to an expression's length, its work, the strings that it creates and its result. A bare path, such as
`steps.draft.output`, returns the value itself, whatever its size.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

from app.kernel.errors import FailureReason, Problem, StepFailure
from app.workflows.expressions import plain
from app.workflows.expressions.cel import tree
from app.workflows.expressions.cel.functions import FUNCTIONS
from app.workflows.expressions.cel.program import SPECIAL, Evaluator, Frame, compile_node
from app.workflows.expressions.cel.signatures import SIGNATURES
from app.workflows.expressions.cel.tree import (
    Call,
    Comprehension,
    Constant,
    Fault,
    Identifier,
    ListLiteral,
    Malformed,
    MapLiteral,
    Node,
    Select,
)
from app.workflows.expressions.cel.values import (
    TYPE_DESCRIPTIONS,
    TYPE_VALUES,
    Budget,
    BudgetExceeded,
    EvaluationError,
    describe_type,
    type_name,
)
from app.workflows.expressions.plain import NotPlain
from app.workflows.expressions.result_type import ResultType
from app.workflows.expressions.shapes import field_shape, name_problems, roots_of
from app.workflows.expressions.templates import Scope


def check(expression: str, where: str, scope: Scope, *, result_type: ResultType = "bool") -> list[Problem]:
    """
    Return the problems of an expression: syntax errors, unknown functions, unknown names, mismatched types.

    The types of the inputs are checked too where `scope.inputs` maps names to JSON Schemas.
    """
    try:
        return _problems(expression, where, scope, result_type)
    except Malformed as error:
        return [_problem(where, expression, fault, _SYNTAX) for fault in error.faults]
    except RecursionError:
        return [Problem(where, "the expression is nested too deep", "fewer nested brackets")]


def paths(expression: str) -> set[tuple[str, ...]]:
    """Return the paths of free names in an expression that was checked: `('inputs', 'order', 'id')`."""
    return {reference.path for reference in _references(tree.parse(expression))}


def _problems(expression: str, where: str, scope: Scope, result_type: ResultType) -> list[Problem]:
    """As `check`. Raises Malformed."""
    node = tree.parse(expression)
    references = list(_references(node))
    paths = [reference.path for reference in references]
    problems = [*_function_problems(node, where, expression), *name_problems(paths, where, scope)]
    if problems:
        return problems
    declared = _declared(references, scope)
    # The library does not know the macro sortBy: its variables are declared as if they were names of the data.
    bound = _sorted_variables(node) - {name for name, _ in declared}
    try:
        checked = tree.environment(declared | {(name, "dyn") for name in bound}).compile(expression)
    except (RuntimeError, ValueError) as error:
        return [_problem(where, expression, fault, _TYPES) for fault in tree.faults(str(error))]
    return _result_problems(checked.return_type().name(), where, result_type)


def evaluate(expression: str, data: Mapping[str, Any], *, result_type: ResultType = "any") -> Any:
    """
    Return the value of an expression over the names in `data` (`inputs`, `steps` and others).

    The value is plain JSON that shares its parts with `data`, or an aware datetime for the result type `time`.
    Raises StepFailure with the reason `template_error` when a name is missing, an operation fails, a limit is exceeded,
    or the value has another type than `result_type`.
    """
    try:
        program, is_path = _program(expression)
        budget = Budget()
        value = program(Frame(dict(data), budget))
        if result_type == "time":
            return _instant(value)
        if result_type != "any" and type_name(value) != result_type:
            raise _wrong_result(value, result_type)
        if not (is_path and type(value) in (str, dict, list)):
            plain.require(value, budget.spend)
    except (Malformed, EvaluationError, BudgetExceeded, NotPlain) as error:
        raise _failure(expression, str(error)) from error
    except (RecursionError, MemoryError) as error:
        raise _failure(expression, "it is nested too deep or is too large") from error
    except (ArithmeticError, TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        # An error that neither the functions nor the library translate must fail the step, never its worker.
        raise _failure(expression, f"{type(error).__name__}: {str(error)[:200]}") from error
    return value


def evaluate_bool(expression: str, data: Mapping[str, Any]) -> bool:
    """Return the value of a condition. Raises StepFailure as `evaluate` does."""
    return bool(evaluate(expression, data, result_type="bool"))


@lru_cache(maxsize=1024)
def _program(expression: str) -> tuple[Evaluator, bool]:
    """Return the compiled expression, and whether it is a bare path."""
    node = tree.parse(expression)
    return compile_node(node), _path(node) is not None


def _wrong_result(value: Any, result_type: ResultType) -> EvaluationError:
    return EvaluationError(f"it returns {describe_type(value)}, expected {_RESULT_DESCRIPTIONS[result_type]}")


def _instant(value: Any) -> datetime:
    if type(value) is str:
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise EvaluationError(
                f"it returns {value[:100]!r}, expected an instant such as '2026-11-21T09:00:00Z'"
            ) from None
    if type(value) is not datetime:
        raise _wrong_result(value, "time")
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def _failure(expression: str, reason: str) -> StepFailure:
    return StepFailure(FailureReason.TEMPLATE_ERROR, failure_message(expression, reason))


def failure_message(expression: str, reason: str) -> str:
    """Return the message of a step failure for an expression that cannot be evaluated."""
    shown = expression if len(expression) <= 200 else f"{expression[:199]}…"
    return f"the expression `{shown}` cannot be evaluated: {reason}"


_CONVERSIONS_TO_JSON = "write string(…) for a timestamp or duration, and .orValue(…) after an optional"
_SYNTAX = "CEL: == != < && || ! ?: in, strings in quotes, has(x.y), list.filter(i, …)"
_TYPES = "values of one type; int(…), double(…) and string(…) convert"


def _problem(where: str, expression: str, fault: Fault, accepted: str) -> Problem:
    line = f"line {fault.line}, " if "\n" in expression else ""
    return Problem(where, f"{line}character {fault.character} of the expression: {fault.message}", accepted)


def _result_problems(type_name: str, where: str, result_type: ResultType) -> list[Problem]:
    kind = type_name.partition("<")[0].lower()
    if result_type == "any":
        if not _NO_JSON.search(type_name):
            return []
        message = f"the expression returns {TYPE_DESCRIPTIONS.get(kind, kind)}, which JSON cannot represent"
        return [Problem(where, message, _CONVERSIONS_TO_JSON)]
    if kind in ("dyn", result_type) or (result_type == "time" and kind in ("timestamp", "string")):
        return []
    message = (
        f"the expression returns {TYPE_DESCRIPTIONS.get(kind, kind)}, expected {_RESULT_DESCRIPTIONS[result_type]}"
    )
    return [Problem(where, message, _EXAMPLES[result_type])]


_RESULT_DESCRIPTIONS: Mapping[ResultType, str] = {
    "bool": "true or false",
    "string": "a string",
    "list": "a list",
    "time": "an instant",
    "any": "a value",
}
_EXAMPLES: Mapping[ResultType, str] = {
    "bool": "a condition, such as inputs.score > 3",
    "string": "a string, such as string(inputs.id)",
    "list": "a list, such as inputs.items or steps.a.output.filter(i, i.ok)",
    "time": "an instant, such as timestamp(inputs.begin) + duration('1h')",
}
#: Matches the names of result types that have no JSON form.
_NO_JSON = re.compile(r"TIMESTAMP|DURATION|TYPE<|TYPE$|optional_type|MAP<(?!STRING|DYN)")

#: The correct form of each macro. The parser reads any other form as a call of an unknown function.
_MACROS: Mapping[str, str] = {
    "has": "has(inputs.x)",
    **{name: f"list.{name}(x, condition)" for name in ("all", "exists", "exists_one", "filter")},
    "sortBy": "list.sortBy(x, key)",
    "map": "list.map(x, value) or list.map(x, condition, value)",
    **{name: f"optional.{name}(x, value)" for name in ("optMap", "optFlatMap")},
}


def _function_problems(node: Node, where: str, expression: str) -> Iterator[Problem]:
    for part in _parts(node):
        if isinstance(part, Call) and part.function not in FUNCTIONS and part.function not in SPECIAL:
            fault = Fault(f"there is no function {part.function!r}", *tree.position(expression, part.offset))
            names = [name for name in FUNCTIONS if name.isalpha()]
            close = difflib.get_close_matches(part.function, [*names, *_MACROS], n=1)
            accepted = _MACROS.get(part.function) or ", ".join(names) + (
                f"; did you mean {close[0]!r}?" if close else ""
            )
            yield _problem(where, expression, fault, accepted)
        elif isinstance(part, Call) and (known := SIGNATURES.get(part.function)):
            given = len(part.arguments)
            if not known.accepts(given):
                fault = Fault(
                    f"{part.function!r} does not take {given} argument{'s' if given != 1 else ''}",
                    *tree.position(expression, part.offset),
                )
                yield _problem(where, expression, fault, " or ".join(known.forms))


def _sorted_variables(node: Node) -> set[str]:
    """Return the names of the variables of all `list.sortBy(x, key)`."""
    return {
        pairs.variable
        for part in _parts(node)
        if isinstance(part, Call) and part.function == tree.SORTED_PAIRS
        for pairs in part.arguments
        if isinstance(pairs, Comprehension)
    }


class _Reference(NamedTuple):
    """One use of a free variable with the fields selected from it: `('inputs', 'order', 'id')`."""

    path: tuple[str, ...]
    #: The number of leading parts of the path that are written with dots.
    dotted: int
    #: Whether the reference is the argument of `has`.
    test_only: bool


def _references(node: Node, bound: frozenset[str] = frozenset()) -> Iterator[_Reference]:
    path = _path(node)
    if path is not None:
        if path[0] not in bound and not (len(path) == 1 and path[0] in TYPE_VALUES):
            yield _Reference(path, _dotted(node), isinstance(node, Select) and node.test_only)
        return
    if isinstance(node, Comprehension):
        inner = bound | {node.variable, node.accumulator}
        for part, names in ((node.range, bound), (node.start, bound), (node.condition, inner), (node.step, inner)):
            yield from _references(part, names)
        yield from _references(node.result, inner)
        return
    for child in _children(node):
        yield from _references(child, bound)


def _path(node: Node) -> tuple[str, ...] | None:
    """Return the names along a bare path; None for any other expression."""
    match node:
        case Identifier(name=name):
            return (name,)
        case Select(operand=operand, name=name):
            above = _path(operand)
        case Call(function="_[_]" | "_?._" | "_[?_]", arguments=(operand, Constant(value=str(name)))):
            above = _path(operand)
        case _:
            return None
    return None if above is None else (*above, name)


def _dotted(node: Node) -> int:
    """Return the number of leading parts of a bare path that are written with dots."""
    dots = []
    while isinstance(node, Select | Call):
        dots.append(isinstance(node, Select))
        node = node.operand if isinstance(node, Select) else node.arguments[0]
    return 1 + sum(1 for _ in takewhile(bool, reversed(dots)))


def _parts(node: Node) -> Iterator[Node]:
    yield node
    for child in _children(node):
        yield from _parts(child)


def _children(node: Node) -> tuple[Node, ...]:
    match node:
        case Select(operand=operand):
            return (operand,)
        case Call(arguments=arguments):
            return arguments
        case ListLiteral(elements=elements):
            return elements
        case MapLiteral(entries=entries):
            return tuple(part for entry in entries for part in (entry.key, entry.value))
        case Comprehension():
            return (node.range, node.start, node.condition, node.step, node.result)
    return ()


def _declared(references: list[_Reference], scope: Scope) -> frozenset[tuple[str, str]]:
    """
    Return the variable declarations for the type checker: the roots, and the referenced fields whose type is known.

    A field gets a type by a declaration of its dotted name. The checker would read `has(a.b)` as that dotted name, so
    a field that is the argument of `has` is not declared and stays dynamic.
    """
    roots = roots_of(scope)
    declared = {root: shape.type for root, shape in roots.items()}
    test_only = {".".join(reference.path) for reference in references if reference.test_only}
    for reference in references:
        shape = roots[reference.path[0]]
        for i in range(1, reference.dotted):
            found = field_shape(reference.path[:i], reference.path[i], shape, scope)
            assert found is not None, "the names were checked before"
            shape = found
            name = ".".join(reference.path[: i + 1])
            if shape.type != "dyn" and name not in test_only:
                declared[name] = shape.type
    return frozenset(declared.items())
