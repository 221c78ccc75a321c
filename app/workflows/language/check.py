"""
Checks: whether a definition can run.

A definition that passes has unique ids, needs that exist and form no circle, templates that name what is there when
they are rendered, and schemas that are schemas and that a grammar can force.
Every problem is found in one reading, each with its path, its line where the source has lines, and what would do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from pydantic import ValidationError

from app import grammar, json_schema
from app.json_schema import Allowance
from app.kernel.errors import InvalidDefinition, InvalidInput, Problem
from app.kernel.security.egress import EgressPolicy
from app.workflows.expressions import conditions, templates, transforms
from app.workflows.expressions.templates import LISTED
from app.workflows.http import calls
from app.workflows.language import definition as definitions
from app.workflows.language import shape_errors, source
from app.workflows.language.definition import Definition
from app.workflows.language.source import DefinitionSource
from app.workflows.language.steps import (
    MODEL_KINDS,
    TIMED_OUT,
    AnyStep,
    EmbedFields,
    GenerateFields,
    HttpFields,
    JoinStep,
    MapBody,
    MapStep,
    Retry,
    WaitStep,
    branches_of,
)

#: Problems of one document that are told at a time.
MAX_PROBLEMS = 200


@dataclass(frozen=True, slots=True)
class Catalogued:
    """What is known of where it will run, so that what cannot work there is found at submission."""

    names: frozenset[str]
    #: What http steps may call; None where nobody knows the workers' settings.
    calls: EgressPolicy | None = None


def parse(text: str, models: Catalogued | None = None) -> Definition:
    """A definition from YAML or JSON text. Raises InvalidDefinition with every problem found."""
    return check(source.read(text), models)


def check(document: DefinitionSource, models: Catalogued | None = None) -> Definition:
    """A definition from plain data. Raises InvalidDefinition with every problem found."""
    try:
        definition = Definition.model_validate(document.data)
    except ValidationError as error:
        raise InvalidDefinition(_placed_in(document, shape_errors.problems(error.errors()[:MAX_PROBLEMS]))) from None
    allowance = json_schema.Allowance()
    problems = [
        *_graph_problems(definition),
        *_input_schema_problems(definition, allowance),
        *_step_problems(definition, models, allowance),
        *_run_problems(definition, allowance),
    ]
    if problems:
        raise InvalidDefinition(_placed_in(document, problems))
    return definition


def _placed_in(document: DefinitionSource, problems: Sequence[Problem]) -> list[Problem]:
    """The problems with their lines, in the order of these."""
    placed = [Problem(p.where, p.message, p.accepted, document.line(p.where)) for p in problems]
    placed.sort(key=lambda p: p.line or 0)
    if len(placed) > MAX_PROBLEMS:
        placed[MAX_PROBLEMS:] = [Problem("", "there are more problems than are listed here")]
    return placed


def _graph_problems(definition: Definition) -> list[Problem]:
    problems: list[Problem] = []
    places: dict[str, str] = {}
    for where, step in _placed(definition):
        if step.id in places:
            problems.append(Problem(f"{where}.id", f"{step.id!r} is the id of {places[step.id]} too", "unique ids"))
        places.setdefault(step.id, where)
    steps = {step.id: step for step in definition.all_steps()}
    sections: dict[str, dict[str, None]] = {"steps": {}, "on_failure": {}}
    for key, place in places.items():
        sections[place.partition("[")[0]][key] = None
    for where, step in _placed(definition):
        problems += islice(_need_problems(step, where, places, steps, sections), MAX_PROBLEMS)
        if len(problems) > MAX_PROBLEMS:
            return problems
        if step.join != "all" and not step.needs:
            message = f"join {step.join!r} with nothing to wait for"
            problems.append(Problem(f"{where}.join", message, "needs beside it, or no join"))
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
    step: AnyStep,
    where: str,
    places: Mapping[str, str],
    steps: Mapping[str, AnyStep],
    sections: Mapping[str, Mapping[str, None]],
) -> Iterator[Problem]:
    section = where.partition("[")[0]
    beside = sections[section]
    seen: set[str] = set()
    for j, (key, branch) in enumerate(definitions.needed(step)):
        at = f"{where}.needs[{j}]"
        if key == step.id:
            yield Problem(at, "a step cannot need itself", "another step's id, or nothing")
        elif key not in places:
            yield Problem(
                at, f"there is no step {key!r}", shape_errors.nearest(key, [one for one in beside if one != step.id])
            )
        elif key not in beside:
            late = section == "on_failure"
            why = "has ended before a step of on_failure begins" if late else "begins only when the run has failed"
            others = list(islice((one for one in beside if one != step.id), LISTED))
            yield Problem(at, f"{key!r} {why}", f"one of {', '.join(others)}" if others else "no needs")
        elif step.needs[j] in seen:
            yield Problem(at, f"{step.needs[j]!r} is needed twice", "each id once")
        elif branch is not None and branch not in branches_of(steps[key]):
            known = ", ".join(f"{key}.{name}" for name in branches_of(steps[key])) or f"{key}: it has no branches"
            if isinstance(steps[key], WaitStep) and branch == TIMED_OUT:
                known += "; with 'on_timeout: continue' the step has this one"
            yield Problem(at, f"the step {key!r} has no branch {branch!r}", known)
        seen.add(step.needs[j])


def _circle(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """One circle of needs, its first step again at its end; empty when there is none."""
    stuck = set(needs) - set(definitions.in_order(needs))
    if not stuck:
        return []
    #: The steps in the order in which they were come to.
    walk: dict[str, int] = {}
    key = min(stuck)
    while key not in walk:
        walk[key] = len(walk)
        key = next(need for need in needs[key] if need in stuck)
    circle = [*walk][walk[key] :]
    return [*circle[:LISTED], *(["…"] if len(circle) > LISTED else []), key]


def _input_schema_problems(definition: Definition, allowance: Allowance) -> list[Problem]:
    problems = []
    for name, schema in definition.inputs.items():
        where = f"inputs.{name}"
        if not name.isidentifier():
            problems.append(Problem(where, f"{name!r} cannot be named in a template", "letters, digits, underscores"))
        found = json_schema.problems(schema, where, allowance)
        if not found and "default" in schema:
            broken = json_schema.value_problems(schema, schema["default"], f"{where}.default")
            found = [
                replace(problem, message=f"the default breaks its own schema: {problem.message}") for problem in broken
            ]
        problems += found
    return problems


def _step_problems(definition: Definition, models: Catalogued | None, allowance: Allowance) -> list[Problem]:
    problems: list[Problem] = []
    needs = {step.id: [key for key, _ in definitions.needed(step)] for step in definition.all_steps()}
    sound = all(need in needs for of in needs.values() for need in of)
    before = definitions.ancestors(definition) if sound else {}
    for where, step in _placed(definition):
        scope = templates.Scope(definition.inputs, before.get(step.id, needs))
        if step.when is not None:
            problems += conditions.check(step.when, f"{where}.when", scope, wanted="bool")
        if step.retry.when is not None:
            problems += _retry_problems(step.retry, f"{where}.retry")
        problems += _work_problems(definition, step, where, scope, models, allowance)
        match step:
            case JoinStep() if not step.needs:
                problems.append(Problem(f"{where}.needs", "a join with nothing to wait for", "ids of steps"))
            case WaitStep(schema_=schema) if schema is not None:
                problems += json_schema.problems(schema, f"{where}.schema", allowance)
            case MapStep(step=inner):
                items = replace(scope, more=(*scope.more, "item", "index"))
                if inner.retry.when is not None:
                    problems += _retry_problems(inner.retry, f"{where}.step.retry")
                problems += _work_problems(definition, inner, f"{where}.step", items, models, allowance)
            case _:
                pass
    return problems


def _work_problems(
    definition: Definition,
    work: AnyStep | MapBody,
    where: str,
    scope: templates.Scope,
    models: Catalogued | None,
    allowance: Allowance,
) -> list[Problem]:
    """What is wrong with what a worker does, for a step or for each item."""
    problems: list[Problem] = []
    own = replace(scope, secrets=True) if isinstance(work, HttpFields) else scope
    for place, template in work.templates():
        problems += templates.check(template, f"{where}.{place}", own)
    if isinstance(work, HttpFields):
        problems += calls.check_headers(work.headers, f"{where}.headers")
        problems += calls.check_url(work.url, f"{where}.url", models.calls if models is not None else None)
    for place, expression, wanted in work.expressions():
        if place == "jmespath":
            problems += transforms.check_jmespath(expression, f"{where}.{place}", scope)
        elif isinstance(work, EmbedFields):
            problems += _text_problems(expression, f"{where}.{place}", scope)
        else:
            problems += conditions.check(expression, f"{where}.{place}", scope, wanted=wanted)
    if isinstance(work, MODEL_KINDS):
        problems += _model_problems(definition, work, where, models)
    if isinstance(work, GenerateFields) and work.output is not None:
        inside = f"{where}.output.schema"
        found = json_schema.problems(work.output.schema_, inside, allowance)
        problems += found or _grammar_problems(work.output.schema_, inside)
    return problems


_TEXTS: tuple[Literal["string", "list"], ...] = ("string", "list")


def _text_problems(expression: str, where: str, scope: templates.Scope) -> list[Problem]:
    """What is wrong with an expression that gives a text or a list of texts."""
    for_text, for_list = (conditions.check(expression, where, scope, wanted=kind) for kind in _TEXTS)
    if not for_text or not for_list:
        return []
    wider = (problem.message.replace("where a text is", "where a text, or a list of texts, is") for problem in for_text)
    return [replace(problem, message=message) for problem, message in zip(for_text, wider, strict=True)]


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
            yield Problem(place, message, shape_errors.nearest(name, models.names))


def _retry_problems(rule: Retry, where: str) -> list[Problem]:
    assert rule.when is not None
    scope = templates.Scope((), (), more=("error",), roots=())
    found = conditions.check(rule.when, f"{where}.when", scope, wanted="bool")
    names = "error.reason, error.message, error.attempt"
    return [replace(problem, accepted=names) if problem.accepted == "error" else problem for problem in found]


def _run_problems(definition: Definition, allowance: Allowance) -> list[Problem]:
    """What is wrong with what is said of the whole run."""
    problems: list[Problem] = []
    given = templates.Scope(definition.inputs, (), more=(), roots=("inputs",))
    if definition.concurrency is not None:
        problems += templates.check(definition.concurrency.key, "concurrency.key", given)
    if definition.deduplicate is not None:
        problems += templates.check(definition.deduplicate.key, "deduplicate.key", given)
    everything = templates.Scope(
        definition.inputs, [step.id for step in definition.steps], of="step that is done before the run ends"
    )
    for name, part in definition.parts().items():
        where = f"outputs.{name}" if isinstance(definition.outputs[name], str) else f"outputs.{name}.value"
        problems += conditions.check(part.value, where, everything, wanted="any")
        problems += json_schema.problems(part.schema_, f"outputs.{name}.schema", allowance)
    return problems


def _grammar_problems(schema: Mapping[str, Any], where: str) -> list[Problem]:
    try:
        grammar.to_gbnf(schema)
    except InvalidInput as error:
        return [Problem(f"{where}.{p.where}".rstrip("."), p.message, p.accepted) for p in error.problems]
    return []
