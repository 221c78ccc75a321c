"""
Checks of a definition at submission.

A definition that passes has unique step ids, existing needs without a cycle, templates and expressions that use only
names that will exist, valid JSON Schemas, and output schemas that a grammar can enforce.
One call reports every problem, each with its path, its line (where the source has lines) and what would be accepted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal

from pydantic import ValidationError

from app import grammar, json_schema
from app.catalog.catalog import Catalog
from app.catalog.serving import selector as selectors
from app.grammar import gbnf_source
from app.json_schema import Allowance
from app.kernel.errors import InvalidDefinition, InvalidInput, Problem
from app.kernel.security.egress import EgressPolicy
from app.workflows.expressions import conditions, templates, transforms
from app.workflows.expressions.templates import LISTED
from app.workflows.http import calls
from app.workflows.language import definition as definitions
from app.workflows.language import shape_errors, source
from app.workflows.language.agent import ARGUMENTS, AgentFields
from app.workflows.language.compression import CompressFields, CompressionFields
from app.workflows.language.definition import Definition
from app.workflows.language.ensemble import EnsembleFields
from app.workflows.language.generate_fields import GenerateFields
from app.workflows.language.http_fields import HttpFields
from app.workflows.language.recall import EmbedPassagesFields
from app.workflows.language.refine import RefineFields
from app.workflows.language.source import SourceDocument
from app.workflows.language.step_work import Retry
from app.workflows.language.steps import (
    DRAFT_KINDS,
    MODEL_KINDS,
    TIMED_OUT,
    AnyStep,
    EmbedFields,
    JoinStep,
    MapBody,
    MapStep,
    ModelWork,
    WaitStep,
    branches_of,
)
from app.workflows.language.verification import SchemaVerifier, VerifyFields

#: Maximum number of reported problems of one document.
MAX_PROBLEMS = 200


@dataclass(frozen=True, slots=True)
class Deployment:
    """The models and the egress policy of the installation that a definition is checked against."""

    models: Catalog
    #: The servers that http steps may call; None where the workers' settings are not known.
    egress: EgressPolicy | None = None


def parse(text: str, deployment: Deployment | None = None) -> Definition:
    """Return a definition from YAML or JSON text. Raises InvalidDefinition with every problem found."""
    return check(source.read(text), deployment)


def check(document: SourceDocument, deployment: Deployment | None = None) -> Definition:
    """Return a definition from plain data. Raises InvalidDefinition with every problem found."""
    try:
        definition = Definition.model_validate(document.data)
    except ValidationError as error:
        raise InvalidDefinition(_with_lines(document, shape_errors.problems(error.errors()[:MAX_PROBLEMS]))) from None
    allowance = json_schema.Allowance()
    problems = [
        *_graph_problems(definition),
        *_input_schema_problems(definition, allowance),
        *_step_problems(definition, deployment, allowance),
        *_run_problems(definition, allowance),
    ]
    if problems:
        raise InvalidDefinition(_with_lines(document, problems))
    return definition


def _with_lines(document: SourceDocument, problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems with their lines, sorted by line and limited to MAX_PROBLEMS."""
    placed = [Problem(p.where, p.message, p.accepted, document.line(p.where)) for p in problems]
    placed.sort(key=lambda p: p.line or 0)
    if len(placed) > MAX_PROBLEMS:
        placed[MAX_PROBLEMS:] = [Problem("", "there are more problems than are listed here")]
    return placed


