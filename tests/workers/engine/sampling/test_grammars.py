"""Structured output: 24 schemas, GBNF grammars, and rejected ones."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from app.inference.requests import ChatMessage, FinishReason, GenerateRequest, Sampling
from app.kernel.errors import FailureReason, StepFailure
from workers.engine.engine import LlamaEngine

STRING, INTEGER, BOOLEAN = {"type": "string", "maxLength": 24}, {"type": "integer"}, {"type": "boolean"}


def record(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


def array(items: Any, min_items: int = 0, max_items: int = 3) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": min_items, "maxItems": max_items}


SCHEMAS: dict[str, dict[str, Any]] = {
    "string": STRING,
    "short string": {"type": "string", "minLength": 3, "maxLength": 5},
    "integer": {"type": "integer", "minimum": -5, "maximum": 105},
    "number": {"type": "number", "minimum": 0, "maximum": 1},
    "boolean": BOOLEAN,
    "null": {"type": "null"},
    "enum": {"enum": ["red", "green", 3, None]},
    "const": {"const": {"a": [1, 2]}},
    "flat object": record({"name": STRING, "age": {"type": "integer", "minimum": 0, "maximum": 120}}),
    "optional": record({"name": STRING}, nick=STRING, age=INTEGER),
    "nested": record({"person": record({"name": STRING, "home": record({"city": STRING, "zip": STRING})})}),
    "array of enums": array({"enum": ["low", "high"]}, 1, 4),
    "array of objects": array(record({"item": STRING, "count": {"type": "integer", "minimum": 1, "maximum": 9}}), 1, 2),
    "empty array": array(STRING, 0, 0),
    "matrix": array(array({"type": "integer", "minimum": 0, "maximum": 9}, 2, 2), 2, 2),
    "tuple": {"type": "array", "prefixItems": [STRING, INTEGER], "items": False, "minItems": 2},
    "union of types": {"type": ["integer", "null"]},
    "anyOf": {"anyOf": [record({"ok": {"const": True}}), record({"error": STRING})]},
    "tagged union": {
        "anyOf": [record({"kind": {"const": "cat"}, "lives": INTEGER}), record({"kind": {"const": "dog"}})]
    },
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "defs": {"$defs": {"money": record({"amount": INTEGER, "currency": {"enum": ["EUR", "USD"]}})}}
    | record({"price": {"$ref": "#/$defs/money"}, "tax": {"$ref": "#/$defs/money"}}),
    "recursion": {
        "$defs": {"part": {"anyOf": [INTEGER, array({"$ref": "#/$defs/part"}, 0, 2)]}},
        "$ref": "#/$defs/part",
    },
}  # fmt: skip


def ask(schema: dict[str, Any], tokens: int = 220, **sampling: Any) -> GenerateRequest:
    message = ChatMessage("user", "A friendly dog named Rex, 7 years old, lives in Lima. Answer in JSON.")
    chosen = Sampling(**{"temperature": 0} | sampling)
    return GenerateRequest(messages=(message,), max_tokens=tokens, schema=schema, sampling=chosen)


@pytest.mark.parametrize("temperature", [0.9, pytest.param(0.0, marks=pytest.mark.storm)])
def test_24_schemas_produce_only_valid_documents(shared: LlamaEngine, temperature: float) -> None:
    assert len(SCHEMAS) == 24
    asked = {name: ask(schema, temperature=temperature, seed=3) for name, schema in SCHEMAS.items()}
    for name, ticket in [(name, shared.generate(request)) for name, request in asked.items()]:
        result = ticket.result(170)
        assert result.finish is FinishReason.STOP, (name, result.text)
        jsonschema.Draft202012Validator(SCHEMAS[name]).validate(json.loads(result.text))


def test_a_truncated_document_is_a_failure_that_keeps_its_text(shared: LlamaEngine) -> None:
    with pytest.raises(StepFailure) as caught:
        shared.generate(ask(SCHEMAS["nested"], 6)).result(60)
    assert caught.value.reason is FailureReason.INVALID_OUTPUT
    assert caught.value.text
    assert SCHEMAS["nested"]["required"][0] in caught.value.text


def test_an_unsupported_keyword_is_rejected_by_name(shared: LlamaEngine) -> None:
    for schema, word in (({"not": {"type": "string"}}, "not"), ({"type": "nothing"}, "nothing")):
        with pytest.raises(StepFailure, match=word) as caught:
            shared.generate(ask(schema))
        assert caught.value.reason is FailureReason.INVALID_REQUEST


def test_a_gbnf_grammar_constrains_the_text(shared: LlamaEngine) -> None:
    request = GenerateRequest(prompt="Yes or no?", max_tokens=9, grammar='root ::= ("yes" | "no") "!"')
    assert shared.generate(request).result(60).text in ("yes!", "no!")


@pytest.mark.parametrize("grammar", ['answer ::= "x"', 'root ::= "x', "root ::= missing", "root ::= root", "\0"])
def test_an_invalid_grammar_is_rejected_at_once(shared: LlamaEngine, grammar: str) -> None:
    with pytest.raises(StepFailure) as caught:
        shared.generate(GenerateRequest(prompt="a", grammar=grammar))
    assert caught.value.reason is FailureReason.INVALID_REQUEST


def test_a_compiled_grammar_is_reused(shared: LlamaEngine) -> None:
    request = GenerateRequest(prompt="a", max_tokens=4, grammar='root ::= "again"')
    shared.generate(request).result(60)
    before = shared.metrics().grammar_compiled
    shared.generate(request).result(60)
    assert shared.metrics().grammar_compiled == before


def test_the_staged_mask_chooses_the_same_tokens_as_the_full_mask(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In reproducible mode, so that both runs have bit-identical logits: other batch shapes round differently."""
    engine = make(slots=1, reproducible=True)
    requests = [ask(SCHEMAS[name]) for name in ("flat object", "array of enums")]
    staged = [engine.generate(request).result(60).text for request in requests]
    monkeypatch.setattr("workers.engine.sampling.constraint.LOGIT_GAP", 1e9)
    full = [engine.generate(request).result(60).text for request in requests]
    assert staged == full


def test_a_string_contains_no_control_token(shared: LlamaEngine) -> None:
    bias = {token: 40.0 for token in shared.model.control_tokens if token not in shared.model.end_tokens}
    text = shared.generate(ask({"type": "string", "maxLength": 12}, 40, logit_bias=bias)).result(60).text
    assert len(json.loads(text)) <= 12
