"""
Shape errors: where a document does not have the shape of a workflow.

Each pydantic error becomes a problem with its path in the document, what is wrong, and what would be accepted.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic_core import ErrorDetails

from app.kernel.errors import Problem
from app.kernel.units import durations
from app.workflows.language.agent import TOOL_NAME
from app.workflows.language.definition import LABEL, Definition
from app.workflows.language.generate_fields import TOOL_CHOICE_TAGS, VOCABULARY_ID
from app.workflows.language.step_work import HEADER, ID, NAME, NEED, DocumentPart
from app.workflows.language.steps import KINDS, AnyStep, MapBody

#: The tags of union alternatives, which pydantic adds to the location of an error.
_UNION_TAGS = frozenset({"priority_class", "priority_rank", "output_expression", "output_part", *TOOL_CHOICE_TAGS})


def problems(items: Sequence[ErrorDetails]) -> list[Problem]:
    """Return a problem for each error; an error that is only a consequence of another is left out."""
    return [_problem(item) for item in items if not _is_consequence(item, items)]


def nearest(name: str, known: Sequence[str] | Mapping[str, Any] | frozenset[str]) -> str:
    """Return the accepted names for a message, with the most similar one as a suggestion."""
    names = sorted(known)
    # The search for a similar name takes long over many names.
    close = difflib.get_close_matches(name[:100], names, n=1) if len(names) <= 1_000 else []
    listed = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"{listed}; did you mean {close[0]!r}?" if close else listed


def _is_consequence(item: ErrorDetails, items: Sequence[ErrorDetails]) -> bool:
    """Return whether an error follows from another: pydantic also reports a list of invalid items as too short."""
    depth = len(item["loc"])
    return item["type"] == "too_short" and any(
        other["loc"][:depth] == item["loc"] and len(other["loc"]) > depth for other in items
    )


#: What is accepted in each required field.
REQUIRED: Mapping[str, str] = {
    "workflow": "lower-case words joined by hyphens",
    "steps": "a list of steps",
    "id": "lower-case letters, digits and underscores, a letter first",
    "kind": " | ".join(KINDS),
    "cases": "branches and their conditions: {refund: \"steps.sort.output == 'refund'\"}",
    "conversation": "a template: the id of a conversation",
    "query": "a template: what is looked for",
    "text": "a template: the statement",
    "over": "an expression that returns a list",
    "step": "the work for each item: {kind: generate, prompt: …}",
    "url": "a template: https://host/path",
    "texts": "an expression that returns a string or a list of strings",
    "message": "a template: the question to the person",
    "request": "an expression that returns a request, such as inputs.request",
    "role": "system | user | assistant | tool",
    "function": "a function: {name: …, description: …, parameters: …}",
    "name": "a name",
    "tool": "a function of the installation, such as real_estate_value",
    "tools": "a list of tools, each with one of http, workflow, python, mcp and memory",
    "input": "an expression that returns a text or a list of messages, such as inputs.messages",
    "model": "the name of a model, such as smollm2:135m",
    "content": "a template",
    "schema": "a JSON Schema",
    "models": "a list of models",
    "key": "a template over the inputs",
    "window": durations.ACCEPTED,
    "class": "interactive | standard | batch",
    "value": "an expression",
    "draft": "the fields of a generate step: {model: …, prompt: …}",
    "action": "refine | resample | escalate | critique",
    "checks": "a list of {name: …, that: …}",
    "that": "a condition over output, such as output.total > 0",
    "tests": "a list of {name: …, code: …}, or an expression that returns one",
    "code": "statements in Python that raise when the output is wrong",
    "sources": "an expression that returns a text or a list of texts, such as inputs.text",
    "strategy": "cascade | vote | review | experts",
    "members": "a list of members: [{model: …}, {model: …}]",
}
#: Descriptions of the patterns of names.
_PATTERNS: Mapping[str, str] = {
    ID: "lower-case letters, digits and underscores, a letter first",
    NAME: "lower-case words joined by hyphens",
    NEED: "the id of a step, or a branch of it: route.refund",
    LABEL: "at most 63 letters, digits, '.', '_', '/' and '-', a letter or a digit first",
    HEADER: "letters, digits and hyphens",
    VOCABULARY_ID: "the id of a token: up to nine digits, in quotes",
    TOOL_NAME: "at most 64 letters, digits, '_' and '-', a letter or '_' first",
}
#: What is accepted in a mapping, by its field.
_MAPPINGS: Mapping[str, str] = {
    "inputs": "names and their JSON Schemas: {text: {type: string}}",
    "outputs": "names and their expressions: {text: steps.draft.output}",
    "labels": "names and strings: {team: support}",
}
#: The types of steps that a map can run for each item.
_MAP_BODIES: tuple[type[DocumentPart], ...] = get_args(get_args(MapBody)[0])
_KINDS_IN_MAP = tuple(get_args(part.model_fields["kind"].annotation)[0] for part in _MAP_BODIES)


def _problem(item: ErrorDetails) -> Problem:
    where, kind, given, context = _path(item["loc"]), item["type"], item["input"], item.get("ctx", {})
    field, shown = str(item["loc"][-1]) if item["loc"] else "", _shown(item["input"])
    match kind:
        case "extra_forbidden":
            return Problem(where, "unknown field", nearest(field, _fields(item["loc"][:-1])))
        case "missing":
            return Problem(where, "this field is missing", REQUIRED.get(field, ""))
        case "union_tag_not_found":
            return Problem(where, "the step has no field 'kind'", f"kind: {' | '.join(_kinds(item['loc']))}")
        case "union_tag_invalid":
            known = _kinds(item["loc"])
            hint = "; for more than one step, call a workflow" if context["tag"] in KINDS else ""
            return Problem(
                where, f"the kind {context['tag']!r} is not supported here", f"kind: {' | '.join(known)}{hint}"
            )
        case "model_attributes_type" | "model_type":
            return Problem(where, "this must be a mapping of fields")
        case "dict_type" | "mapping_type":
            accepted = _MAPPINGS.get(field) or ("{type: string}" if where.startswith("inputs.") else "")
            return Problem(where, f"{shown} is not a mapping", accepted)
        case "tuple_type" | "list_type":
            return Problem(where, f"{shown} is not a list", f"[{given}]" if isinstance(given, str) else "a list")
        case "string_type":
            quoted = f": write it in quotes, '{shown}'" if not isinstance(given, dict | list) else ""
            return Problem(where, f"{shown} is not a string", f"a string{quoted}")
        case "string_pattern_mismatch":
            return Problem(where, f"{shown} is not a valid name here", _PATTERNS[context["pattern"]])
        case "literal_error" | "enum":
            return Problem(where, f"{shown} is not supported here", context["expected"])
        case "bool_type" | "bool_parsing":
            return Problem(where, f"{shown} is not a boolean", "true, false")
        case "too_short" | "string_too_short":
            return Problem(where, "this is empty" if not given else item["msg"], f"at least {context['min_length']}")
        case "too_long" | "string_too_long":
            return Problem(where, "this is too long", f"at most {context['max_length']}")
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return Problem(where, f"{shown} is out of range", _bounds(context))
        case "value_error":
            return Problem(where, item["msg"].removeprefix("Value error, "))
    return Problem(where, f"{shown}: {item['msg']}")


def _bounds(context: Mapping[str, Any]) -> str:
    words = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
    found = ((word, context[sign]) for sign, word in words.items() if sign in context)
    return " and ".join(f"{word} {int(bound) if bound == int(bound) else bound}" for word, bound in found)


def _shown(value: Any) -> str:
    """Return a value for a message, in YAML syntax."""
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _path(location: Sequence[str | int]) -> str:
    """Return the path in the document of a pydantic location."""
    own_parts = (part for part, own in _document_parts(location) if own and part != "[key]")
    parts = (part if isinstance(part, int) else part[:200] for part in own_parts)
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def _document_parts(location: Sequence[str | int]) -> Iterator[tuple[str | int, bool]]:
    """Yield each part of a location, and whether it is in the document: tags of kinds and of unions are not."""
    before: str | int | None = None
    for part in location:
        tag = (part in KINDS and (isinstance(before, int) or before == "step")) or part in _UNION_TAGS
        yield part, not tag
        before = part


def _kinds(location: Sequence[str | int]) -> tuple[str, ...]:
    return _KINDS_IN_MAP if "step" in location else KINDS


def _fields(location: Sequence[str | int]) -> list[str]:
    """Return the names of the fields that are accepted at a location."""
    place: type[DocumentPart] = Definition
    in_map = False
    for part, own in _document_parts(location):
        if not own:
            choice = _MAP_BODIES if in_map else get_args(AnyStep)
            place = next((one for one in choice if part in get_args(one.model_fields["kind"].annotation)), place)
            continue
        in_map = in_map or part == "step"
        field = next((field for name, field in place.model_fields.items() if part == (field.alias or name)), None)
        inner = list(_parts(field.annotation)) if field else []
        if len(inner) == 1:
            place = inner[0]
    return [field.alias or name for name, field in place.model_fields.items()]


def _parts(annotation: Any) -> Iterator[type[DocumentPart]]:
    """Yield the document types that an annotation contains."""
    if isinstance(annotation, type) and issubclass(annotation, DocumentPart):
        yield annotation
    for inner in get_args(annotation):
        yield from _parts(inner)
