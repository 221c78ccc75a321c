"""Calls: steps that run another workflow, and the answers to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.kernel.errors import ArrieroError, FailureReason
from app.workflows.runs import submission
from app.workflows.runs.changes.change import RunChange, open_change
from app.workflows.runs.changes.transactions import RunTransaction
from app.workflows.runs.claims import Claim
from app.workflows.runs.maps import write_change
from app.workflows.runs.storage import payloads
from app.workflows.runs.submission import Submission
from app.workflows.state_machine.outcomes import Called, TokenUsage
from app.workflows.state_machine.states import RunState, StepState

_ENDED_CALL = text("""
    SELECT run.workflow, run.state, run.output, run.output_sha256, run.error, step.run_id AS parent_run_id,
           step.key, CAST(used.tokens_in AS bigint) AS tokens_in, CAST(used.tokens_out AS bigint) AS tokens_out
    FROM run JOIN step ON step.id = run.parent_step_id, LATERAL (
        SELECT COALESCE(sum(tokens_in), 0) AS tokens_in, COALESCE(sum(tokens_out), 0) AS tokens_out
        FROM step AS own WHERE own.run_id = run.id AND own.parent_id IS NULL
    ) AS used
    WHERE run.id = :id AND run.state IN ('succeeded', 'failed', 'cancelled')
""")


@dataclass(frozen=True, slots=True)
class _EndedCall:
    workflow: str
    state: str
    output: Any
    output_sha256: str | None
    error: dict[str, Any] | None
    parent_run_id: UUID
    #: The step that called it.
    key: str
    tokens_in: int
    tokens_out: int


def call(change: RunChange, claim: Claim, called: Called) -> None:
    """Submit the run that a step calls, and let the step await it. A run that is refused fails the attempt."""
    caller = change.locked
    if caller.depth + 1 > submission.MAX_DEPTH:
        change.fail(claim.key, claim.attempt, FailureReason.INVALID_REQUEST, submission.TOO_DEEP)
        return
    request = Submission(
        called.definition,
        called.inputs,
        called.version,
        caller.priority,
        rank=caller.rank,
        deadline=called.deadline,
        namespace=caller.namespace,
    )
    policy = change.transaction.policy
    try:
        prepared = submission.prepare(request, policy, parent_step_id=claim.step_id, depth=caller.depth + 1)
        accepted = submission.create(change.transaction, prepared)
    except ArrieroError as error:
        reason = FailureReason.REJECTED if isinstance(error, submission.TOO_MANY) else FailureReason.INVALID_REQUEST
        change.fail(claim.key, claim.attempt, reason, f"{called.definition.workflow} cannot be run: {error}")
        return
    awaits = {"run": str(accepted.id), "workflow": called.definition.workflow}
    change.leave(claim.key, claim.attempt, awaits, delegated=True)


def answer(transaction: RunTransaction, run_id: UUID) -> bool:
    """Give the result of a called run that has ended to its caller. False when the caller has it, or does not wait."""
    rows = transaction.work.rows_of(_EndedCall, _ENDED_CALL, {"id": run_id})
    if not rows:
        return False
    (ended,) = payloads.filled(transaction.work, rows, "output")
    change = open_change(transaction, ended.parent_run_id, ended.key)
    step = change.steps[ended.key]
    if step.state not in (StepState.AWAITING, StepState.CANCELLING) or not step.delegated:
        return False
    if (step.awaits or {}).get("run", str(run_id)) != str(run_id):
        return False
    usage = TokenUsage(ended.tokens_in, ended.tokens_out)
    if ended.state == RunState.SUCCEEDED:
        change.succeed(step.key, step.attempt, ended.output, usage)
    else:
        reason, detail = FailureReason.CHILD_FAILED, (ended.error or {}).get("message") or "no step says why"
        if submission.TOO_DEEP in detail:  # no level tries that again: each would multiply the runs below it
            reason, detail = FailureReason.INVALID_REQUEST, submission.TOO_DEEP
        message = f"run {run_id} of {ended.workflow} ended {ended.state}: {detail}"
        change.fail(step.key, step.attempt, reason, message, usage=usage)
    write_change(change)
    return True