def _graph_problems(definition: Definition) -> list[Problem]:
    problems: list[Problem] = []
    places: dict[str, str] = {}
    for where, step in _steps_with_paths(definition):
        if step.id in places:
            message = f"{step.id!r} is already the id of {places[step.id]}"
            problems.append(Problem(f"{where}.id", message, "unique ids"))
        places.setdefault(step.id, where)
    steps = {step.id: step for step in definition.all_steps()}
    sections: dict[str, dict[str, None]] = {"steps": {}, "on_failure": {}}
    for key, place in places.items():
        sections[place.partition("[")[0]][key] = None
    for where, step in _steps_with_paths(definition):
        problems += islice(_need_problems(step, where, places, steps, sections), MAX_PROBLEMS)
        if len(problems) > MAX_PROBLEMS:
            return problems
        if step.join != "all" and not step.needs:
            message = f"join {step.join!r} without 'needs'"
            problems.append(Problem(f"{where}.join", message, "'needs' in the same step, or no 'join'"))
    needs = {step.id: [key for key, _ in definitions.needs_of(step)] for step in definition.all_steps()}
    if not problems and (cycle := _cycle(needs)):
        where = f"{places[cycle[0]]}.needs"
        problems.append(Problem(where, f"the steps form a cycle: {' → '.join(cycle)}", "an acyclic graph"))
    return problems


def _steps_with_paths(definition: Definition) -> Iterator[tuple[str, AnyStep]]:
    """Yield every step with its path in the document."""
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
    siblings = sections[section]
    seen: set[str] = set()
    for j, (key, branch) in enumerate(definitions.needs_of(step)):
        at = f"{where}.needs[{j}]"
        if key == step.id:
            yield Problem(at, "a step cannot need itself", "another step's id, or nothing")
        elif key not in places:
            yield Problem(
                at,
                f"there is no step {key!r}",
                shape_errors.nearest(key, [other for other in siblings if other != step.id]),
            )
        elif key not in siblings:
            on_failure = section == "on_failure"
            reason = "has ended before a step of on_failure starts" if on_failure else "starts only after the run fails"
            others = list(islice((other for other in siblings if other != step.id), LISTED))
            yield Problem(at, f"{key!r} {reason}", f"one of {', '.join(others)}" if others else "no needs")
        elif step.needs[j] in seen:
            yield Problem(at, f"{step.needs[j]!r} is listed twice", "each id once")
        elif branch is not None and branch not in branches_of(steps[key]):
            known = ", ".join(f"{key}.{name}" for name in branches_of(steps[key])) or f"{key}: it has no branches"
            if isinstance(steps[key], WaitStep) and branch == TIMED_OUT:
                known += "; with 'on_timeout: continue' the step has this one"
            yield Problem(at, f"the step {key!r} has no branch {branch!r}", known)
        seen.add(step.needs[j])


