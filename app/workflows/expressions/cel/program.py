"""
The program of an expression: its tree, turned into functions of Python that are called one inside the other.

Values of the data are passed as they are, never copied or converted; the order of keys stays.
Every item that a macro turns to, every element and entry that is made is counted; see `values.Work`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from app.workflows.expressions.cel.functions import FUNCTIONS
from app.workflows.expressions.cel.tree import Call, Constant, Entries, Field, Items, Loop, Name, Node
from app.workflows.expressions.cel.values import KINDS, Budget, NoValue, Optional, index, missing, named, refused


class Frame:
    """The names that a part of an expression sees."""

    __slots__ = ("names", "work")

    def __init__(self, names: dict[str, Any], work: Budget) -> None:
        self.names, self.work = names, work


#: A part of an expression over a frame. Raises NoValue and Bound.
Part: TypeAlias = Callable[[Frame], Any]


def compiled(node: Node) -> Part:
    """The program of a tree."""
    match node:
        case Constant(value=value):
            return lambda _: value
        case Name(name=name):
            return _name(name)
        case Field(operand=operand, name=name, tested=tested):
            return _tested(compiled(operand), name) if tested else _field(compiled(operand), name)
        case Call():
            return _call(node)
        case Items():
            return _items(node)
        case Entries():
            return _entries(node)
        case Loop():
            return _loop(node)


class _Failed:
    """Stands for a value that could not be had, until something asks for it."""

    __slots__ = ("error",)

    def __init__(self, error: NoValue) -> None:
        self.error = error


def _name(name: str) -> Part:
    def run(frame: Frame) -> Any:
        try:
            value = frame.names[name]
        except KeyError:
            if name in KINDS:
                return KINDS[name]
            raise NoValue(f"there is no {name!r} here") from None
        if type(value) is _Failed:
            raise value.error
        return value

    return run


def _field(operand: Part, name: str) -> Part:
    def run(frame: Frame) -> Any:
        value = operand(frame)
        if type(value) is dict or isinstance(value, Mapping):
            try:
                return value[name]
            except KeyError:
                raise missing(name, value) from None
        if type(value) is Optional:
            return _chosen(value, name)
        raise NoValue(f"{named(value)} has no field {name!r}")

    return run


def _tested(operand: Part, name: str) -> Part:
    def run(frame: Frame) -> bool:
        value = operand(frame)
        if isinstance(value, Mapping):
            return name in value
        if type(value) is Optional:
            return bool(_chosen(value, name).held)
        raise NoValue(f"{named(value)} has no field {name!r}")

    return run


def _chosen(value: Any, key: Any) -> Optional:
    """The value under a key, if there is one."""
    if type(value) is Optional:
        return _chosen(value.held[0], key) if value.held else value
    if isinstance(value, Mapping):
        return Optional((value[key],)) if type(key) in (str, int) and key in value else Optional()
    if type(value) is list and type(key) is int:
        return Optional((value[key],)) if 0 <= key < len(value) else Optional()
    raise refused("_?._", value, key)


def _call(call: Call) -> Part:
    parts = tuple(compiled(argument) for argument in call.arguments)
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
            return lambda frame: _chosen(operand(frame), key(frame))
        case "or" | "orValue", (operand, otherwise):
            return _alternative(call.function, operand, otherwise)
        case "_[_]", (operand, key):
            return _index(operand, key)
    function = FUNCTIONS.get(call.function) or _unknown(call.function)
    match parts:
        case (only,):
            return lambda frame: function(frame.work, only(frame))
        case (first, second):
            return lambda frame: function(frame.work, first(frame), second(frame))
    return lambda frame: function(frame.work, *[part(frame) for part in parts])


#: What `_call` makes itself, beside FUNCTIONS: what does not always ask for all of its arguments.
SPECIAL = frozenset(
    {"_&&_", "_||_", "_?_:_", "@not_strictly_false", "__not_strictly_false__", "_?._", "_[?_]", "or", "orValue"}
)


def _unknown(name: str) -> Callable[..., Any]:
    def called(*_: Any) -> Any:
        raise NoValue(f"there is no function {name!r} of so many arguments")

    return called


def _index(operand: Part, key: Part) -> Part:
    def run(frame: Frame) -> Any:
        value, at = operand(frame), key(frame)
        return _chosen(value, at) if type(value) is Optional else index(frame.work, value, at)

    return run


def _truth(function: str, value: Any) -> bool:
    if type(value) is bool:
        return value
    raise refused(function, value)


def _logic(function: str, left: Part, right: Part, *, decisive: bool) -> Part:
    """`&&` and `||`: the decisive value on either side decides, whatever the other side fails of."""

    def run(frame: Frame) -> bool:
        try:
            if _truth(function, left(frame)) is decisive:
                return decisive
        except NoValue:
            if _truth(function, right(frame)) is decisive:
                return decisive
            raise
        return _truth(function, right(frame))

    return run


def _choice(condition: Part, then: Part, otherwise: Part) -> Part:
    return lambda frame: then(frame) if _truth("_?_:_", condition(frame)) else otherwise(frame)


def _not_strictly_false(inner: Part) -> Part:
    def run(frame: Frame) -> bool:
        try:
            return inner(frame) is not False
        except NoValue:
            return True

    return run


def _alternative(function: str, operand: Part, otherwise: Part) -> Part:
    def run(frame: Frame) -> Any:
        value = operand(frame)
        if type(value) is not Optional:
            raise refused(function, value)
        if not value.held:
            return otherwise(frame)
        return value.held[0] if function == "orValue" else value

    return run


def _items(node: Items) -> Part:
    parts = [(compiled(element), i in node.optional) for i, element in enumerate(node.elements)]

    def run(frame: Frame) -> list[Any]:
        frame.work.spend(len(parts))
        made: list[Any] = []
        for part, optional in parts:
            made += _held(part(frame)) if optional else (part(frame),)
        return made

    return run


def _entries(node: Entries) -> Part:
    parts = [(compiled(entry.key), compiled(entry.value), entry.optional) for entry in node.entries]

    def run(frame: Frame) -> dict[Any, Any]:
        frame.work.spend(len(parts))
        made: dict[Any, Any] = {}
        for key_of, value_of, optional in parts:
            key = key_of(frame)
            if type(key) not in (str, int):
                raise NoValue(f"{named(key)} as a key: keys are texts or integers")
            if key in made:
                raise NoValue(f"the key {key!r} stands twice")
            for value in _held(value_of(frame)) if optional else (value_of(frame),):
                made[key] = value
        return made

    return run


def _held(value: Any) -> tuple[Any, ...]:
    if type(value) is Optional:
        return value.held
    raise NoValue(f"'?' goes before an optional value, not {named(value)}")


def _loop(node: Loop) -> Part:
    range_, start = compiled(node.range), compiled(node.start)
    condition, result = compiled(node.condition), compiled(node.result)
    step = _appending(node) or _replacing(node)
    variable, accumulator = node.variable, node.accumulator

    def run(frame: Frame) -> Any:
        of = range_(frame)
        if type(of) is not list and not isinstance(of, Mapping):
            raise NoValue(f"{named(of)} has no items to go through")
        inner = Frame({**frame.names, accumulator: start(frame)}, frame.work)
        for item in of:
            frame.work.spend(_TURN)
            inner.names[variable] = item
            if condition(inner) is not True:
                break
            step(inner)
        return result(inner)

    return run


#: Units of work of one turn of a macro.
_TURN = 8


def _replacing(node: Loop) -> Part:
    """A step as it is written: a new value for the accumulator, or the failure to have one."""
    step, accumulator = compiled(node.step), node.accumulator

    def run(frame: Frame) -> None:
        try:
            frame.names[accumulator] = step(frame)
        except NoValue as error:
            frame.names[accumulator] = _Failed(error)

    return run


def _appending(node: Loop) -> Part | None:
    """The step of `map` and `filter`, which would otherwise copy the whole list for each item."""
    if node.start != Items(node.start.at, (), frozenset()):
        return None
    wanted: Part | None = None
    match node.step:
        case Call(function="_?_:_", arguments=(condition, step, Name(name=kept))) if kept == node.accumulator:
            wanted = compiled(condition)
        case step:
            pass
    match step:
        case Call(function="_+_", arguments=(Name(name=kept), Items(elements=(element,)))) if kept == node.accumulator:
            made = compiled(element)
        case _:
            return None

    def run(frame: Frame) -> None:
        if wanted is None or _truth("_?_:_", wanted(frame)):
            frame.names[node.accumulator].append(made(frame))

    return run
