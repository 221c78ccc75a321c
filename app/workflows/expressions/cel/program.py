"""
The compiler of expressions: turns the tree of an expression into nested Python closures.

Values of the data are passed by reference, never copied or converted; the order of keys is kept.
Each iteration of a macro and each created list item or map entry is charged; see `values.Budget`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from app.workflows.expressions.cel.functions import FUNCTIONS
from app.workflows.expressions.cel.tree import (
    Call,
    Comprehension,
    Constant,
    Identifier,
    ListLiteral,
    MapLiteral,
    Node,
    Select,
)
from app.workflows.expressions.cel.values import (
    TYPE_VALUES,
    Budget,
    EvaluationError,
    Optional,
    describe_type,
    index,
    no_overload,
    no_such_key,
)


class Frame:
    """The variables and the budget of an evaluation."""

    __slots__ = ("budget", "names")

    def __init__(self, names: dict[str, Any], budget: Budget) -> None:
        self.names, self.budget = names, budget


#: A compiled node, which computes its value over a frame. Raises EvaluationError and BudgetExceeded.
Evaluator: TypeAlias = Callable[[Frame], Any]


def compile_node(node: Node) -> Evaluator:
    """Return the evaluator of a node."""
    match node:
        case Constant(value=value):
            return lambda _: value
        case Identifier(name=name):
            return _name(name)
        case Select(operand=operand, name=name, test_only=test_only):
            return _has_field(compile_node(operand), name) if test_only else _field(compile_node(operand), name)
        case Call():
            return _call(node)
        case ListLiteral():
            return _items(node)
        case MapLiteral():
            return _entries(node)
        case Comprehension():
            return _loop(node)


class _DeferredError:
    """An error in the place of a value; it is raised when the value is used."""

    __slots__ = ("error",)

    def __init__(self, error: EvaluationError) -> None:
        self.error = error


def _name(name: str) -> Evaluator:
    def run(frame: Frame) -> Any:
        try:
            value = frame.names[name]
        except KeyError:
            if name in TYPE_VALUES:
                return TYPE_VALUES[name]
            raise EvaluationError(f"{name!r} is not defined here") from None
        if type(value) is _DeferredError:
            raise value.error
        return value

    return run


def _field(operand: Evaluator, name: str) -> Evaluator:
    def run(frame: Frame) -> Any:
        value = operand(frame)
        if type(value) is dict or isinstance(value, Mapping):
            try:
                return value[name]
            except KeyError:
                raise no_such_key(name, value) from None
        if type(value) is Optional:
            return _optional_select(value, name)
        raise EvaluationError(f"{describe_type(value)} has no field {name!r}")

    return run


def _has_field(operand: Evaluator, name: str) -> Evaluator:
    def run(frame: Frame) -> bool:
        value = operand(frame)
        if isinstance(value, Mapping):
            return name in value
        if type(value) is Optional:
            return bool(_optional_select(value, name).held)
        raise EvaluationError(f"{describe_type(value)} has no field {name!r}")

    return run


def _optional_select(value: Any, key: Any) -> Optional:
    """Return the value of a key as an optional, which is empty when the key is missing."""
    if type(value) is Optional:
        return _optional_select(value.held[0], key) if value.held else value
    if isinstance(value, Mapping):
        return Optional((value[key],)) if type(key) in (str, int) and key in value else Optional()
    if type(value) is list and type(key) is int:
        return Optional((value[key],)) if 0 <= key < len(value) else Optional()
    raise no_overload("_?._", value, key)


def _call(call: Call) -> Evaluator:
    parts = tuple(compile_node(argument) for argument in call.arguments)
    match call.function, parts:
        case "_&&_", (left, right):
            return _logic("_&&_", left, right, decisive=False)
        case "_||_", (left, right):
            return _logic("_||_", left, right, decisive=True)
        case "_?_:_", (condition, then, otherwise):
            return _choice(condition, then, otherwise)
        case "@not_strictly_false" | "__not_strictly_false__", (inner,):
            return _not_strictly_false(inner)
        case "_?._" | "_[?_]", (operand, key):
            return lambda frame: _optional_select(operand(frame), key(frame))
        case "or" | "orValue", (operand, otherwise):
            return _alternative(call.function, operand, otherwise)
        case "_[_]", (operand, key):
            return _index(operand, key)
    function = FUNCTIONS.get(call.function) or _unknown(call.function)
    match parts:
        case (only,):
            return lambda frame: function(frame.budget, only(frame))
        case (first, second):
            return lambda frame: function(frame.budget, first(frame), second(frame))
    return lambda frame: function(frame.budget, *[part(frame) for part in parts])


#: The functions that `_call` compiles itself, in addition to FUNCTIONS: they do not always evaluate all arguments.
SPECIAL = frozenset(
    {"_&&_", "_||_", "_?_:_", "@not_strictly_false", "__not_strictly_false__", "_?._", "_[?_]", "or", "orValue"}
)


def _unknown(name: str) -> Callable[..., Any]:
    def called(*_: Any) -> Any:
        raise EvaluationError(f"there is no function {name!r} with this number of arguments")

    return called


def _index(operand: Evaluator, key: Evaluator) -> Evaluator:
    def run(frame: Frame) -> Any:
        value, offset = operand(frame), key(frame)
        return _optional_select(value, offset) if type(value) is Optional else index(frame.budget, value, offset)

    return run


def _truth(function: str, value: Any) -> bool:
    if type(value) is bool:
        return value
    raise no_overload(function, value)


def _logic(function: str, left: Evaluator, right: Evaluator, *, decisive: bool) -> Evaluator:
    """Compile `&&` or `||`: the decisive value on either side is the result, even when the other side fails."""

    def run(frame: Frame) -> bool:
        try:
            if _truth(function, left(frame)) is decisive:
                return decisive
        except EvaluationError:
            if _truth(function, right(frame)) is decisive:
                return decisive
            raise
        return _truth(function, right(frame))

    return run


def _choice(condition: Evaluator, then: Evaluator, otherwise: Evaluator) -> Evaluator:
    return lambda frame: then(frame) if _truth("_?_:_", condition(frame)) else otherwise(frame)


def _not_strictly_false(inner: Evaluator) -> Evaluator:
    def run(frame: Frame) -> bool:
        try:
            return inner(frame) is not False
        except EvaluationError:
            return True

    return run


def _alternative(function: str, operand: Evaluator, otherwise: Evaluator) -> Evaluator:
    def run(frame: Frame) -> Any:
        value = operand(frame)
        if type(value) is not Optional:
            raise no_overload(function, value)
        if not value.held:
            return otherwise(frame)
        return value.held[0] if function == "orValue" else value

    return run


def _items(node: ListLiteral) -> Evaluator:
    parts = [(compile_node(element), i in node.optional) for i, element in enumerate(node.elements)]

    def run(frame: Frame) -> list[Any]:
        frame.budget.spend(len(parts))
        made: list[Any] = []
        for part, optional in parts:
            made += _optional_items(part(frame)) if optional else (part(frame),)
        return made

    return run


def _entries(node: MapLiteral) -> Evaluator:
    parts = [(compile_node(entry.key), compile_node(entry.value), entry.optional) for entry in node.entries]

    def run(frame: Frame) -> dict[Any, Any]:
        frame.budget.spend(len(parts))
        made: dict[Any, Any] = {}
        for key_of, value_of, optional in parts:
            key = key_of(frame)
            if type(key) not in (str, int):
                raise EvaluationError(f"{describe_type(key)} cannot be a key: keys are strings or integers")
            if key in made:
                raise EvaluationError(f"duplicate key {key!r}")
            for value in _optional_items(value_of(frame)) if optional else (value_of(frame),):
                made[key] = value
        return made

    return run


def _optional_items(value: Any) -> tuple[Any, ...]:
    if type(value) is Optional:
        return value.held
    raise EvaluationError(f"'?' needs an optional value, not {describe_type(value)}")


def _loop(node: Comprehension) -> Evaluator:
    range_, start = compile_node(node.range), compile_node(node.start)
    condition, result = compile_node(node.condition), compile_node(node.result)
    step = _append_step(node) or _assign_step(node)
    variable, accumulator = node.variable, node.accumulator

    def run(frame: Frame) -> Any:
        of = range_(frame)
        if type(of) is not list and not isinstance(of, Mapping):
            raise EvaluationError(f"{describe_type(of)} cannot be iterated")
        inner = Frame({**frame.names, accumulator: start(frame)}, frame.budget)
        for item in of:
            frame.budget.spend(_ITERATION_COST)
            inner.names[variable] = item
            if condition(inner) is not True:
                break
            step(inner)
        return result(inner)

    return run


#: Units of work of one iteration of a macro.
_ITERATION_COST = 8


def _assign_step(node: Comprehension) -> Evaluator:
    """Compile the step of a comprehension: it assigns the accumulator a new value, or the deferred error."""
    step, accumulator = compile_node(node.step), node.accumulator

    def run(frame: Frame) -> None:
        try:
            frame.names[accumulator] = step(frame)
        except EvaluationError as error:
            frame.names[accumulator] = _DeferredError(error)

    return run


def _append_step(node: Comprehension) -> Evaluator | None:
    """
    Compile the step of `map` and `filter` as an append to the accumulator; return None for any other step.

    Without this, the step would copy the whole list for each item.
    """
    if node.start != ListLiteral(node.start.offset, (), frozenset()):
        return None
    wanted: Evaluator | None = None
    match node.step:
        case Call(function="_?_:_", arguments=(condition, step, Identifier(name=kept))) if kept == node.accumulator:
            wanted = compile_node(condition)
        case step:
            pass
    match step:
        case Call(function="_+_", arguments=(Identifier(name=kept), ListLiteral(elements=(element,)))) if (
            kept == node.accumulator
        ):
            made = compile_node(element)
        case _:
            return None

    def run(frame: Frame) -> None:
        if wanted is None or _truth("_?_:_", wanted(frame)):
            frame.names[node.accumulator].append(made(frame))

    return run
