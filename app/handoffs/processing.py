"""
Processing of one message: validate, and transform into the payload. Both are functions of the document and the message.

A message that is refused keeps its problems, each with its field and what is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from app import json_schema
from app.handoffs import formats
from app.handoffs.connectors.connector import MAX_KEY, InboundMessage
from app.handoffs.definition import Handoff
from app.kernel.errors import InvalidInput, Problem, StepFailure
from app.workflows.expressions import conditions, transforms

#: Most problems of a message.
MAX_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Processed:
    """What came of a message: a payload, or problems."""

    payload: dict[str, Any]
    problems: tuple[Problem, ...] = ()
    #: Top-level fields of the checked value that conform, and all of them.
    valid_fields: int = 0
    fields: int = 0

    @property
    def is_valid(self) -> bool:
        """Whether it can be delivered."""
        return not self.problems


def process(handoff: Handoff, message: Mapping[str, Any]) -> Processed:
    """Validate a message, map it, and validate its payload. Never raises for a message."""
    problems = _deviations(handoff.schema_, message, "message") or _identity(handoff, message)[1]
    if problems:
        return _refused(handoff.schema_, message, problems)
    mapping = handoff.mapping
    try:
        payload = transforms.evaluate({"message": dict(message)}, cel=mapping.cel, jmespath=mapping.jmespath)
    except StepFailure as failure:
        return Processed({}, (Problem("mapping", failure.message),), 0, len(message))
    if not isinstance(payload, dict):
        problem = Problem("mapping", f"its value is {type(payload).__name__}", "an object")
        return Processed({}, (problem,), 0, len(message))
    problems = list(formats.problems(mapping.schema_, payload, "payload"))
    known = {problem.where for problem in problems}  # they say what is accepted
    problems += (one for one in _deviations(mapping.schema_, payload, "payload") if one.where not in known)
    problems += handoff.target.problems(payload)
    if problems:
        return _refused(mapping.schema_, payload, problems)
    return Processed(payload, (), len(payload), len(payload))


def identified(handoff: Handoff, found: InboundMessage) -> InboundMessage:
    """Return a message with the key and the sender that the document computes. Raises InvalidInput."""
    values, problems = _identity(handoff, found.message)
    if problems:
        raise InvalidInput(problems, "message")
    return _with(found, values)


def identified_or_kept(handoff: Handoff, found: InboundMessage) -> InboundMessage:
    """As `identified`; what cannot be computed stays as the protocol says. `process` then finds the message invalid."""
    return _with(found, _identity(handoff, found.message)[0])


def _with(found: InboundMessage, values: Mapping[str, str]) -> InboundMessage:
    return replace(found, key=values.get("key", found.key), sender=values.get("sender", found.sender))


def _identity(handoff: Handoff, message: Mapping[str, Any]) -> tuple[dict[str, str], list[Problem]]:
    """Return the fields `key` and `sender` as far as they can be computed, and why the others cannot."""
    values, problems = dict[str, str](), list[Problem]()
    for name, expression in handoff.source.expressions().items():
        where = f"source.{name}"
        try:
            value = conditions.evaluate(expression, {"message": dict(message)})
        except StepFailure as failure:
            problems.append(Problem(where, failure.message))
            continue
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value):
            problems.append(Problem(where, "its value is no text", "a text or a whole number"))
        elif name == "key" and (len(str(value)) > MAX_KEY or "\x00" in str(value)):
            accepted = f"at most {MAX_KEY} characters, without NUL"
            problems.append(Problem(where, f"{str(value)[:60]!r} cannot be a key", accepted))
        else:
            values[name] = str(value)
    return values, problems


def _deviations(schema: Mapping[str, Any], value: Any, where: str) -> list[Problem]:
    if not schema:
        return []
    found = json_schema.deviations(schema, value, formats=True)
    return [Problem(f"{where}{one.where}", one.message) for one in islice(found, MAX_PROBLEMS)]


def _refused(schema: Mapping[str, Any], value: Mapping[str, Any], problems: list[Problem]) -> Processed:
    names = {*value, *schema.get("required", ()), *schema.get("properties", {})}
    wrong = {name for name in names for problem in problems if _names(problem, name)}
    return Processed({}, tuple(problems), len(names) - len(wrong), len(names))


def _names(problem: Problem, name: str) -> bool:
    _, _, path = problem.where.partition(".")
    return path.split(".")[0].split("[")[0] == name or (not path and f"'{name}'" in problem.message)
