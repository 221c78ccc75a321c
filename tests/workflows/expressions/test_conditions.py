"""CEL expressions: the check at submission, their values, and the limits on their work."""

from __future__ import annotations

import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest

from app.kernel.errors import FailureReason, StepFailure
from app.workflows.expressions import conditions, plain
from app.workflows.expressions.cel.values import MAX_WORK, Budget
from app.workflows.expressions.result_type import ResultType
from app.workflows.expressions.templates import Scope

SCOPE = Scope(
    {
        "n": {"type": "integer"},
        "x": {"type": "number"},
        "s": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "order": {"type": "object", "properties": {"id": {"type": "integer"}}, "additionalProperties": False},
        "any": {},
    },
    ("draft",),
    extra=("run", "error", "item", "index"),
)

#: Valid expressions, each with the required result type.
RIGHT: list[tuple[str, ResultType]] = [
    ("inputs.n > 3 && inputs.x > 3 && inputs.s == 'a'", "bool"),
    ("has(inputs.n) && inputs.n > 3", "bool"),
    ("inputs.order.id == 3 && inputs['order']['id'] == 3 && has(inputs.order.id)", "bool"),
    ("steps.draft.output.score > 0.5 || steps.draft.error != null || steps.draft.state == 'failed'", "bool"),
    ("steps['draft'].output.ok", "bool"),
    ("inputs.tags.exists(t, t.startsWith('a')) && 'b' in inputs.tags", "bool"),
    ("[inputs.any].all(inputs, inputs.nothing == 1)", "bool"),
    ("error.reason in ['timeout', 'engine_error'] && error.attempt < 3", "bool"),
    ("run.state == 'failed' && index > 0 && item.id != null", "bool"),
    ("inputs.?any.?deep.orValue(0) == 1", "bool"),
    ("type(inputs.any) == string", "bool"),
    ("steps.draft.output", "list"),
    ("inputs.tags.map(t, {'tag': t, 'length': size(t)})", "list"),
    ("inputs.s + '!'", "string"),
    ("{'b': steps.draft.output, 'a': [1, 'x', null]}", "any"),
    ("timestamp(inputs.s) + duration('1h')", "time"),
    ("inputs.s", "time"),
]

