"""
Checks: whether a definition can run.

A definition that passes has unique ids, needs that exist and form no circle, templates that name what is there when
they are rendered, and schemas that are schemas and that a grammar can force.
Every problem is found in one reading, each with its path, its line where the source has lines, and what would do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from jsonschema import Draft202012Validator, SchemaError
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from app.kernel import grammar
from app.kernel.egress import Policy
from app.kernel.errors import InvalidDefinition, InvalidInput, Problem
from app.workflows import calls, conditions, expressions, source, transforms
from app.workflows import definition as definitions
from app.workflows.definition import Concurrency, Deduplicate, Defaults, Definition, Rank
from app.workflows.source import Source
from app.workflows.steps import (
    KINDS,
    MODEL_KINDS,
    AnyStep,
    Approval,
    Body,
    EmbedFields,
    Fallback,
    GenerateFields,
    HttpFields,
    JoinStep,
    MapStep,
    MessageTemplate,
    OutputFields,
    Part,
    Retry,
    SamplingFields,
    WaitStep,
    branches_of,
)


@dataclass(frozen=True, slots=True)
class Catalogued:
    """What is known of where it will run, so that what cannot work there is found at submission."""

    names: frozenset[str]
    #: What http steps may call; None where nobody knows the workers' settings.
    calls: Policy | None = None


def parse(text: str, models: Catalogued | None = None) -> Definition:
    """A definition from YAML or JSON text. Raises InvalidDefinition with every problem found."""
    return check(source.read(text), models)


def check(document: Source, models: Catalogued | None = None) -> Definition:
    """A definition from plain data. Raises InvalidDefinition with every problem found."""
    try:
        definition = Definition.model_validate(document.data)
    except ValidationError as error:
        items = error.errors()
        raise InvalidDefinition(
            [_shape_problem(item, document) for item in items if not _follows(item, items)]
        ) from None
    problems = [
        *_graph_problems(definition),
        *_input_schema_problems(definition),
        *_step_problems(definition, models),
        *_run_problems(definition),
    ]
    if problems:
        placed = [Problem(p.where, p.message, p.accepted, document.line(p.where)) for p in problems]
        raise InvalidDefinition(sorted(placed, key=lambda p: p.line or 0))
    return definition


def _graph_problems(definition: Definition) -> list[Problem]:
    problems: list[Problem] = []
    places: dict[str, str] = {}
    for where, step in _placed(definition):
        if step.id in places:
            problems.append(Problem(f"{where}.id", f"{step.id!r} is the id of {places[step.id]} too", "unique ids"))
        places.setdefault(step.id, where)
    steps = {step.id: step for step in definition.all_steps()}
    for where, step in _placed(definition):
        problems += _need_problems(step, where, places, steps)
        if step.join != "all" and not step.needs:
            problems.append(Problem(f"{where}.join", f"join {step.join!r} with nothing to wait for", "needs"))
    needs = {step.id: [key for key, _ in definitions.needed(step)] for step in definition.all_steps()}
    if not problems and (circle := _circle(needs)):
        where = f"{places[circle[0]]}.needs"
        problems.append(
            Problem(where, f"the steps need each other in a circle: {' → '.join(circle)}", "an acyclic graph")
        )
    return problems


def _placed(definition: Definition) -> Iterator[tuple[str, AnyStep]]:
    """Every step, with its place in the document."""
    yield from ((f"steps[{i}]", step) for i, step in enumerate(definition.steps))
    yield from ((f"on_failure[{i}]", step) for i, step in enumerate(definition.on_failure))


def _need_problems(
    step: AnyStep, where: str, places: Mapping[str, str], steps: Mapping[str, AnyStep]
) -> Iterator[Problem]:
    section = where.partition("[")[0]
    beside = [key for key, place in places.items() if place.partition("[")[0] == section]
    for j, (key, branch) in enumerate(definitions.needed(step)):
        at = f"{where}.needs[{j}]"
        if key == step.id:
            yield Problem(at, "a step cannot need itself", "another step's id, or nothing")
        elif key not in places:
            yield Problem(at, f"there is no step {key!r}", _nearest(key, beside))
        elif key not in beside:
            message = f"{key!r} stands among the {places[key].partition('[')[0]}: they begin when nothing else goes on"
            yield Problem(at, message, f"one of the {section}: {', '.join(beside)}")
        elif step.needs[j] in step.needs[:j]:
            yield Problem(at, f"{step.needs[j]!r} is needed twice", "each id once")
        elif branch is not None and branch not in branches_of(steps[key]):
            known = ", ".join(f"{key}.{name}" for name in branches_of(steps[key])) or f"{key}: it has no branches"
            yield Problem(at, f"the step {key!r} has no branch {branch!r}", known)


def _circle(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """One circle of needs, its first step again at its end; empty when there is none."""
    stuck = set(needs) - set(definitions.in_order(needs))
    if not stuck:
        return []
    walk: list[str] = []
    key = min(stuck)
    while key not in walk:
        walk.append(key)
        key = next(need for need in needs[key] if need in stuck)
    return [*walk[walk.index(key) :], key]


def _input_schema_problems(definition: Definition) -> list[Problem]:
    problems = []
    for name, schema in definition.inputs.items():
        where = f"inputs.{name}"
        if not name.isidentifier():
            problems.append(Problem(where, f"{name!r} cannot be named in a template", "letters, digits, underscores"))
        found = schema_problems(schema, where)
        if not found and "default" in schema:
            errors = sorted(Draft202012Validator(schema).iter_errors(schema["default"]), key=str)
            found = [Problem(f"{where}.default", f"the default breaks its own schema: {e.message}") for e in errors]
        problems += found
    return problems


def schema_problems(schema: Mapping[str, Any], where: str) -> list[Problem]:
    """Empty when the value is a JSON Schema of the draft 2020-12."""
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        inner = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        return [Problem(f"{where}{inner}", f"this is no JSON Schema: {error.message}", "JSON Schema, draft 2020-12")]
    return []


def _step_problems(definition: Definition, models: Catalogued | None) -> list[Problem]:
    problems: list[Problem] = []
    needs = {step.id: [key for key, _ in definitions.needed(step)] for step in definition.all_steps()}
    sound = all(need in needs for of in needs.values() for need in of)
    before = definitions.ancestors(definition) if sound else {}
    for where, step in _placed(definition):
        scope = expressions.Scope(definition.inputs, sorted(before.get(step.id, needs)))
        if step.when is not None:
            problems += conditions.check(step.when, f"{where}.when", scope, wanted="bool")
        if step.retry.when is not None:
            problems += _retry_problems(step.retry, f"{where}.retry")
        problems += _work_problems(definition, step, where, scope, models)
        match step:
            case JoinStep() if not step.needs:
                problems.append(Problem(f"{where}.needs", "a join with nothing to wait for", "ids of steps"))
            case WaitStep(schema_=schema) if schema is not None:
                problems += schema_problems(schema, f"{where}.schema")
            case MapStep(step=inner):
                items = replace(scope, more=(*scope.more, "item", "index"))
                if inner.retry.when is not None:
                    problems += _retry_problems(inner.retry, f"{where}.step.retry")
                problems += _work_problems(definition, inner, f"{where}.step", items, models)
            case _:
                pass
    return problems


def _work_problems(
    definition: Definition, work: AnyStep | Body, where: str, scope: expressions.Scope, models: Catalogued | None
) -> list[Problem]:
    """What is wrong with what a worker does, for a step or for each item."""
    problems: list[Problem] = []
    own = replace(scope, secrets=True) if isinstance(work, HttpFields) else scope
    for place, template in work.templates():
        problems += expressions.check(template, f"{where}.{place}", own)
    if isinstance(work, HttpFields) and models is not None and models.calls is not None:
        problems += calls.check_url(work.url, f"{where}.url", models.calls)
    for place, expression, wanted in work.expressions():
        if place == "jmespath":
            problems += transforms.check_jmespath(expression, f"{where}.{place}", scope)
        else:
            problems += conditions.check(expression, f"{where}.{place}", scope, wanted=wanted)
    if isinstance(work, MODEL_KINDS):
        problems += _model_problems(definition, work, where, models)
    if isinstance(work, GenerateFields) and work.output is not None:
        inside = f"{where}.output.schema"
        found = schema_problems(work.output.schema_, inside)
        problems += found or _grammar_problems(work.output.schema_, inside)
    return problems


def _model_problems(
    definition: Definition, work: GenerateFields | EmbedFields, where: str, models: Catalogued | None
) -> Iterator[Problem]:
    model = work.model or definition.defaults.model
    if model is None:
        yield Problem(where, "the step names no model", "a model here, or one for all steps under defaults.model")
        return
    named = [(f"{where}.model" if work.model else "defaults.model", model)]
    if work.fallback is not None:
        named += [(f"{where}.fallback.models[{i}]", other) for i, other in enumerate(work.fallback.models)]
    for place, name in named:
        if models is not None and name not in models.names:
            message = f"there is no model {name!r} in the catalogue"
            yield Problem(place, message, _nearest(name, models.names))


def _retry_problems(rule: Retry, where: str) -> list[Problem]:
    assert rule.when is not None
    scope = expressions.Scope((), (), more=("error",))
    return conditions.check(rule.when, f"{where}.when", scope, wanted="bool")


def _run_problems(definition: Definition) -> list[Problem]:
    """What is wrong with what is said of the whole run."""
    problems: list[Problem] = []
    given = expressions.Scope(definition.inputs, (), more=())
    if definition.concurrency is not None:
        problems += expressions.check(definition.concurrency.key, "concurrency.key", given)
    if definition.deduplicate is not None:
        problems += expressions.check(definition.deduplicate.key, "deduplicate.key", given)
    everything = expressions.Scope(definition.inputs, [step.id for step in definition.steps])
    for name, part in definition.parts().items():
        where = f"outputs.{name}" if isinstance(definition.outputs[name], str) else f"outputs.{name}.value"
        problems += conditions.check(part.value, where, everything, wanted="any")
        problems += schema_problems(part.schema_, f"outputs.{name}.schema")
    return problems


def _grammar_problems(schema: Mapping[str, Any], where: str) -> list[Problem]:
    try:
        grammar.to_gbnf(schema)
    except InvalidInput as error:
        return [Problem(f"{where}.{p.where}".rstrip("."), p.message, p.accepted) for p in error.problems]
    return []


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any] | frozenset[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    listed = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"{listed}; did you mean {close[0]!r}?" if close else listed


#: Messages of pydantic that say less than we can.
_PLAIN: Mapping[str, str] = {
    "extra_forbidden": "there is no such field here",
    "missing": "this field is missing",
    "union_tag_not_found": "the step has no 'kind'",
}


def _follows(item: ErrorDetails, items: Sequence[ErrorDetails]) -> bool:
    """A list whose items are all wrong is called too short as well."""
    depth = len(item["loc"])
    return item["type"] == "too_short" and any(
        other["loc"][:depth] == item["loc"] and len(other["loc"]) > depth for other in items
    )


def _shape_problem(item: ErrorDetails, document: Source) -> Problem:
    parts = _path(item)
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    kind = item["type"]
    message = _PLAIN.get(kind) or item["msg"].removeprefix("Value error, ")
    accepted = ""
    if kind == "extra_forbidden":
        accepted = _fields_beside(item)
    elif kind in {"union_tag_not_found", "union_tag_invalid"}:
        accepted = f"kind: {' | '.join(KINDS)}"
    elif kind == "model_attributes_type" or kind == "model_type":
        message = "this must be a mapping of fields"
    elif kind == "string_pattern_mismatch":
        message = f"{item['input']!r} is not written as a name here"
        accepted = "lower-case letters, digits and " + ("hyphens" if where == "workflow" else "underscores")
    elif not isinstance(item["input"], dict | list):
        message = f"{item['input']!r}: {message}"
    return Problem(where, message, accepted, document.line(where))


#: What pydantic calls the alternatives of a union.
_TAGS = frozenset({"priority_class", "priority_rank", "output_expression", "output_part"})


def _path(item: ErrorDetails) -> list[str | int]:
    """Where it is, without what pydantic puts between: the tag of a step's kind, the alternatives of a union."""
    found: list[str | int] = []
    for i, part in enumerate(item["loc"]):
        before = item["loc"][i - 1] if i else None
        tag = part in KINDS and (isinstance(before, int) or before == "step")
        if not tag and part not in _TAGS:
            found.append(part)
    return found


def _fields_beside(item: ErrorDetails) -> str:
    """The fields that stand where an unknown one was written."""
    place: type[BaseModel] | None = Definition
    location = list(item["loc"])[:-1]
    kinds = {get_args(part.model_fields["kind"].annotation)[0]: part for part in get_args(AnyStep)}
    inner: Mapping[str, type[Part]] = {
        "defaults": Defaults,
        "concurrency": Concurrency,
        "deduplicate": Deduplicate,
        "priority": Rank,
        "retry": Retry,
        "fallback": Fallback,
        "approval": Approval,
        "sampling": SamplingFields,
        "messages": MessageTemplate,
        "output": OutputFields,
    }
    for part in location:
        if isinstance(part, str):
            place = kinds.get(part) or inner.get(part) or place
    fields = [field.alias or name for name, field in (place or Definition).model_fields.items()]
    return _nearest(str(item["loc"][-1]), fields)
