"""
Transforms: another shape for what there is, by one expression in CEL or JMESPath over `inputs` and `steps`.

CEL knows types and fails where something is missing; JMESPath reaches far with little writing, sorts and sums, and
gives null where something is missing. Both are checked at submission, both are bounded, and both give plain JSON.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from jmespath import exceptions
from jmespath.functions import Functions
from jmespath.parser import Parser
from jmespath.visitor import Options, TreeInterpreter

from app.kernel.errors import FailureReason, Problem, StepFailure
from app.workflows.expressions import conditions, plain
from app.workflows.expressions.cel.tree import MAX_LENGTH
from app.workflows.expressions.cel.values import MAX_TEXT, Bound, Budget
from app.workflows.expressions.plain import NotPlain
from app.workflows.expressions.shapes import name_problems
from app.workflows.expressions.templates import Scope

#: Levels of an expression in JMESPath; each name of a path is one.
MAX_DEPTH = 150


def check_jmespath(expression: str, where: str, scope: Scope) -> list[Problem]:
    """What is wrong with an expression in JMESPath: its syntax, a function or name that nothing has."""
    try:
        node = _parsed(expression)
        return [*_function_problems(node, where), *name_problems(_paths(node), where, scope)]
    except _Malformed as error:
        return [Problem(where, str(error), "JMESPath, as on jmespath.org")]
    except RecursionError:
        return [Problem(where, "the expression is nested too deep", "fewer brackets, or a shorter path")]


def evaluate(data: Mapping[str, Any], *, cel: str | None = None, jmespath: str | None = None) -> Any:
    """
    The value of an expression in one of the two languages: plain JSON, at most `plain.MAX_RESULT` characters
    of it, which may share its parts with the data.

    Raises StepFailure with the reason `template_error` when there is no such value, or a bound is met.
    """
    if cel is not None:
        return _bounded(cel, conditions.evaluate(cel, data), Budget())
    assert jmespath is not None, "a transform has one of the two"
    return _of_jmespath(jmespath, data)


def _of_jmespath(expression: str, data: Mapping[str, Any]) -> Any:
    work = Budget()
    try:
        result = _Interpreter(work).visit(_parsed(expression), dict(data))
    except (Bound, _Malformed) as error:
        raise _failure(expression, str(error)) from error
    except exceptions.JMESPathTypeError as error:
        accepted = " or ".join(error.expected_types)
        message = f"{error.function_name}() takes {accepted}, not {error.actual_type}"
        raise _failure(expression, message) from error
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise _failure(expression, _first_line(error)) from error
    except (RecursionError, MemoryError) as error:
        raise _failure(expression, "it is nested too deep, or too large") from error
    return _bounded(expression, result, work)


def _bounded(expression: str, result: Any, work: Budget) -> Any:
    try:
        plain.require(result, work.spend)
    except (Bound, NotPlain) as error:
        raise _failure(expression, str(error)) from error
    except RecursionError as error:
        raise _failure(expression, "its result is nested too deep") from error
    return result


def _failure(expression: str, reason: str) -> StepFailure:
    return StepFailure(FailureReason.TEMPLATE_ERROR, conditions.unworkable(expression, reason))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class _Malformed(Exception):
    """The text is no JMESPath."""


@lru_cache(maxsize=512)
def _parsed(expression: str) -> dict[str, Any]:
    if len(expression) > MAX_LENGTH:
        raise _Malformed(f"the expression is longer than {MAX_LENGTH} characters")
    try:
        node: dict[str, Any] = Parser().parse(expression).parsed
    except (exceptions.EmptyExpressionError, exceptions.IncompleteExpressionError):
        raise _Malformed("the expression ends too early") from None
    except exceptions.LexerError as error:
        message = f"{error.lexer_value!r} is not expected here"
        raise _Malformed(f"character {error.lexer_position + 1} of the expression: {message}") from None
    except exceptions.ParseError as error:
        message = f"{error.token_value!r} is not expected here"
        raise _Malformed(f"character {error.lex_position + 1} of the expression: {message}") from None
    except ValueError as error:
        raise _Malformed(_first_line(error)) from None
    except RecursionError:
        raise _Malformed("the expression is nested too deep") from None
    if _depth(node) > MAX_DEPTH:
        raise _Malformed(f"the expression is nested, or its path is longer, than {MAX_DEPTH}")
    return node


def _depth(node: dict[str, Any]) -> int:
    """The levels, or the names of the longest path if these are more."""
    depth, longest, level = 0, 0, [node]
    while level:
        depth += 1
        longest = max(longest, *(len(one["children"]) for one in level if one["type"] == "subexpression"), 0)
        level = [child for one in level for child in _inner(one)]
    return max(depth, longest)


class _Interpreter(TreeInterpreter):  # type: ignore[misc] # the library has no type hints
    """JMESPath's own interpreter; all work is counted before it is done."""

    def __init__(self, work: Budget) -> None:
        super().__init__(Options(custom_functions=_Functions(work)))
        self._work = work

    def visit(self, node: dict[str, Any], *args: Any, **more: Any) -> Any:
        self._work.spend(1)
        return super().visit(node, *args, **more)

    def visit_flatten(self, node: dict[str, Any], value: Any) -> Any:
        base = self.visit(node["children"][0], value)
        if isinstance(base, list):
            self._work.spend(sum(len(item) if isinstance(item, list) else 1 for item in base))
        return super().visit_flatten(_with(node, base), value)

    def visit_slice(self, node: dict[str, Any], value: Any) -> Any:
        self._work.spend(len(value) if isinstance(value, list) else 1)
        return super().visit_slice(node, value)

    def visit_comparator(self, node: dict[str, Any], value: Any) -> Any:
        sides = [self.visit(child, value) for child in node["children"]]
        for side in sides:
            _weigh(side, self._work)
        return super().visit_comparator(_with(node, *sides), value)