#: expression, the result type, a part of the message, a part of what is accepted
WRONG: dict[str, tuple[str, ResultType, str, str]] = {
    "an empty expression": ("", "bool", "ends too early", ""),
    "an incomplete expression": ("inputs.n ==", "bool", "character 12 of the expression: it ends too early", "=="),
    "Python's and": ("inputs.n > 1 and true", "bool", "character 14 of the expression: 'and' is not expected", "&&"),
    "one =": ("inputs.n = 1", "bool", "'=' is not expected here", "=="),
    "a second line": ("inputs.n > 1 &&\n  inputs.s > 1", "bool", "line 2, character 12", "int("),
    "an unknown input": ("inputs.m == 1", "bool", "'inputs.m' is not an input", "inputs.n"),
    "an unknown input in brackets": ("inputs['m'] == 1", "bool", "'inputs.m' is not an input", "inputs.n"),
    "an unknown step": ("steps.final.output == 1", "bool", "is not a step that this one needs", "steps.draft.output"),
    "an unknown field of a step": ("steps.draft.result == 1", "bool", "a step has no 'result'", "steps.draft.output"),
    "an unknown field of an input": ("inputs.order.ID == 1", "bool", "'inputs.order' has no 'ID'", "inputs.order.id"),
    "an unknown field of the error": ("error.reson == 'timeout'", "bool", "'error' has no 'reson'", "error.reason"),
    "an unknown root": ("customer == 1", "bool", "'customer' is not defined here", "inputs.n"),
    "an unknown name in a macro": ("inputs.tags.all(t, tt == 'x')", "bool", "'tt' is not defined here", "inputs.n"),
    "a misspelt function": ("inputs.s.starsWith('a')", "bool", "no function 'starsWith'", "did you mean 'startsWith'?"),
    "a macro without a name": ("inputs.tags.all(inputs.n > 1)", "bool", "no function 'all'", "list.all(x, condition)"),
    "an unsupported function": ("'%d'.format([1]) == '1'", "bool", "no function 'format'", "matches"),
    "a string compared with a number": ("inputs.s > 3", "bool", "'>' does not accept (string, int)", "int("),
    "an integer compared with a double": ("inputs.n > 3.5", "bool", "'>' does not accept (int, double)", "double("),
    "an item of another type": ("inputs.tags.exists(t, t == 1)", "bool", "'==' does not accept (string, int)", ""),
    "a field of a number": ("inputs.n.id == 1", "bool", "a value of the type int has no fields", ""),
    "a method of another type": ("inputs.n.matches('a')", "bool", "'matches' does not accept (int, string)", ""),
    "a step's state as a number": ("steps.draft.state == 1", "bool", "does not accept (string, int)", ""),
    "a string as a condition": ("inputs.s", "bool", "a string, expected true or false", "inputs.score > 3"),
    "a number as a list": ("inputs.n", "list", "an integer, expected a list", "a list"),
    "a number as a string": ("inputs.n", "string", "an integer, expected a string", "string(inputs.id)"),
    "a list as an instant": ("inputs.tags", "time", "a list, expected an instant", "timestamp("),
    "a timestamp as JSON": ("timestamp(inputs.s)", "any", "a timestamp, which JSON cannot represent", "string("),
    "a duration inside": ("[duration('1s')]", "any", "which JSON cannot represent", "string("),
    "an optional as JSON": ("inputs.?any", "any", "an optional value, which JSON cannot represent", ".orValue("),
    "keys that are not strings": ("{1: 'a'}", "any", "which JSON cannot represent", ""),
    "an unsigned integer": ("inputs.n == 3u", "bool", "character 13 of the expression: unsigned", ""),
    "bytes": ("size(b'abc') == 3", "bool", "bytes are not supported", ""),
    "a message": ("google.protobuf.Struct{} == {}", "bool", "messages such as", ""),
    "an integer too large": ("inputs.n == 9223372036854775808", "bool", "invalid int literal", ""),
    "a lone surrogate": ("inputs.s == '\ud800'", "bool", "lone surrogate", ""),
    "nested too deep": ("(" * 40 + "true" + ")" * 40, "bool", "nested deeper, or its chain is longer, than 32", ""),
    "chained too long": (" + ".join(["1"] * 40) + " == 40", "bool", "than 32", ""),
    "too long": ("true || " * 3000 + "true", "bool", "longer than 20000 characters", ""),
}


@pytest.mark.parametrize(("expression", "result_type"), RIGHT)
def test_valid_expressions_pass_the_check(expression: str, result_type: ResultType) -> None:
    assert conditions.check(expression, "when", SCOPE, result_type=result_type) == []


@pytest.mark.parametrize("case", WRONG)
def test_invalid_expressions_are_found_at_submission(case: str) -> None:
    expression, result_type, message, accepted = WRONG[case]
    found = conditions.check(expression, "steps[1].when", SCOPE, result_type=result_type)

    assert found
    assert found[0].where == "steps[1].when"
    assert message in found[0].message
    assert accepted in found[0].accepted


def test_without_schemas_only_names_are_checked() -> None:
    scope = Scope(("n",), ())

    assert conditions.check("inputs.n == 'a' || inputs.n == 1", "when", scope) == []
    assert len(conditions.check("inputs.m == 1 || error.reason == 'x'", "when", scope)) == 2


DATA: dict[str, Any] = {
    "inputs": {"n": 4, "x": 4.5, "s": "yes", "none": None, "big": 2**70, "nan": float("nan")},
    "steps": {"draft": {"output": {"z": 1, "a": {"y": None, "b": [1, 2.5, "ü"]}}, "state": "succeeded", "error": None}},
}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("inputs.n > 3 && inputs.x > 3", True),
        ("inputs.big > 1", True),
        ("inputs.none == null && steps.draft.error == null", True),
        ("steps.draft.output.a.b[2]", "ü"),
        ("steps.draft.output.a", {"y": None, "b": [1, 2.5, "ü"]}),
        ("[null, inputs.none]", [None, None]),
        ("4.0", 4.0),
    ],
)
def test_values_pass_through_unchanged(expression: str, value: Any) -> None:
    found = conditions.evaluate(expression, DATA)

    assert (found, type(found)) == (value, type(value))


