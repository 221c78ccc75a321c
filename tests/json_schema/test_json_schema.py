"""JSON Schema validation: the same results as jsonschema, no fetching, bounded work, and no exceptions."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from referencing import Registry

from app import json_schema

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([0.5, 1.0, -2.0, 1e300, 10**40]),
    st.sampled_from(["", "a", "b", "ab", "é", "aaa", "1"]),
)
NAMES = st.sampled_from(["a", "b", "ab", "c"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=10
)
PATTERNS = st.sampled_from(["^a", "b$", "^(a|b)+$", "a{2}", "[^a]", ""])
COUNTS = st.integers(0, 3)
TYPES = st.sampled_from(["object", "array", "string", "number", "integer", "boolean", "null"])


def schemas(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Returns a strategy for schemas whose subschemas come from `inner`."""
    some = st.lists(inner, min_size=1, max_size=3)
    bounds = st.integers(-2, 2) | st.sampled_from([0.5, 1.5])
    keywords: dict[str, st.SearchStrategy[Any]] = {
        "type": TYPES | st.lists(TYPES, min_size=1, max_size=3, unique=True),
        "enum": st.lists(VALUES, min_size=1, max_size=3),
        "const": VALUES,
        "multipleOf": st.sampled_from([1, 2, 0.5]),
        **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), bounds),
        **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), COUNTS),
        **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), some),
        **dict.fromkeys(
            ("not", "if", "then", "else", "items", "contains", "additionalProperties", "propertyNames"), inner
        ),
        **dict.fromkeys(("unevaluatedProperties", "unevaluatedItems"), inner),
        **dict.fromkeys(("properties", "dependentSchemas"), st.dictionaries(NAMES, inner, max_size=3)),
        "patternProperties": st.dictionaries(PATTERNS, inner, max_size=2),
        "required": st.lists(NAMES, max_size=2, unique=True),
        "dependentRequired": st.dictionaries(NAMES, st.lists(NAMES, max_size=2, unique=True), max_size=2),
        "minContains": COUNTS,
        "maxContains": COUNTS,
        "uniqueItems": st.booleans(),
        "pattern": PATTERNS,
        "format": st.sampled_from(["date", "nothing"]),
        "$ref": st.sampled_from(["#/$defs/x", "#y", "#/$defs/y"]),
        "unknown": VALUES,
    }
    return st.lists(st.sampled_from(sorted(keywords)), max_size=4, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({keyword: keywords[keyword] for keyword in chosen})
    )


SCHEMAS = st.recursive(st.booleans() | schemas(st.booleans()), schemas, max_leaves=6)


@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, value=VALUES, x=schemas(st.booleans()), y=schemas(st.booleans()))
def test_the_result_equals_that_of_jsonschema(schema: Any, value: Any, x: Any, y: Any) -> None:
    # References in x and y could be cyclic.
    x, y = ({k: v for k, v in one.items() if k != "$ref"} for one in (x, y))
    whole = schema if isinstance(schema, bool) else {**schema, "$defs": {"x": x, "y": {**y, "$anchor": "y"}}}
    before = copy.deepcopy((whole, value))

    assert json_schema.problems(whole, "s") == []
    expected = Draft202012Validator(whole, registry=Registry()).is_valid(value)
    assert json_schema.conforms(whole, value) is expected, (whole, value)
    assert (whole, value) == before


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, keyword=st.sampled_from(sorted(Draft202012Validator.VALIDATORS)), junk=VALUES)
def test_an_invalid_schema_is_reported_and_never_raises(schema: Any, keyword: str, junk: Any) -> None:
    mutated = {**(schema if isinstance(schema, dict) else {}), keyword: junk}
    found = json_schema.problems({**mutated, "$defs": {"x": {}, "y": {"$anchor": "y"}}}, "s")

    for value in (junk, {"a": 1}, ["a", 1], "a", 1):
        list(json_schema.deviations(mutated, value))
    meta = Draft202012Validator(Draft202012Validator.META_SCHEMA, registry=Registry())
    if not meta.is_valid(mutated):
        assert found, f"{mutated} is not a valid schema"
