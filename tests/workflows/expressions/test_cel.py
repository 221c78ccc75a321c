"""The CEL evaluator against Google's evaluator: the same values, and a failure for the same expressions."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.workflows.expressions.cel import tree
from app.workflows.expressions.cel.program import Frame, compile_node
from app.workflows.expressions.cel.values import Budget, EvaluationError

INPUTS = {
    "i": 4,
    "j": -7,
    "d": 4.5,
    "e": 4.0,
    "s": "héllo 🦙",
    "t": "ab,c",
    "b": True,
    "z": None,
    "l": [1, 2, 3],
    "m": [1, 2.0, "a", None, True],
    # One key in each map, because the library loses the order of keys.
    "o": {"x": {"x": 1}},
    "at": "2026-01-01T10:20:30Z",
}


def own(expression: str) -> Any:
    return compile_node(tree.parse(expression))(Frame({"inputs": INPUTS}, Budget()))


def reference(expression: str) -> Any:
    environment = tree.environment(frozenset({("inputs", "map")}))
    return _plain(environment.compile(expression, disable_check=True).eval(data={"inputs": INPUTS}))


def _plain(value: Any) -> Any:
    name = value.type().name()
    if name == "ERROR":
        raise EvaluationError(value.value())
    if name == "NULL":
        return None
    if name.startswith("LIST"):
        return [_plain(item) for item in value.value()]
    if name.startswith("MAP"):
        return {key: _plain(item) for key, item in value.value().items()}
    return value.value()


def outcome(evaluate: Any, expression: str) -> Any:
    """Return the value with its type, which distinguishes 1, 1.0 and true; one common mark for all failures."""
    try:
        return _typed(evaluate(expression))
    except (EvaluationError, RuntimeError):
        return "no value"


def _typed(value: Any) -> Any:
    if isinstance(value, list):
        return [_typed(item) for item in value]
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    return "nan" if isinstance(value, float) and math.isnan(value) else (type(value).__name__, value)


ATOMS = st.sampled_from(
    [f"inputs.{name}" for name in INPUTS]
    + ["0", "1", "-1", "2.5", "0.0", "'a'", "''", "true", "false", "null", "[]", "{}", "[1, 2]", "{'x': 1}", "{1: 'a'}"]
    + ["inputs.nothing", "inputs.o.x.x", "inputs.l[0]", "inputs.l[9]", "9223372036854775807", "1e308"]
    + ["timestamp(inputs.at)", "duration('90m')", "duration('-1s')", "u", "v"]
)


def _deeper(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    def of(form: str, *names: list[str]) -> st.SearchStrategy[str]:
        count = form.count("{}") - len(names)
        return st.tuples(*(st.sampled_from(name) for name in names), *[inner] * count).map(lambda a: form.format(*a))

    signs = ["==", "!=", "<", "<=", ">", ">=", "+", "-", "*", "/", "%", "&&", "||", "in"]
    binary = st.tuples(inner, st.sampled_from(signs), inner).map(" ".join).map("({})".format)
    macros = ["all(u,", "exists(u,", "exists_one(v,", "map(u,", "filter(v,"]
    macro = st.tuples(inner, st.sampled_from(macros), inner).map(lambda a: f"{a[0]}.{a[1]} {a[2]})")
    texts = ["startsWith", "endsWith", "contains", "indexOf", "lastIndexOf", "split", "matches"]
    method = st.tuples(inner, st.sampled_from(texts), inner).map(lambda a: f"{a[0]}.{a[1]}({a[2]})")
    plain = st.tuples(inner, st.sampled_from(["trim", "lowerAscii", "upperAscii", "reverse", "join", "getMonth"]))
    return st.one_of(
        binary,
        macro,
        method,
        plain.map(lambda a: f"{a[0]}.{a[1]}()"),
        of("{}({})", ["int", "double", "string", "bool", "size", "timestamp", "duration", "dyn"]),
        of("!({})"),
        of("-({})"),
        of("({} ? {} : {})"),
        of("[{}, {}]"),
        of("{}[{}]"),
        of("{}.?x.orValue({})"),
        of("{}.replace({}, 'Q')"),
        of("has(({}).x)"),
        inner.map(lambda a: f"{{'k': {a}}}"),
    )


@settings(max_examples=200, deadline=None)
@given(st.recursive(ATOMS, _deeper, max_leaves=6))
def test_random_expressions_have_the_same_value_as_in_the_reference_evaluator(expression: str) -> None:
    try:
        tree.environment().compile(expression, disable_check=True)
    except RuntimeError:
        return
    assert outcome(own, expression) == outcome(reference, expression)


@pytest.mark.parametrize(
    "expression",
    [
        "inputs.i > 3 && inputs.d > 3 && inputs.i == 4.0",
        "inputs.d * 2.0 + double(inputs.i)",
        "-7 / 2 == -3 && -7 % 2 == -1",
        "1.0 / 0.0",
        "[1, 0].exists(n, 1 / n > 0)",
        "[0, 2].all(n, 1 / n > 0)",
        "[1, 2].exists_one(n, n > 1)",
        "inputs.m.filter(x, x != null).map(x, type(x) == string, x)",
        "inputs.?nothing.orValue(7) + inputs.?o.?x.optMap(o, o.x).orValue(0)",
        "inputs[?'nothing'].hasValue() || inputs.l[?0].value() == 1",
        "{'a': 1, ?'b': inputs.?nothing}",
        "[?inputs.?nothing, ?inputs.?i]",
        "has(inputs.o.x) && !has(inputs.o.nothing)",
        "has(inputs.nothing.x) || true",
        "size(inputs.s) == 7 && inputs.s.charAt(6) == '🦙'",
        "timestamp(inputs.at) + duration('1h30m') > timestamp('2026-01-01T11:00:00Z')",
        "timestamp(inputs.at).getHours('America/New_York')",
        "string(duration('90s')) + string(1.5) + string(timestamp(0))",
        "int('12') + int(2.9) + int(true) + int(timestamp(inputs.at))",
        "'2026-11-21'.matches('^[0-9]{4}-[0-9]{2}-[0-9]{2}$')",
        "r'\\d' + 'line\\n' + '\\u00e9'",
    ],
)
def test_typical_expressions_have_the_same_value_as_in_the_reference_evaluator(expression: str) -> None:
    assert outcome(own, expression) == outcome(reference, expression) != "no value"


def test_a_string_is_not_cut_at_a_nul() -> None:
    frame = Frame({"inputs": {"s": "a\0b"}}, Budget())

    assert compile_node(tree.parse("size(inputs.s)"))(frame) == 3
    with pytest.raises(EvaluationError, match="NUL"):
        compile_node(tree.parse("inputs.s.matches('b')"))(frame)