def test_keys_keep_their_order() -> None:
    made = conditions.evaluate("{'z': 1, 'a': steps.draft.output, 'm': [steps.draft.output].map(o, o)}", DATA)

    assert [*made, *made["a"], *made["m"][0]] == ["z", "a", "m", "z", "a", "z", "a"]


def test_a_time_result_is_an_aware_datetime() -> None:
    noon = datetime(2026, 11, 21, 12, tzinfo=UTC)

    for expression in ("timestamp('2026-11-21T11:30:00Z') + duration('30m')", "'2026-11-21T13:00:00+01:00'"):
        assert conditions.evaluate(expression, {}, result_type="time") == noon
    assert conditions.evaluate("'2026-11-21 12:00'", {}, result_type="time") == noon
    with pytest.raises(StepFailure, match="expected an instant such as"):
        conditions.evaluate("'tomorrow'", {}, result_type="time")


@pytest.mark.parametrize(
    ("expression", "result_type", "message"),
    [
        ("inputs.nothing > 3", "bool", "there is no key 'nothing' (the keys are: n, x, s, none, big, nan)"),
        ("event.id == 1", "bool", "'event' is not defined here"),
        ("inputs.n", "bool", "an integer, expected true or false"),
        ("inputs.none", "list", "null, expected a list"),
        ("inputs.x * 2 > 1.0", "bool", "'*' does not accept (double, int)"),
        ("inputs.n / 0", "any", "division by zero"),
        ("9223372036854775807 + inputs.n", "any", "beyond 64 bits"),
        ("steps.draft.output.a.b[3]", "any", "there is no item 3: the list has 3"),
        ("inputs.n.id", "any", "an integer has no field 'id'"),
        ("inputs.s.matches('(')", "bool", "missing ): ("),
        ("timestamp(inputs.s)", "any", "timestamp"),
        ("1.0 / 0.0", "any", "infinity"),
        ("[inputs.nan]", "any", "infinity or NaN"),
        ("[inputs.big]", "any", "beyond 64 bits"),
        ("[timestamp(0)]", "any", "a timestamp, which JSON cannot represent"),
        ("{1: 2}", "any", "JSON keys must be strings"),
        ("inputs.?n", "any", "an optional value, which JSON cannot represent"),
        ("{'a': 1, 'a': 2}", "any", "duplicate key"),
        ("inputs.n ==", "bool", "ends too early"),
    ],
)
def test_a_failed_evaluation_fails_the_step_with_the_reason(
    expression: str, result_type: ResultType, message: str
) -> None:
    with pytest.raises(StepFailure) as caught:
        conditions.evaluate(expression, DATA, result_type=result_type)

    assert caught.value.reason is FailureReason.TEMPLATE_ERROR
    assert f"`{expression}` cannot be evaluated" in caught.value.message
    assert message in caught.value.message


def test_an_error_on_the_non_decisive_side_is_absorbed() -> None:
    assert conditions.evaluate_bool("inputs.nothing > 3 || inputs.n == 4", DATA)
    assert not conditions.evaluate_bool("inputs.nothing > 3 && inputs.n == 5", DATA)


def _nested(form: str, depth: int, first: str, last: str) -> str:
    """Return nested macros, each over the enlarged value of the outer one."""
    heads = [f"{form.replace('?', f'x{i}' if i else first)}.map(x{i + 1}, " for i in range(depth)]
    return "".join(heads) + last.replace("?", f"x{depth}") + ")" * depth


