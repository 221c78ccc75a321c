"""
Transforms: the value of one CEL or JMESPath expression over `inputs` and `steps`.

CEL is typed and fails on a missing name. JMESPath is shorter, sorts and sums, and returns null for a missing name.
Both are checked at submission, both have the same limits, and both return plain JSON.
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
from app.workflows.expressions.cel.values import MAX_TEXT, Budget, BudgetExceeded
from app.workflows.expressions.plain import NotPlain
from app.workflows.expressions.shapes import name_problems
from app.workflows.expressions.templates import Scope

#: Maximum nesting of a JMESPath expression; each name of a path counts as one level.
MAX_DEPTH = 150


def check_jmespath(expression: str, where: str, scope: Scope) -> list[Problem]:
    """Return the problems of a JMESPath expression: syntax errors, unknown functions, unknown names."""
    try:
        node = _parsed(expression)
        return [*_function_problems(node, where), *name_problems(_paths(node), where, scope)]
    except _Malformed as error:
        return [Problem(where, str(error), "JMESPath, see jmespath.org")]
    except RecursionError:
        return [Problem(where, "the expression is nested too deep", "fewer brackets, or a shorter path")]


def evaluate(data: Mapping[str, Any], *, cel: str | None = None, jmespath: str | None = None) -> Any:
    """
    Return the value of an expression in exactly one of the two languages.

    The value is plain JSON of at most `plain.MAX_RESULT` characters and may share its parts with the data.
    Raises StepFailure with the reason `template_error` when the evaluation fails or a limit is exceeded.
    """
    if cel is not None:
        return _bounded(cel, conditions.evaluate(cel, data), Budget())
    assert jmespath is not None, "a transform has either 'cel' or 'jmespath'"
    return _of_jmespath(jmespath, data)


def _of_jmespath(expression: str, data: Mapping[str, Any]) -> Any:
    budget = Budget()
    try:
        result = _Interpreter(budget).visit(_parsed(expression), dict(data))
    except (BudgetExceeded, _Malformed) as error:
        raise _failure(expression, str(error)) from error
    except exceptions.JMESPathTypeError as error:
        accepted = " or ".join(error.expected_types)
        message = f"{error.function_name}() takes {accepted}, not {error.actual_type}"
        raise _failure(expression, message) from error
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise _failure(expression, _first_line(error)) from error
    except (RecursionError, MemoryError) as error:
        raise _failure(expression, "it is nested too deep or is too large") from error
    return _bounded(expression, result, budget)


def _bounded(expression: str, result: Any, budget: Budget) -> Any:
    try:
        plain.require(result, budget.spend)
    except (BudgetExceeded, NotPlain) as error:
        raise _failure(expression, str(error)) from error
    except RecursionError as error:
        raise _failure(expression, "its result is nested too deep") from error
    return result


def _failure(expression: str, reason: str) -> StepFailure:
    return StepFailure(FailureReason.TEMPLATE_ERROR, conditions.failure_message(expression, reason))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class _Malformed(Exception):
    """The text is not valid JMESPath."""


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
        raise _Malformed(f"the expression is nested deeper, or its path is longer, than {MAX_DEPTH}")
    return node


def _depth(node: dict[str, Any]) -> int:
    """Return the number of levels, or the length of the longest path if that is larger."""
    depth, longest, level = 0, 0, [node]
    while level:
        depth += 1
        longest = max(longest, *(len(one["children"]) for one in level if one["type"] == "subexpression"), 0)
        level = [child for one in level for child in _inner(one)]
    return max(depth, longest)


class _Interpreter(TreeInterpreter):  # type: ignore[misc] # the library has no type hints
    """JMESPath's interpreter with a budget: work is charged before it is done."""

    def __init__(self, budget: Budget) -> None:
        super().__init__(Options(custom_functions=_Functions(budget)))
        self._budget = budget

    def visit(self, node: dict[str, Any], *args: Any, **more: Any) -> Any:
        self._budget.spend(1)
        return super().visit(node, *args, **more)

    def visit_flatten(self, node: dict[str, Any], value: Any) -> Any:
        base = self.visit(node["children"][0], value)
        if isinstance(base, list):
            self._budget.spend(sum(len(item) if isinstance(item, list) else 1 for item in base))
        return super().visit_flatten(_with(node, base), value)

    def visit_slice(self, node: dict[str, Any], value: Any) -> Any:
        self._budget.spend(len(value) if isinstance(value, list) else 1)
        return super().visit_slice(node, value)

    def visit_comparator(self, node: dict[str, Any], value: Any) -> Any:
        sides = [self.visit(child, value) for child in node["children"]]
        for side in sides:
            _charge_value(side, self._budget)
        return super().visit_comparator(_with(node, *sides), value)


def _with(node: dict[str, Any], *values: Any) -> dict[str, Any]:
    """Return the node with its children replaced by literals, so that no child is evaluated twice."""
    return {**node, "children": [{"type": "literal", "value": value, "children": []} for value in values]}


class _Functions(Functions):  # type: ignore[misc] # the library has no type hints
    """JMESPath's functions with a budget: the size of the arguments is charged before each call."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def call_function(self, function_name: str, resolved_args: list[Any]) -> Any:
        deep = function_name == "to_string" or (
            function_name == "contains" and any(isinstance(value, list | dict) for value in resolved_args[1:])
        )
        for value in resolved_args:
            if deep:
                _charge_value(value, self._budget)
            else:
                self._budget.spend(len(value) + 1 if isinstance(value, list | dict) else _text_cost(value))
        if function_name == "join":
            self._charge_join(resolved_args)
        return super().call_function(function_name, resolved_args)

    def _charge_join(self, arguments: list[Any]) -> None:
        texts = [text for value in arguments if isinstance(value, list) for text in value if isinstance(text, str)]
        between = max((len(value) for value in arguments if isinstance(value, str)), default=0)
        length = sum(map(len, texts)) + between * len(texts)
        if length > MAX_TEXT:
            raise BudgetExceeded(f"a string is longer than {MAX_TEXT} characters")
        self._budget.spend(length >> 6)


def _charge_value(value: Any, budget: Budget) -> None:
    """Charge one unit for each part of a value, and more for long strings."""
    budget.spend(_text_cost(value))
    for item in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        _charge_value(item, budget)


def _text_cost(value: Any) -> int:
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
    """Return each path that begins at the root: `('steps', 'draft', 'output')`."""
    found: list[tuple[str, ...]] = []

    def visit(node: dict[str, Any], at: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """Return the path of a node's value, when the node is applied to the value at `at`; None when unknown."""
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
