"""The functions of lists and vectors in CEL: values, types at submission, errors, limits, speed."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.kernel.errors import StepFailure
from app.workflows.expressions import conditions
from app.workflows.expressions.cel.signatures import SIGNATURES
from app.workflows.expressions.result_type import ResultType
from app.workflows.expressions.templates import Scope

SCHEMAS = {"a": {"type": "array"}, "b": {"type": "array"}, "v": {"type": "array"}, "s": {"type": "string"}, "x": {}}
ROWS = [{"name": "b", "score": 2}, {"name": "a", "score": 2.5}, {"name": "c", "score": -1}]


def value(expression: str, **inputs: Any) -> Any:
    assert problems(expression) == [], "it can be submitted"
    return conditions.evaluate(expression, {"inputs": inputs})


def problems(expression: str, result_type: ResultType = "any") -> list[tuple[str, str]]:
    found = conditions.check(expression, "here", Scope(SCHEMAS, ()), result_type=result_type)
    return [(problem.message, problem.accepted) for problem in found]


def failure(expression: str, **inputs: Any) -> str:
    with pytest.raises(StepFailure) as caught:
        conditions.evaluate(expression, {"inputs": inputs})
    return caught.value.message.partition("evaluated: ")[2]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("dot([1, 2.5], [2, 4])", 12.0),
        ("[1, 0].dot([0, 1])", 0.0),
        ("cosine([3, 4], [6, 8])", 1.0),
        ("cosine([1, 0], [-3, 0])", -1.0),
        ("norm([3, 4])", 5.0),
        ("sum([1, 2, 3])", 6),
        ("sum([0.1, 0.2, 0.3, 1])", 1.6),
        ("sum([])", 0),
        ("mean([1, 2])", 1.5),
        ("max([1, 2.5, 2])", 2.5),
        ("min(['b', 'a'])", "a"),
        ("argmax([1, 3, 3])", 1),
        ("argmin([1, 0.5])", 1),
        ("zip([1, 2], ['a', 'b'])", [[1, "a"], [2, "b"]]),
        ("zip([], [])", []),
        ("topK([0.1, 0.9, 0.9, 0.5], 3).map(hit, hit.index)", [1, 2, 3]),
        ("topK([0.5], 4)", [{"index": 0, "score": 0.5}]),
        ("topK([], 1)", []),
        ("topK([[1, 0], [0, 1], [2, 2]], [0, 5], 2)[0]", {"index": 1, "score": 1.0}),
        ("topK([], [1.0], 2)", []),
        ("inputs.x.sortBy(row, row.score).map(row, row.name)", ["c", "b", "a"]),
        ("inputs.x.sortBy(row, -row.score)[0].name", "a"),
        ("sortBy(inputs.x, inputs, inputs.name)[0].score", 2.5),
        ("[[2, 1], [3]].map(inner, inner.sortBy(x, x))", [[1, 2], [3]]),
        ("[1, 2, 3].sortBy(x, x < 2 ? 1 : 0)", [2, 3, 1]),
        ("[].sortBy(x, x)", []),
        ("[1, 2, 3].slice(1, 3)", [2, 3]),
    ],
)
def test_values(expression: str, expected: Any) -> None:
    found = value(expression, x=ROWS)
    assert (found, type(found)) == (expected, type(expected))


NUMBERS = st.floats(-1e6, 1e6).map(lambda number: number if abs(number) > 1e-6 else 1.0) | st.integers(1, 1000)


@given(st.integers(1, 40).flatmap(lambda size: st.lists(st.lists(NUMBERS, min_size=size, max_size=size), min_size=2)))
def test_similarities_are_those_of_numpy(vectors: list[list[float]]) -> None:
    query = vectors[-1]
    array = np.array(vectors, dtype=float)
    cosines = array @ array[-1] / np.linalg.norm(array, axis=1) / np.linalg.norm(array[-1])

    found = value("inputs.v.map(v, cosine(v, inputs.a))", v=vectors, a=query)
    assert found == pytest.approx(cosines.tolist(), abs=1e-9)
    assert value("dot(inputs.a, inputs.b)", a=vectors[0], b=query) == pytest.approx(array[0] @ array[-1])
    best = value("topK(inputs.v, inputs.a, 3)", v=vectors, a=query)
    assert [hit["score"] for hit in best] == sorted(found, reverse=True)[:3]
    assert [found[hit["index"]] for hit in best] == [hit["score"] for hit in best]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("dot(inputs.a, [1])", "'dot' needs vectors of the same length, not of 2 and 1 numbers"),
        ("dot([1, true], [1, 2])", "'dot' accepts numbers only; item 1 is true or false"),
        ("cosine([0, 0], [1, 1])", "a vector of zeros has no direction"),
        ("norm([])", "'norm' does not accept an empty list of numbers"),
        ("mean([])", "'mean' does not accept an empty list of numbers"),
        ("argmax([])", "'argmax' does not accept an empty list"),
        ("dot([double('NaN')], [1])", "'dot' does not accept NaN or infinity: item 0"),
        ("max([1.0, double('NaN')])", "'max' does not accept NaN"),
        ("max([1, 'a'])", "'max' cannot order a string and an integer"),
        ("[1, 2].sortBy(x, [x])", "'sortBy' cannot order a list"),
        ("dot([1e308], [1e308])", "the result of 'dot' is beyond the range of a double"),
        ("sum([1e308, 1e308])", "the result of 'sum' is beyond the range of a double"),
        ("sum([9223372036854775807, 1])", "a number is beyond 64 bits"),
        ("topK([1.0], 0)", "'topK' returns at least one: k is 0"),
        (
            "topK([[1, 2], [1]], [1, 2], 1)",
            "'topK' needs vectors of the same length: vector 1 has 1, the query 2 numbers",
        ),
        ("topK([[1, 2], 'a'], [1, 2], 1)", "'topK': vector 1 is no list"),
        ("topK([[1, 2], [1, null]], [1, 2], 1)", "'topK' accepts numbers only; item 1 of vector 1 is null"),
        ("zip([1], [1, 2])", "'zip' needs lists of the same length, not of 1 and 2 items"),
        ("[1].slice(0, 2)", "a slice from 0 to 2 is not within a list of 1"),
        ("inputs.x.dot([1])", "'dot' does not accept (null, list)"),
    ],
)
def test_errors_say_what_is_wrong_and_where(expression: str, message: str) -> None:
    assert message in failure(expression, a=[1, 2], x=None)


@pytest.mark.parametrize(
    ("expression", "result_type", "message", "accepted"),
    [
        ("dot(inputs.s, inputs.a)", "any", "'dot' does not accept (string, list(dyn))", ""),
        ("cosine(inputs.a)", "any", "'cosine' does not take 1 argument", "cosine(a, b)"),
        ("topK(inputs.a)", "any", "'topK' does not take 1 argument", "topK(scores, k) or topK(vectors, query, k)"),
        ("cosine(inputs.a, inputs.b)", "bool", "the expression returns a number, expected true or false", ""),
        ("argmax(inputs.a) == 'a'", "any", "'==' does not accept (int, string)", ""),
        ("inputs.a.sortBy(x.score)", "any", "'sortBy' is written as list.sortBy(x, key)", ""),
        ("inputs.a.sortBy(x, y.score)", "any", "'y' is not defined here", ""),
        ("topk(inputs.a, 1)", "any", "there is no function 'topk'", "did you mean 'topK'?"),
        ("topK(inputs.a, 'b')", "any", "'topK' does not accept (list(dyn), string)", ""),
    ],
)
def test_names_types_and_arguments_are_checked_at_submission(
    expression: str, result_type: ResultType, message: str, accepted: str
) -> None:
    ((found, would_do), *_) = problems(expression, result_type)
    assert message in found
    assert accepted in would_do


def test_lists_are_lists_for_the_checker() -> None:
    for expression in ("topK(inputs.a, 2)", "zip(inputs.a, inputs.b)", "inputs.a.sortBy(x, x)"):
        assert problems(expression, "list") == []


def test_a_thousand_vectors_of_384_numbers_take_far_less_than_a_second() -> None:
    random_numbers = random.Random(5)
    vectors = [[random_numbers.gauss(0, 1) for _ in range(384)] for _ in range(1000)]
    began = time.perf_counter()
    best = value("topK(inputs.v, inputs.a, 3)", v=vectors, a=vectors[400])

    assert time.perf_counter() - began < 1
    assert best[0] == {"index": 400, "score": 1.0}


def test_the_work_is_limited() -> None:
    vectors = [[1.0] * 384] * 1000
    began = time.perf_counter()
    message = failure("inputs.v.all(v, topK(inputs.v, v, 1)[0].score > 0.0)", v=vectors)

    assert "units of work" in message
    assert time.perf_counter() - began < 20
    assert "units of work" in failure("inputs.v.all(v, size(inputs.v.sortBy(x, x[0])) > 0)", v=vectors)
    assert "units of work" in failure("inputs.v.all(v, size(zip(inputs.v, inputs.v)) > 0)", v=vectors)


def test_huge_integers_are_errors_not_crashes() -> None:
    huge = int("9" * 308)
    assert "beyond the range" in failure("dot(inputs.a, inputs.a)", a=[huge, huge])
    assert "beyond 64 bits" in failure("sum(inputs.a)", a=[huge])
    assert math.isclose(value("norm(inputs.a)", a=[huge]), 1e308, rel_tol=0.1)


def test_every_function_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs/workflows.md").read_text()
    assert [form for signature in SIGNATURES.values() for form in signature.forms if f"`{form}`" not in page] == []
