"""
Misfits: where a document has not the shape of a workflow, in the words of who writes one.

What pydantic found becomes a problem with its path in the document, what is wrong there, and what would be accepted.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic_core import ErrorDetails

from app.kernel.errors import Problem
from app.kernel.units import durations
from app.workflows.language.definition import LABEL, Definition
from app.workflows.language.steps import HEADER, ID, KINDS, NAME, NEED, AnyStep, DocumentPart, MapBody

#: What pydantic calls the alternatives of a union.
_TAGS = frozenset({"priority_class", "priority_rank", "output_expression", "output_part"})


def problems(items: Sequence[ErrorDetails]) -> list[Problem]:
    """One problem for each thing that is wrong; what only follows from another is left out."""
    return [_problem(item) for item in items if not _follows(item, items)]


def nearest(name: str, known: Sequence[str] | Mapping[str, Any] | frozenset[str]) -> str:
    """What would have been accepted instead of a name, for a message."""
    names = sorted(known)
    # A resemblance is looked for as long as that takes no time.
    close = difflib.get_close_matches(name[:100], names, n=1) if len(names) <= 1_000 else []
    listed = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"{listed}; did you mean {close[0]!r}?" if close else listed


def _follows(item: ErrorDetails, items: Sequence[ErrorDetails]) -> bool:
    """A list whose items are all wrong is called too short as well."""
    depth = len(item["loc"])
    return item["type"] == "too_short" and any(
        other["loc"][:depth] == item["loc"] and len(other["loc"]) > depth for other in items
    )


#: What is to stand in a field that must be there.
REQUIRED: Mapping[str, str] = {
    "workflow": "lower-case words joined by hyphens",
    "steps": "a list of steps",
    "id": "lower-case letters, digits and underscores, a letter first",
    "kind": " | ".join(KINDS),
    "cases": "branches and their conditions: {refund: \"steps.sort.output == 'refund'\"}",
    "over": "an expression that gives a list",
    "step": "what is done for each item: {kind: generate, prompt: …}",
    "url": "a template: https://host/path",
    "texts": "an expression that gives a text, or a list of texts",
    "message": "a template: what the person reads",
    "role": "system | user | assistant",
    "content": "a template",
    "schema": "a JSON Schema",
    "models": "a list of models",
    "key": "a template over the inputs",
    "window": durations.ACCEPTED,
    "class": "interactive | standard | batch",
    "value": "an expression",
}
#: Names that are written by a rule, by its pattern.
_NAMES: Mapping[str, str] = {
    ID: "lower-case letters, digits and underscores, a letter first",
    NAME: "lower-case words joined by hyphens",
    NEED: "the id of a step, or a branch of it: route.refund",
    LABEL: "63 letters, digits, '.', '_', '/' and '-' at the most, a letter or a digit first",
    HEADER: "letters, digits and hyphens",
}
#: What stands in a mapping, by its field.
_MAPPINGS: Mapping[str, str] = {
    "inputs": "names and their JSON Schemas: {text: {type: string}}",
    "outputs": "names and their expressions: {text: steps.draft.output}",
    "labels": "names and texts: {team: support}",
}
#: What can be done for each item of a map.
_BODIES: tuple[type[DocumentPart], ...] = get_args(get_args(MapBody)[0])
_KINDS_IN_MAP = tuple(get_args(part.model_fields["kind"].annotation)[0] for part in _BODIES)


def _problem(item: ErrorDetails) -> Problem:
    where, kind, given, context = _path(item["loc"]), item["type"], item["input"], item.get("ctx", {})
    field, shown = str(item["loc"][-1]) if item["loc"] else "", _shown(item["input"])
    match kind:
        case "extra_forbidden":
            return Problem(where, "there is no such field here", nearest(field, _fields(item["loc"][:-1])))
        case "missing":
            return Problem(where, "this field is missing", REQUIRED.get(field, ""))
        case "union_tag_not_found":
            return Problem(where, "the step has no 'kind'", f"kind: {' | '.join(_kinds(item['loc']))}")
        case "union_tag_invalid":
            known = _kinds(item["loc"])
            more = "; for more than one step, call a workflow" if context["tag"] in KINDS else ""
            return Problem(where, f"there is no kind {context['tag']!r} here", f"kind: {' | '.join(known)}{more}")
        case "model_attributes_type" | "model_type":
            return Problem(where, "this must be a mapping of fields")
        case "dict_type" | "mapping_type":
            accepted = _MAPPINGS.get(field) or ("{type: string}" if where.startswith("inputs.") else "")
            return Problem(where, f"{shown} is no mapping", accepted)
        case "tuple_type" | "list_type":
            return Problem(where, f"{shown} is no list", f"[{given}]" if isinstance(given, str) else "a list")
        case "string_type":
            quoted = f": write it in quotes, '{shown}'" if not isinstance(given, dict | list) else ""
            return Problem(where, f"{shown} is no text", f"a text{quoted}")
        case "string_pattern_mismatch":
            return Problem(where, f"{shown} is not written as a name here", _NAMES[context["pattern"]])
        case "literal_error" | "enum":
            return Problem(where, f"{shown} is not offered here", context["expected"])
        case "bool_type" | "bool_parsing":
            return Problem(where, f"{shown} is no truth value", "true, false")
        case "too_short" | "string_too_short":
            return Problem(where, "this is empty" if not given else item["msg"], f"at least {context['min_length']}")
        case "too_long" | "string_too_long":
            return Problem(where, "this is too long", f"at most {context['max_length']}")
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return Problem(where, f"{shown} is out of range", _bound(context))
        case "value_error":
            return Problem(where, item["msg"].removeprefix("Value error, "))
    return Problem(where, f"{shown}: {item['msg']}")


def _bound(context: Mapping[str, Any]) -> str:
    words = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
    found = ((word, context[sign]) for sign, word in words.items() if sign in context)
    return " and ".join(f"{word} {int(bound) if bound == int(bound) else bound}" for word, bound in found)


def _shown(value: Any) -> str:
    """A value for a message, as YAML has it."""
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _path(location: Sequence[str | int]) -> str:
    """Where it is, without what pydantic puts between."""
    parts = (part if isinstance(part, int) else part[:200] for part, own in _own(location) if own and part != "[key]")
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def _own(location: Sequence[str | int]) -> Iterator[tuple[str | int, bool]]:
    """Each part of a place, and whether it stands in the document: tags of kinds and of alternatives do not."""
    before: str | int | None = None
    for part in location:
        tag = (part in KINDS and (isinstance(before, int) or before == "step")) or part in _TAGS
        yield part, not tag
        before = part


def _kinds(location: Sequence[str | int]) -> tuple[str, ...]:
    return _KINDS_IN_MAP if "step" in location else KINDS


def _fields(location: Sequence[str | int]) -> list[str]:
    """The fields that can stand at a place."""
    place: type[DocumentPart] = Definition
    in_map = False
    for part, own in _own(location):
        if not own:
            choice = _BODIES if in_map else get_args(AnyStep)
            place = next((one for one in choice if part in get_args(one.model_fields["kind"].annotation)), place)
            continue
        in_map = in_map or part == "step"
        field = next((field for name, field in place.model_fields.items() if part == (field.alias or name)), None)
        inner = list(_parts(field.annotation)) if field else []
        if len(inner) == 1:
            place = inner[0]
    return [field.alias or name for name, field in place.model_fields.items()]


def _parts(annotation: Any) -> Iterator[type[DocumentPart]]:
    """The mappings of fields that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, DocumentPart):
        yield annotation
    for inner in get_args(annotation):
        yield from _parts(inner)
