"""Claims: a step in the hands of a worker, with what its work sees and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from app.kernel.database import UnitOfWork
from app.kernel.errors import StepFailure, shortened
from app.workflows.language import definition as definitions
from app.workflows.language.graph import Graph, Reads
from app.workflows.language.steps import AnyStep, MapBody, MapStep
from app.workflows.runs.change import RunChange
from app.workflows.runs.storage import payloads, store
from app.workflows.runs.storage.payloads import PayloadLimits
from app.workflows.state_machine.outcomes import TokenUsage

#: Characters that are kept of what a model wrote that was not usable.
_TEXT_CHARACTERS = 1_000_000


@dataclass(frozen=True, slots=True)
class Claim:
    """A step in the hands of a worker, with all that its work needs."""

    step_id: UUID
    run_id: UUID
    key: str
    attempt: int
    priority: str
    work: AnyStep | MapBody
    #: What its templates and expressions see: inputs, steps, run; for an item, item and index too.
    data: Mapping[str, Any]
    #: The model that it asks now.
    model: str | None = None
    #: What is left of the time for the whole step.
    remaining: timedelta | None = None
    #: How many calls of workflows lie above it.
    depth: int = 0
    #: The item of a map that it is.
    parent_id: UUID | None = None
    #: Whether others may name its branches.
    step: AnyStep | None = None
    #: Why it cannot be done: what it reads is too much.
    refused: StepFailure | None = None


def take(work: UnitOfWork, row: Any, limits: PayloadLimits) -> Claim:
    """The claim of a step that was taken."""
    (row,) = payloads.filled(work, [row], "input")
    graph = known(work, row.sha256)
    key = row.key.partition("[")[0]
    step = graph.steps[key]
    data: dict[str, Any] = {}
    refused: StepFailure | None = None
    body: AnyStep | MapBody = step
    reads = graph.work_reads[key]
    if row.parent_id is not None:
        assert isinstance(step, MapStep)
        reads, body = graph.item_reads[key], step.step
        data = {"item": row.input, "index": row.item}
    try:
        data |= _seen(work, row, reads, limits)
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
    )


def follow(work: UnitOfWork, change: RunChange, key: str, owner: str) -> Claim:
    """The claim of a step that a change has taken for an owner."""
    row, step, attempt = change.rows[key], change.graph.steps[key], change.run.steps[key].attempt
    store.begin_attempt(work, row.id, attempt, owner, row.model)
    data: dict[str, Any] = {}
    refused: StepFailure | None = None
    try:
        data = change.data(change.graph.work_reads[key])
    except StepFailure as failure:
        refused = failure
    run_id = change.run_row.id
    return Claim(row.id, run_id, key, attempt, row.priority, step, data, row.model, step=step, refused=refused)


_KNOWN: dict[str, Graph] = {}


def known(work: UnitOfWork, sha256: str) -> Graph:
    """The graph of the definition of that hash. Definitions never change, so a process keeps those that it has read."""
    found = _KNOWN.get(sha256)
    if found is None:
        if len(_KNOWN) >= 256:
            _KNOWN.clear()
        found = _KNOWN[sha256] = Graph(definitions.stored(store.document(work, sha256)))
    return found


def _seen(work: UnitOfWork, row: Any, reads: Reads, limits: PayloadLimits) -> dict[str, Any]:
    """What the work of a claimed step sees. Raises StepFailure when it is too much."""
    steps = store.outputs(work, row.run_id, reads.steps, limits.read)
    inputs = store.inputs(work, row.run_id) if reads.inputs else {}
    run = {"id": str(row.run_id), "workflow": row.workflow, "state": row.run_ending or row.run_state}
    return {"inputs": inputs, "steps": steps, "run": run}


def end_attempt(
    work: UnitOfWork, claim: Claim, outcome: str, usage: TokenUsage, message: str | None = None, text: str | None = None
) -> None:
    """Write how the attempt of a claim ended, and what it took."""
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
    """Write how an attempt ended, and what it took."""
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
        },
    )