def _cycle(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Return one cycle of needs, with its first step repeated at the end; empty when there is none."""
    unordered = set(needs) - set(definitions.topological_order(needs))
    if not unordered:
        return []
    #: The visited steps, in order.
    walk: dict[str, int] = {}
    key = min(unordered)
    while key not in walk:
        walk[key] = len(walk)
        key = next(need for need in needs[key] if need in unordered)
    cycle = [*walk][walk[key] :]
    return [*cycle[:LISTED], *(["…"] if len(cycle) > LISTED else []), key]


def _input_schema_problems(definition: Definition, allowance: Allowance) -> list[Problem]:
    problems = []
    for name, schema in definition.inputs.items():
        where = f"inputs.{name}"
        if not name.isidentifier():
            problems.append(
                Problem(where, f"{name!r} cannot be used as a name in a template", "letters, digits, underscores")
            )
        found = json_schema.problems(schema, where, allowance)
        if not found and "default" in schema:
            broken = json_schema.value_problems(schema, schema["default"], f"{where}.default")
            found = [
                replace(problem, message=f"the default does not conform to its schema: {problem.message}")
                for problem in broken
            ]
        problems += found
    return problems


def _step_problems(definition: Definition, deployment: Deployment | None, allowance: Allowance) -> list[Problem]:
    problems: list[Problem] = []
    needs = {step.id: [key for key, _ in definitions.needs_of(step)] for step in definition.all_steps()}
    all_needs_exist = all(need in needs for of in needs.values() for need in of)
    before = definitions.ancestors(definition) if all_needs_exist else {}
    for where, step in _steps_with_paths(definition):
        needs_with = partial(_needs_with, step, before)
        scope = templates.Scope(definition.inputs, before.get(step.id, needs), needs_with=needs_with)
        if step.when is not None:
            problems += conditions.check(step.when, f"{where}.when", scope, result_type="bool")
        if step.retry.when is not None:
            problems += _retry_problems(step.retry, f"{where}.retry")
        problems += _work_problems(definition, step, where, scope, deployment, allowance)
        match step:
            case JoinStep() if not step.needs:
                problems.append(Problem(f"{where}.needs", "a join step without 'needs'", "ids of steps"))
            case WaitStep(schema_=schema) if schema is not None:
                problems += json_schema.problems(schema, f"{where}.schema", allowance)
            case MapStep(step=inner):
                items = replace(scope, extra=(*scope.extra, "item", "index"))
                if inner.retry.when is not None:
                    problems += _retry_problems(inner.retry, f"{where}.step.retry")
                problems += _work_problems(definition, inner, f"{where}.step", items, deployment, allowance)
            case _:
                pass
    return problems


def _needs_with(step: AnyStep, before: Mapping[str, Collection[str]], other: str) -> str:
    """Return the needs of a step with another one added; empty when there is no such step, or it would be a cycle."""
    if other not in before or other == step.id or step.id in before[other]:
        return ""
    return f"needs: [{', '.join([*step.needs, other])}]"


def _work_problems(
    definition: Definition,
    work: AnyStep | MapBody,
    where: str,
    scope: templates.Scope,
    deployment: Deployment | None,
    allowance: Allowance,
) -> list[Problem]:
    """Return the problems of the work of a step, or of each item of a map."""
    problems: list[Problem] = []
    own = replace(scope, secrets=True) if isinstance(work, HttpFields) else scope
    for place, template in work.templates():
        problems += templates.check(template, f"{where}.{place}", own)
    if isinstance(work, HttpFields):
        problems += calls.check_headers(work.headers, f"{where}.headers")
        problems += calls.check_url(work.url, f"{where}.url", deployment.egress if deployment is not None else None)
    scope = replace(scope, extra=(*scope.extra, *work.own_names()))
    for place, expression, result_type in work.expressions():
        if place == "jmespath":
            problems += transforms.check_jmespath(expression, f"{where}.{place}", scope)
        elif isinstance(work, EmbedFields):
            problems += _text_problems(expression, f"{where}.{place}", scope)
        else:
            problems += conditions.check(expression, f"{where}.{place}", scope, result_type=result_type)
    if isinstance(work, MODEL_KINDS):
        problems += _model_problems(definition, work, where, deployment)
    if isinstance(work, CompressFields) and deployment is not None:
        problems += compression_problems(work, where, deployment.models)
    if isinstance(work, GenerateFields):
        problems += _form_problems(work, where, allowance)
    if isinstance(work, AgentFields):
        problems += _agent_problems(work, where, scope, deployment, allowance)
    if isinstance(work, DRAFT_KINDS):
        problems += _draft_problems(definition, work, where, deployment, allowance)
    if isinstance(work, (*DRAFT_KINDS, VerifyFields)):
        for i, verifier in enumerate(work.verifiers):
            if isinstance(verifier, SchemaVerifier):
                problems += json_schema.problems(verifier.schema_, f"{where}.verifiers[{i}].schema", allowance)
    return problems


def _draft_problems(
    definition: Definition,
    work: RefineFields | EnsembleFields,
    where: str,
    deployment: Deployment | None,
    allowance: Allowance,
) -> Iterator[Problem]:
    """Return the problems of what a step drafts, with each of its models."""
    for place, draft in work.drafts():
        yield from _model_problems(definition, draft, f"{where}.{place}", deployment)
        yield from _form_problems(draft, f"{where}.{place}", allowance)
        for named, model in work.models():
            other = draft.model_copy(update={"model": model, "fallback": None})
            at = partial(_moved, f"{where}.{place}.model", f"{where}.{named}")
            yield from map(at, _model_problems(definition, other, f"{where}.{place}", deployment))


def _agent_problems(
    work: AgentFields, where: str, scope: templates.Scope, deployment: Deployment | None, allowance: Allowance
) -> Iterator[Problem]:
    """Return the problems of the tools and of the answer of an agent."""
    egress = None if deployment is None else deployment.egress
    inside = replace(scope, secrets=True, extra=(*scope.extra, ARGUMENTS))
    for place, template in work.tool_templates():
        yield from templates.check(template, f"{where}.{place}", inside)
    if work.tool_retry.when is not None:
        yield from _retry_problems(work.tool_retry, f"{where}.tool_retry")
    schemas = [] if work.output is None else [("output.schema", work.output.schema_)]
    for i, tool in enumerate(work.tools):
        if tool.parameters is not None:
            schemas.append((f"tools[{i}].parameters", tool.parameters))
            if tool.parameters.get("type") != "object":
                yield Problem(f"{where}.tools[{i}].parameters.type", "the arguments are not an object", "object")
        if tool.http is not None:
            yield from calls.check_headers(tool.http.headers, f"{where}.tools[{i}].http.headers")
            yield from calls.check_url(tool.http.url, f"{where}.tools[{i}].http.url", egress)
        if tool.mcp is not None and tool.mcp.url is not None:
            yield from calls.check_headers(tool.mcp.headers, f"{where}.tools[{i}].mcp.headers")
            yield from calls.check_url(tool.mcp.url, f"{where}.tools[{i}].mcp.url", egress)
    for place, schema in schemas:
        inner = f"{where}.{place}"
        yield from json_schema.problems(schema, inner, allowance) or _grammar_problems(schema, inner)


def _moved(before: str, after: str, problem: Problem) -> Problem:
    return replace(problem, where=after) if problem.where == before else problem


def _form_problems(work: GenerateFields, where: str, allowance: Allowance) -> Iterator[Problem]:
    """Return the problems of the schemas and the grammar of a text."""
    schemas = [(f"tools[{i}].function.parameters", tool.function.parameters) for i, tool in enumerate(work.tools)]
    if work.output is not None:
        schemas.append(("output.schema", work.output.schema_))
    for place, schema in schemas:
        inside = f"{where}.{place}"
        yield from json_schema.problems(schema, inside, allowance) or _grammar_problems(schema, inside)
    if work.grammar is not None:
        try:
            gbnf_source.checked(work.grammar)
        except InvalidInput as error:
            yield from (replace(problem, where=f"{where}.grammar") for problem in error.problems)


_STRING_RESULTS: tuple[Literal["string", "list"], ...] = ("string", "list")


def _text_problems(expression: str, where: str, scope: templates.Scope) -> list[Problem]:
    """Return the problems of an expression that must return a string or a list of strings."""
    for_string, for_list = (conditions.check(expression, where, scope, result_type=kind) for kind in _STRING_RESULTS)
    if not for_string or not for_list:
        return []
    both = (
        problem.message.replace("expected a string", "expected a string or a list of strings") for problem in for_string
    )
    return [replace(problem, message=message) for problem, message in zip(for_string, both, strict=True)]


def _model_problems(
    definition: Definition, work: ModelWork, where: str, deployment: Deployment | None
) -> Iterator[Problem]:
    model = work.model or definition.defaults.model
    if model is None:
        yield Problem(where, "the step names no model", "a model here, or one for all steps under defaults.model")
        return
    named = [(f"{where}.model" if work.model else "defaults.model", model)]
    if work.fallback is not None:
        named += [(f"{where}.fallback.models[{i}]", other) for i, other in enumerate(work.fallback.models)]
    if deployment is None:
        return
    for place, name in named:
        if selectors.is_selector(name):
            yield from _selector_problems(name, place, work, deployment)
            continue
        entry = deployment.models.resolve(name)
        if entry is None:
            known = deployment.models.names
            yield Problem(place, f"the catalogue has no model {name!r}", shape_errors.nearest(name, known))
        elif isinstance(work, EmbedFields | EmbedPassagesFields) and not entry.serves_embeddings:
            able = [model.name for model in deployment.models if model.serves_embeddings]
            message = f"the model {name!r} serves no embeddings: its use_cases have neither embed nor rerank"
            yield Problem(place, message, shape_errors.nearest(name, able) if able else "a model for embeddings")
        elif isinstance(work, GenerateFields | AgentFields) and (work.max_tokens or 0) >= entry.context:
            message = f"{work.max_tokens} tokens do not fit in the context of {name!r}, which has {entry.context}"
            yield Problem(f"{where}.max_tokens", message, f"1 to {entry.context - 1}, prompt and answer together")


def _selector_problems(text: str, where: str, work: ModelWork, deployment: Deployment) -> Iterator[Problem]:
    """The problems of a selector: its form, and whether a model of the catalogue suits."""
    context = (work.max_tokens or 0) + 1 if isinstance(work, GenerateFields | AgentFields) else 0
    try:
        selector = selectors.parse(text, where)
        selectors.require_possible(selector, deployment.models, where, context)
    except InvalidInput as error:
        yield from error.problems


def compression_problems(work: CompressionFields, where: str, models: Catalog) -> Iterator[Problem]:
    """Yield the problems of the models that a compression names."""
    prefix = f"{where}." if where else ""
    summary = None if work.summary is None else work.summary.model
    named = [("model", work.model), ("embedding_model", work.embedding_model), ("summary.model", summary)]
    for place, name in named:
        entry = models.find(name) if name is not None else None
        if name is not None and entry is None:
            message = f"the catalogue has no model {name!r}"
            yield Problem(f"{prefix}{place}", message, shape_errors.nearest(name, models.names))
        elif entry is not None and place == "embedding_model" and not entry.serves_embeddings:
            able = [model.name for model in models if model.serves_embeddings]
            message = f"the model {name!r} serves no embeddings: its use_cases have neither embed nor rerank"
            yield Problem(f"{prefix}{place}", message, ", ".join(able) or "a model for embeddings")


def _retry_problems(rule: Retry, where: str) -> list[Problem]:
    assert rule.when is not None
    scope = templates.Scope((), (), extra=("error",), roots=())
    found = conditions.check(rule.when, f"{where}.when", scope, result_type="bool")
    names = "error.reason, error.message, error.attempt"
    return [replace(problem, accepted=names) if problem.accepted == "error" else problem for problem in found]


def _run_problems(definition: Definition, allowance: Allowance) -> list[Problem]:
    """Return the problems of the fields that apply to the whole run."""
    problems: list[Problem] = []
    given = templates.Scope(definition.inputs, (), extra=(), roots=("inputs",))
    if definition.concurrency is not None:
        problems += templates.check(definition.concurrency.key, "concurrency.key", given)
    if definition.deduplicate is not None:
        problems += templates.check(definition.deduplicate.key, "deduplicate.key", given)
    everything = templates.Scope(
        definition.inputs, [step.id for step in definition.steps], step_description="step that runs before the run ends"
    )
    for name, part in definition.output_parts().items():
        where = f"outputs.{name}" if isinstance(definition.outputs[name], str) else f"outputs.{name}.value"
        problems += conditions.check(part.value, where, everything, result_type="any")
        problems += json_schema.problems(part.schema_, f"outputs.{name}.schema", allowance)
    return problems


def _grammar_problems(schema: Mapping[str, Any], where: str) -> list[Problem]:
    try:
        grammar.to_gbnf(schema)
    except InvalidInput as error:
        return [Problem(f"{where}.{p.where}".rstrip("."), p.message, p.accepted) for p in error.problems]
    return []