BOMBS = {
    "macros in macros": "".join(f"inputs.ten.all(x{i}, " for i in range(9)) + "true" + ")" * 9,
    "strings that double": _nested("[? + ? + ? + ?]", 20, "'0123456789abcdef'", "size(?)"),
    "lists that double": _nested("[? + ? + ? + ?]", 20, "[1, 2]", "size(?)"),
    "nested lists, compared": _nested("[[?, ?, ?, ?]]", 20, "[1, 2]", "? == ?"),
    "nested lists, returned": _nested("[[?, ?, ?, ?]]", 20, "[1, 2]", "?"),
    "a chain of maps": "[1]" + ".map(x, [x, x, x, x])" * 20,
    "a long comparison, often": "inputs.many.all(x, inputs.many == inputs.many)",
    "a regular expression of many states": "inputs.text.matches('(x?[ab]{900}|[ab]{901}|[ab]{902})*c')",
    "a regular expression, often": "inputs.many.exists(x, inputs.text.matches('[ab]*a[ab]{90}c'))",
    "a text of separators": "inputs.text.replace('', inputs.text)",
    "many parts joined": "inputs.text.split('').join(inputs.text)",
}


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the budget to a tenth, so that its limit is reached sooner."""
    monkeypatch.setattr(conditions, "Budget", partial(Budget, MAX_WORK // 10))


@pytest.mark.usefixtures("small_budget")
@pytest.mark.parametrize("bomb", BOMBS)
def test_work_and_memory_are_limited(bomb: str) -> None:
    """Without limits, each expression would run for hours or exhaust the memory."""
    data = {"inputs": {"ten": [0] * 10, "many": [[1]] * 5_000, "text": "ab" * 50_000}}
    with pytest.raises(StepFailure, match=r"units of work|longer than \d+ characters"):
        conditions.evaluate(BOMBS[bomb], data)


def test_the_deepest_nesting_that_the_parser_accepts_is_evaluated() -> None:
    assert conditions.evaluate("[1].map(x, " * 30 + "x" + ")" * 30, {}) == eval("[" * 30 + "1" + "]" * 30)


def test_too_deeply_nested_data_fails_the_step() -> None:
    deep: list[Any] = []
    for _ in range(20_000):
        deep = [deep]
    for expression in ("[inputs.deep]", "inputs.deep == inputs.same"):
        with pytest.raises(StepFailure, match="nested too deep"):
            conditions.evaluate(expression, {"inputs": {"deep": deep, "same": [deep[0]]}})


@pytest.mark.usefixtures("small_budget")
def test_an_exceeded_budget_is_not_absorbed_by_the_decisive_side() -> None:
    with pytest.raises(StepFailure, match="units of work"):
        conditions.evaluate(f"{BOMBS['macros in macros']} || true", {"inputs": {"ten": [0] * 10}})


def test_ten_thousand_items_fit_the_budget() -> None:
    items = [{"id": i, "ok": i % 2 == 0, "text": "x" * 50} for i in range(10_000)]
    found = conditions.evaluate("inputs.items.filter(i, i.ok && i.id >= 10).map(i, i.id)", {"inputs": {"items": items}})

    assert found == list(range(10, 10_000, 2))


def test_unused_data_is_not_visited_and_a_bare_path_returns_the_same_object() -> None:
    class Untouched(dict[str, Any]):
        def __iter__(self) -> Any:
            raise AssertionError("the value was iterated")

        items = keys = values = __iter__  # type: ignore[assignment] # none of these may be called

    output = Untouched(score=3, rest="x" * (plain.MAX_RESULT + 1))
    data = {"inputs": {}, "steps": {"a": {"output": output}}}

    assert conditions.evaluate_bool("steps.a.output.score > 2", data)
    assert conditions.evaluate("steps.a.output.rest", data) is output["rest"]


def test_null_results_do_not_change_the_reference_count_of_none() -> None:
    """The library's own evaluator releases references to None that it does not own, until Python aborts."""
    gc.collect()
    gc.disable()  # garbage of other tests refers to None, too
    try:
        before = sys.getrefcount(None)
        for _ in range(2_000):
            conditions.evaluate("[null, inputs.none]", DATA)
        assert sys.getrefcount(None) > before - 500
    finally:
        gc.enable()


def test_evaluation_is_thread_safe() -> None:
    def work(n: int) -> bool:
        found = []
        for i in range(20):
            expression = f"inputs.n == {n} && 'a{i}'.matches('a[0-9]+') && timestamp({i}).getSeconds() == {i}"
            conditions.check(expression, "when", SCOPE)
            found.append(conditions.evaluate_bool(expression, {"inputs": {"n": n}}))
        return all(found)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))
