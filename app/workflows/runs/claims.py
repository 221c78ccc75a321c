"""Claims: a step that a worker holds, with the data that its work reads and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from app.access import namespaces
from app.kernel.database import UnitOfWork
from app.kernel.errors import StepFailure, shortened
from app.workflows.language import agent
from app.workflows.language.agent import AgentCall, AgentTurn
from app.workflows.language.graph import Reads
from app.workflows.language.steps import AgentStep, AnyStep, MapBody, MapStep
from app.workflows.runs.changes.change import RunChange
from app.workflows.runs.storage import graphs, payloads, store, values
from app.workflows.runs.storage.payloads import PayloadLimits
from app.workflows.runs.storage.selected import ClaimedStep
from app.workflows.state_machine.outcomes import TokenUsage

#: Characters that are stored of a model's unusable text.
_TEXT_CHARACTERS = 1_000_000


@dataclass(frozen=True, slots=True)
class Claim:
    """A step that a worker holds, with everything that its work needs."""

    step_id: UUID
    run_id: UUID
    key: str
    attempt: int
    priority: str
    work: AnyStep | MapBody | AgentTurn | AgentCall
    #: The data of its templates and expressions: inputs, steps, run; for an item, item and index too.
    data: Mapping[str, Any]
    #: The model of this attempt.
    model: str | None = None
    #: What is left of the time for the whole step.
    remaining: timedelta | None = None
    #: How many calls of workflows are above it.
    depth: int = 0
    #: The map or the agent, where it is an item.
    parent_id: UUID | None = None
    #: The step of the definition; for an item, the map.
    step: AnyStep | None = None
    #: Why it cannot be done: it reads too much.
    refused: StepFailure | None = None
    #: The name of its workflow.
    workflow: str = ""
    #: The namespace of its run.
    namespace: str = namespaces.DEFAULT
    #: The model of its workflow for steps without one.
    default_model: str | None = None
    #: The trace of its run, as a `traceparent`.
    trace_parent: str | None = None


def take(work: UnitOfWork, claimed: ClaimedStep, limits: PayloadLimits) -> Claim:
    """The claim of a step that was claimed in this transaction."""
    (row,) = payloads.filled(work, [claimed], "input")
    graph = graphs.of(work, row.sha256)
    key = row.key.partition("[")[0]
    step = graph.steps[key]
    data: dict[str, Any] = {}
    refused: StepFailure | None = None
    body: AnyStep | MapBody | AgentTurn | AgentCall = step
    reads = graph.work_reads[key]
    if row.parent_id is not None:
        assert isinstance(step, MapStep | AgentStep)
        reads = Reads(False, frozenset()) if row.kind == agent.TURN else graph.item_reads[key]
        body = step.step if isinstance(step, MapStep) else agent.item_work(step, row.kind)
        data = {"item": row.input, "index": row.item}
    try:
        data |= _data(work, row, reads, limits)
    except StepFailure as failure:
        refused = failure
    return Claim(
        row.id,
        row.run_id,
        row.key,
        row.attempt,
        row.priority,
        body,
        data,
        row.model,
        row.remaining,
        row.depth,
        row.parent_id,
        step,
        refused,
        row.workflow,
        row.namespace,
        graph.definition.defaults.model,
        row.trace_parent,
    )


def follow(change: RunChange, key: str, owner: str) -> Claim:
    """The claim of a step that a change has claimed for an owner."""
    locked, step, attempt = change.steps[key], change.graph.steps[key], change.run.steps[key].attempt
    store.begin_attempt(change.transaction.work, locked.id, attempt, owner, locked.model)
    data: dict[str, Any] = {}
    refused: StepFailure | None = None
    try:
        data = change.data(change.graph.work_reads[key])
    except StepFailure as failure:
        refused = failure
    run_id = change.locked.id
    return Claim(
        locked.id,
        run_id,
        key,
        attempt,
        locked.priority,
        step,
        data,
        locked.model,
        step=step,
        refused=refused,
        workflow=change.locked.workflow,
        namespace=change.locked.namespace,
        default_model=change.graph.definition.defaults.model,
    )


def _data(work: UnitOfWork, row: ClaimedStep, reads: Reads, limits: PayloadLimits) -> dict[str, Any]:
    """The data of the work of a claimed step. Raises StepFailure when it is too much."""
    steps = values.outputs(work, row.run_id, reads.steps, limits.read)
    inputs = values.inputs(work, row.run_id) if reads.inputs else {}
    run = {"id": str(row.run_id), "workflow": row.workflow, "state": row.run_ending or row.run_state}
    return {"inputs": inputs, "steps": steps, "run": run}


def end_attempt(
    work: UnitOfWork, claim: Claim, outcome: str, usage: TokenUsage, message: str | None = None, text: str | None = None
) -> None:
    """Write how the attempt of a claim ended, and what it used."""
    end(work, claim.step_id, claim.attempt, outcome, usage, message, text)


def end(
    work: UnitOfWork,
    step_id: UUID,
    attempt: int,
    outcome: str,
    usage: TokenUsage,
    message: str | None = None,
    text: str | None = None,
) -> None:
    """Write how an attempt ended, and what it used."""
    first = usage.first_token
    store.end_attempt(
        work,
        {
            "id": step_id,
            "attempt": attempt,
            "outcome": outcome,
            "message": None if message is None else shortened(message),
            "text": None if text is None else shortened(text, _TEXT_CHARACTERS),
            "tokens_in": usage.tokens_in,
            "tokens_out": usage.tokens_out,
            "tokens_cached": usage.tokens_cached,
            "first_token_ms": None if first is None else round(first.total_seconds() * 1000),
            "finish_reason": usage.finish_reason,
            "cost": usage.cost,
            "cost_basis": None if not usage.cost_basis else json.dumps(usage.cost_basis),
            "assembly": None if usage.assembly is None else json.dumps(usage.assembly),
            "hooks": json.dumps(usage.hooks) if usage.hooks else None,
        },
    )
