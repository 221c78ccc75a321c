"""
The execution of `refine`, `ensemble` and `verify` steps.

A `refine` or `ensemble` step calls a workflow: its generations go to the pools of their models, and its `verify` steps
judge them. What a `verify` step counts as done is counted for Prometheus.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.kernel.database import Database
from app.kernel.errors import FailureReason, InvalidInput, StepFailure, Unavailable
from app.workflows.expressions import conditions
from app.workflows.language import definition as definitions
from app.workflows.language.definition import RouteModels
from app.workflows.language.ensemble import EnsembleFields
from app.workflows.language.refine import CritiqueAction, DraftFields, EscalateAction, PolicyAction, RefineFields
from app.workflows.language.verification import ChainFields, CodeVerifier, Verifier, VerifyFields
from app.workflows.state_machine.outcomes import Called, Success
from workers.engine import OnStop
from workers.refinement import code_tests, drafting, judge, members_plan, rounds_plan, verifiers
from workers.refinement.code_tests import CodeIsolation, CodeTestsRefused
from workers.refinement.judge import JudgedCandidate, TokensUsed
from workers.refinement.verifiers import VerifierInputs

#: Returns the tokens of steps of the run, and their models, by key.
FindUsed = Callable[[Sequence[str]], Mapping[str, TokensUsed]]
#: Counts a report that is complete, as a kind of step.
CountReport = Callable[[str, Mapping[str, Any]], None]

_USED = text("""
    SELECT key, model, tokens_in, tokens_out FROM step
    WHERE run_id = :run AND parent_id IS NULL AND key = ANY(:keys)
