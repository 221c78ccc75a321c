"""
Checks of a hand-off document that need no database: shape, schemas, expressions, the workflow that delivers, the tests.

One call reports every problem, each with its path, its line (where the source has lines) and what would be accepted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from app import json_schema
from app.handoffs import delivery, processing
from app.handoffs.connectors.connector import DELIVERED_SCOPE, MESSAGE_SCOPE
from app.handoffs.connectors.email import EmailSource
from app.handoffs.definition import Handoff
from app.kernel.errors import InvalidInput, Problem
from app.workflows.expressions import conditions, transforms
from app.workflows.language import source
from app.workflows.language.source import SourceDocument

#: How messages call the input.
SUBJECT = "hand-off"
#: The names that the text of an answer may use.
_REPLY_SCOPE = replace(MESSAGE_SCOPE, extra=("message", "output"))
#: Most bytes of the message of an error that is shown of a value.
_SHOWN = 100


def parse(text: str) -> Handoff:
    """Return a hand-off from YAML or JSON text. Raises InvalidInput with every problem found."""
    try:
        document = source.read(text)
    except InvalidInput as error:
        raise InvalidInput(error.problems, SUBJECT) from None
    return check(document)


def check(document: SourceDocument) -> Handoff:
    """Return a hand-off from plain data. Raises InvalidInput with every problem found."""
    try:
        handoff = Handoff.model_validate(document.data)
    except ValidationError as error:
        raise _invalid([_problem(item) for item in error.errors(include_url=False)], document) from None
    problems = list(_problems(handoff)) or list(_delivery_problems(handoff)) or list(test_problems(handoff))
    if problems:
        raise _invalid(problems, document)
    return handoff


def stored(document: Mapping[str, Any]) -> Handoff:
    """Return a hand-off that was checked when it was stored. Raises InvalidInput when this version has other rules."""
    try:
        return Handoff.model_validate(document)
    except ValidationError as error:
        raise InvalidInput([_problem(item) for item in error.errors(include_url=False)], SUBJECT) from None


def test_problems(handoff: Handoff) -> Iterator[Problem]:
    """Run the tests of a document, and yield those that fail."""
    for i, test in enumerate(handoff.tests):
        found, where = processing.process(handoff, test.message), f"tests[{i}]"
        if test.invalid and found.is_valid:
            yield Problem(where, f"{test.name!r}: the message is valid", "a message that is refused")
        elif not test.invalid and not found.is_valid:
            why = "; ".join(str(problem) for problem in found.problems[:3])
            yield Problem(where, f"{test.name!r}: the message is refused: {why}", "a valid message")
        elif not test.invalid and found.payload != test.payload:
            wanted = test.payload or {}
            names = sorted(
                name for name in {*found.payload, *wanted} if found.payload.get(name, ...) != wanted.get(name, ...)
            )
            shown = ", ".join(f"{name} is {_shown(found.payload.get(name))}" for name in names[:5])
            yield Problem(f"{where}.payload", f"{test.name!r}: the payload differs: {shown}", "the expected payload")


def _problems(handoff: Handoff) -> Iterator[Problem]:
    allowance = json_schema.Allowance()
    for schema, where in ((handoff.schema_, "schema"), (handoff.mapping.schema_, "mapping.schema")):
        if schema:
            yield from json_schema.problems(schema, where, allowance)
    for name, expression in handoff.source.expressions().items():
        yield from conditions.check(expression, f"source.{name}", MESSAGE_SCOPE, result_type="any")
    if isinstance(handoff.source, EmailSource) and (reply := handoff.source.reply) is not None:
        yield from conditions.check(reply.text, "source.reply.text", _REPLY_SCOPE, result_type="any")
    if handoff.mapping.cel is not None:
        yield from conditions.check(handoff.mapping.cel, "mapping.cel", MESSAGE_SCOPE, result_type="any")
    if handoff.mapping.jmespath is not None:
        yield from transforms.check_jmespath(handoff.mapping.jmespath, "mapping.jmespath", MESSAGE_SCOPE)

    for i, following in enumerate(handoff.then):
        yield from conditions.check(following.cel, f"then[{i}].cel", DELIVERED_SCOPE, result_type="any")
        if following.when is not None:
            yield from conditions.check(following.when, f"then[{i}].when", DELIVERED_SCOPE, result_type="bool")


def _delivery_problems(handoff: Handoff) -> Iterator[Problem]:
    try:
        delivery.workflow_of(handoff)
    except InvalidInput as error:
        for problem in error.problems:
            where = problem.where.partition(".")[2] if problem.where.startswith("steps[") else problem.where
            yield Problem(f"target.{where}".rstrip("."), problem.message, problem.accepted)


def _invalid(problems: list[Problem], document: SourceDocument) -> InvalidInput:
    found = [Problem(p.where, p.message, p.accepted, document.line(p.where)) for p in problems]
    return InvalidInput(sorted(found, key=lambda problem: problem.line or 0), SUBJECT)


def _problem(item: ErrorDetails) -> Problem:
    kind, given = item["type"], item["input"]
    parts = list(item["loc"])
    # The tag of a connector, which is no field of the document.
    if len(parts) > 1 and parts[0] in ("source", "target"):
        del parts[1]
    where = ".".join(str(part) for part in parts)
    message, accepted = item["msg"].removeprefix("Value error, "), ""
    if kind == "extra_forbidden":
        message = "unknown field"
    elif kind == "missing":
        message = "this field is missing"
    elif kind == "union_tag_invalid":
        where, message = f"{where}.kind", f"{_shown(item['ctx']['tag'])} is not a kind of {parts[0]}"
        accepted = str(item["ctx"]["expected_tags"])
    elif kind == "union_tag_not_found":
        where, message = f"{where}.kind", "this field is missing"
    elif kind == "string_pattern_mismatch" and where == "handoff":
        message, accepted = f"{_shown(given)} is not a name", "lower-case words joined by hyphens"
    elif where and not isinstance(given, dict | list):
        message = f"{_shown(given)}: {message}"
    return Problem(where, message, accepted)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