def _with(node: dict[str, Any], *values: Any) -> dict[str, Any]:
    """The node over values that are known, so that nothing is visited twice."""
    return {**node, "children": [{"type": "literal", "value": value, "children": []} for value in values]}


class _Functions(Functions):  # type: ignore[misc] # the library has no type hints
    """JMESPath's own functions; what they go through is counted before they do."""

    def __init__(self, work: Budget) -> None:
        self._work = work

    def call_function(self, function_name: str, resolved_args: list[Any]) -> Any:
        deep = function_name == "to_string" or (
            function_name == "contains" and any(isinstance(value, list | dict) for value in resolved_args[1:])
        )
        for value in resolved_args:
            if deep:
                _weigh(value, self._work)
            else:
                self._work.spend(len(value) + 1 if isinstance(value, list | dict) else _of_text(value))
        if function_name == "join":
            self._require_room(resolved_args)
        return super().call_function(function_name, resolved_args)

    def _require_room(self, arguments: list[Any]) -> None:
        texts = [text for value in arguments if isinstance(value, list) for text in value if isinstance(text, str)]
        between = max((len(value) for value in arguments if isinstance(value, str)), default=0)
        length = sum(map(len, texts)) + between * len(texts)
        if length > MAX_TEXT:
            raise Bound(f"a text is longer than {MAX_TEXT} characters")
        self._work.spend(length >> 6)


def _weigh(value: Any, work: Budget) -> None:
    """Count all parts of a value."""
    work.spend(_of_text(value))
    for item in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        _weigh(item, work)


def _of_text(value: Any) -> int:
    return (len(value) >> 6) + 1 if isinstance(value, str) else 1


def _function_problems(node: dict[str, Any], where: str) -> Iterator[Problem]:
    if node["type"] == "function_expression":
        name, given = node["value"], len(node["children"])
        known = Functions.FUNCTION_TABLE
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            yield Problem(where, f"there is no function {name!r}", ", ".join(sorted(known)) + hint)
        else:
            signature = known[name]["signature"]
            least, many = len(signature), bool(signature and signature[-1].get("variadic"))
            if given < least or (given > least and not many):
                accepted = f"{least}{' or more' if many else ''}"
                yield Problem(where, f"{name}() has {given} arguments", accepted)
    for child in _inner(node):
        yield from _function_problems(child, where)


def _inner(node: dict[str, Any]) -> Iterable[dict[str, Any]]:
    return (child for child in node.get("children", ()) if isinstance(child, dict))


def _paths(node: dict[str, Any]) -> list[tuple[str, ...]]:
    """Each path that begins at the root: `('steps', 'draft', 'output')`."""
    found: list[tuple[str, ...]] = []

    def visit(node: dict[str, Any], at: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """Where the value of a node stands that sees what stands at `at`; None where nobody can know."""
        match node["type"]:
            case "field" if at is not None:
                found.append((*at, node["value"]))
                return found[-1]
            case "subexpression" | "pipe":
                for child in _inner(node):
                    at = visit(child, at)
                return at
            case "index_expression" | "projection" | "value_projection" | "filter_projection":
                first, *others = _inner(node)
                visit(first, at)
                for child in others:
                    visit(child, None)
            case "identity" | "current":
                return at
            case "expref":
                pass
            case _:
                for child in _inner(node):
                    visit(child, at)
        return None

    visit(node, ())
    beginnings = {path[:i] for path in found for i in range(len(path))}
    return [path for path in dict.fromkeys(found) if path not in beginnings]