""")


@dataclass(frozen=True, slots=True)
class VerifyContext:
    """What the verification of a step needs of its worker."""

    find_used: FindUsed
    count: CountReport
    isolation: CodeIsolation = "confined"
    on_stop: OnStop = lambda _: None


def find_used(database: Database, run_id: UUID, keys: Sequence[str]) -> dict[str, TokensUsed]:
    """Return the tokens of these steps of a run, and their models."""
    if not keys:
        return {}
    with database.work() as work:
        rows = work.rows(_USED, {"run": run_id, "keys": list(keys)})
    return {row.key: TokensUsed(row.model, row.tokens_in or 0, row.tokens_out or 0) for row in rows}


def refine(
    step: RefineFields,
    data: Mapping[str, Any],
    default_model: str | None,
    route: RouteModels | None,
    isolation: CodeIsolation,
) -> Called:
    """Return the workflow of a refinement. Raises StepFailure."""
    _require_code(step.verifiers, isolation)
    draft = drafting.rendered(step.draft, data, default_model)
    as_json = drafting.is_json(step.draft, step.verifiers, step.format)
    planned = rounds_plan.plan(
        "refine",
        draft,
        step.verifiers,
        step.actions,
        data,
        as_json=as_json,
        accept=step.accept,
        token_budget=step.token_budget,
    )
    return _called(planned, route)


def ensemble(
    step: EnsembleFields,
    data: Mapping[str, Any],
    default_model: str | None,
    route: RouteModels | None,
    isolation: CodeIsolation,
) -> Called:
    """Return the workflow of an ensemble. Raises StepFailure."""
    _require_code(step.verifiers, isolation)
    if step.strategy in ("vote", "experts"):
        return _called(members_plan.plan(step, data, default_model), route)
    first, *others = step.members
    document = step.draft.model_dump(mode="json", by_alias=True, exclude_unset=True)
    fields = step.draft if first.model is None else DraftFields.model_validate({**document, "model": first.model})
    draft = drafting.rendered(fields, data, default_model)
    own = step.draft.model or default_model
    actions: list[PolicyAction]
    if step.strategy == "review":
        critic = others[0].model or own
        actions = [CritiqueAction(action="critique", rounds=step.rounds, model=critic, instruction=step.instruction)]
    else:
        actions = [EscalateAction(action="escalate", model=model) for one in others if (model := one.model or own)]
    planned = rounds_plan.plan(
        "ensemble",
        draft,
        step.verifiers,
        actions,
        data,
        as_json=drafting.is_json(step.draft, step.verifiers, step.format),
        accept="verified" if step.verifiers else "critic",
        token_budget=step.token_budget,
    )
    return _called(planned, route)


def verify(step: VerifyFields, data: Mapping[str, Any], context: VerifyContext) -> Success:
    """Return the report of a verification. Raises StepFailure, and CancelledError when the step was cancelled."""
    names = data if step.data is None else conditions.evaluate(step.data, data)
    earlier = None
    chain = step.chain or ChainFields()
    if chain.earlier is not None:
        earlier = conditions.evaluate(chain.earlier, data)
    if not isinstance(names, Mapping) or not (earlier is None or _is_report(earlier)):
        where = "'data' must be an object" if not isinstance(names, Mapping) else "'chain.earlier' must be a report"
        raise StepFailure(FailureReason.INVALID_REQUEST, where)

    def run_code(code: str, tests: Sequence[str], seconds: float, memory_mb: int) -> code_tests.CodeRun:
        return code_tests.run_tests(code, tests, seconds, memory_mb, context.isolation, on_stop=context.on_stop)

    inputs = VerifierInputs(names, run_code, data)
    try:
        judged = [
            replace(one, verdicts=verifiers.verify(one.output, step.verifiers, inputs))
            for one in _candidates(step, data, context.find_used)
        ]
    except CodeTestsRefused as error:
        raise StepFailure(FailureReason.INVALID_REQUEST, str(error)) from None
    report = judge.judge(judged, earlier, chain, step.vote)
    if not report["open"]:
        if report["kept"] is None and step.chain is not None:
            why = report["rounds"][-1].get("error") or "no step has written one"
            raise StepFailure(FailureReason.INVALID_OUTPUT, f"there is no output: {why}")
        context.count(chain.counts_as, report)
    return Success(report)


def _candidates(step: VerifyFields, data: Mapping[str, Any], find: FindUsed) -> list[JudgedCandidate]:
    """The values of the step, not verified yet."""
    as_json = step.format == "json" if step.format is not None else any(one.kind == "schema" for one in step.verifiers)
    if step.value is not None:
        value = conditions.evaluate(step.value, data)
        return [JudgedCandidate(verifiers.candidate(value, as_json=as_json), judge.NOTHING, "value")]
    used = find([key for one in step.candidates for key in one.by])
    found: list[JudgedCandidate] = []
    for one in step.candidates:
        value = conditions.evaluate(one.value, data)
        values = (verifiers.values_of(value) or [None]) if one.many else [value]
        spent = sum((used[key] for key in one.by if key in used), TokensUsed())
        for number, single in enumerate(values):
            error = _error_of(data, one.by) if single is None else ""
            found.append(
                JudgedCandidate(
                    verifiers.candidate(single, as_json=as_json, error=error),
                    judge.NOTHING,
                    one.action,
                    spent if number == 0 else TokensUsed(spent.model),
                    one.replaces,
                    one.weight,
                )
            )
    return found


def _error_of(data: Mapping[str, Any], by: Sequence[str]) -> str:
    """Why the step that should have written a value has none."""
    step = data.get("steps", {}).get(by[0]) if by else None
    error = step.get("error") if isinstance(step, Mapping) else None
    message = error.get("message") if isinstance(error, Mapping) else None
    return f"nothing was written: {message}"[:500] if message else "nothing was written"


def _is_report(value: Any) -> bool:
    names = {"rounds", "kept", "why", "feedback", "text"}
    return isinstance(value, Mapping) and names <= value.keys() and isinstance(value["rounds"], list)


def _require_code(of: Sequence[Verifier], isolation: CodeIsolation) -> None:
    """Raise StepFailure where code must be run and cannot be: before a model has worked for it."""
    if any(isinstance(one, CodeVerifier) for one in of):
        try:
            code_tests.require_possible(isolation)
        except CodeTestsRefused as error:
            raise StepFailure(FailureReason.INVALID_REQUEST, str(error)) from None


def _called(planned: tuple[dict[str, Any], dict[str, Any]], route: RouteModels | None) -> Called:
    document, inputs = planned
    definition = definitions.from_document(document)
    try:
        return Called(definition if route is None else route(definition).definition, None, inputs)
    except (InvalidInput, Unavailable) as error:
        raise StepFailure(FailureReason.ENGINE_ERROR, f"no model can be chosen: {error}") from error
