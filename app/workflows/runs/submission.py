"""
Submission: what a client asks for, checked and written as a run.

A key makes a submission that is sent twice count once: the client's own (for ever), or the workflow's (for a window).
What counts as the same is what the client sent: not what its workflow has become since.
Runs with the same concurrency key go on a few at a time; the lock of the key makes counting and writing one. A run that
is called below one with its key goes on in the place of that one: it would wait for itself otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.access import namespaces
from app.kernel import ids, texts
from app.kernel.database import UnitOfWork
from app.kernel.errors import (
    ConcurrencyLimitReached,
    Conflict,
    IdempotencyKeyReused,
    InvalidInput,
    Problem,
    StepFailure,
)
from app.workflows.expressions import templates
from app.workflows.language import inputs
from app.workflows.language.definition import Definition
from app.workflows.language.graph import Graph
from app.workflows.language.steps import MapStep
from app.workflows.runs.change import queue_of
from app.workflows.runs.storage import payloads, store
from app.workflows.runs.storage.payloads import PayloadLimits, as_json
from app.workflows.state_machine.states import RunState

#: Workflows that call each other, at most, and the failure of a call beyond that.
MAX_DEPTH = 16
TOO_DEEP = f"workflows call each other more than {MAX_DEPTH} deep"

#: The errors of a run that is one too many.
TOO_MANY = (ConcurrencyLimitReached,)

_LOCK_KEY = text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 7205759404))")
_GOING_ON = text("""
    SELECT id FROM run
    WHERE concurrency_key = :key AND state NOT IN ('blocked', 'succeeded', 'failed', 'cancelled') ORDER BY id
""")
_BLOCKED = text("""
    SELECT run.id, document FROM run JOIN definition USING (sha256)
    WHERE concurrency_key = :key AND state = 'blocked' AND NOT paused AND NOT workflow_paused
    ORDER BY CASE priority WHEN 'interactive' THEN 0 WHEN 'standard' THEN 1 ELSE 2 END, rank, run.id LIMIT 1
""")
_HELD_ABOVE = text("""
    WITH RECURSIVE above AS (
        SELECT run.parent_step_id, run.concurrency_key FROM step JOIN run ON run.id = step.run_id WHERE step.id = :id
        UNION ALL
        SELECT run.parent_step_id, run.concurrency_key
        FROM above JOIN step ON step.id = above.parent_step_id JOIN run ON run.id = step.run_id
    )
    SELECT 1 FROM above WHERE concurrency_key = :key LIMIT 1
""")
_ALL_BLOCKED = text("SELECT id FROM run WHERE concurrency_key = :key AND state = 'blocked' ORDER BY id")
_DUPLICATE = text("""
    SELECT id FROM run WHERE dedup_key = :key AND created_at > now() - CAST(:window AS interval)
    ORDER BY created_at DESC LIMIT 1
""")


@dataclass(frozen=True, slots=True)
class Submission:
    """What a client asks for. What is None is as the workflow says."""

    definition: Definition
    inputs: Mapping[str, Any]
    #: The version, for a named workflow.
    version: int | None = None
    priority: str | None = None
    idempotency_key: str | None = None
    rank: int | None = None
    #: Beside those of the workflow.
    labels: Mapping[str, str] = field(default_factory=dict)
    deadline: timedelta | None = None
    retention: timedelta | None = None
    #: The client named no version, and means the newest, whichever that is.
    newest: bool = False


@dataclass(frozen=True, slots=True)
class Accepted:
    """The run that answers a submission."""

    id: UUID
    #: False when the same was submitted before.
    created: bool


@dataclass(frozen=True, slots=True)
class Prepared:
    """A submission that is in order, as rows."""

    id: UUID
    definition: Definition
    inputs: Mapping[str, Any]
    sha256: str
    document: str
    run: Mapping[str, Any]
    #: The inputs as JSON.
    given: str
    steps: list[dict[str, Any]]
    limits: PayloadLimits


def prepare(
    asked: Submission,
    retention: timedelta,
    limits: PayloadLimits,
    *,
    parent_step_id: UUID | None = None,
    depth: int = 0,
    forked_from: UUID | None = None,
) -> Prepared:
    """
    The rows of a submission.

    Raises InvalidInput when the inputs break their schemas, a key cannot be rendered or the label `namespace` names
    none, and PayloadTooLarge.
    """
    definition = asked.definition
    given = inputs.resolve(definition, asked.inputs)
    text_given = payloads.encoded(given, limits, "inputs")
    class_, rank = definition.rank()
    priority = asked.priority or class_
    rank = asked.rank if asked.rank is not None else 1 if asked.priority else rank
    run_id, sha256 = ids.new_id(), definition.sha256()
    deadline = asked.deadline if asked.deadline is not None else definition.deadline
    labels = {**definition.labels, **asked.labels}
    if namespaces.LABEL in labels:
        namespaces.require(labels[namespaces.LABEL], f"labels.{namespaces.LABEL}", "run")
    _require_storable({f"labels.{name}": value for name, value in labels.items()})
    kept = asked.retention if asked.retention is not None else definition.retention
    concurrency, once = definition.concurrency, definition.deduplicate
    # A run that was called answers its caller, and a fork is wanted beside the run that was.
    is_top_level = parent_step_id is None and forked_from is None
    run = {
        "id": run_id,
        "workflow": definition.workflow,
        "version": asked.version,
        "sha256": sha256,
        "priority": priority,
        "rank": rank,
        "labels": json.dumps(labels),
        "key": asked.idempotency_key,
        "request": fingerprint(asked) if asked.idempotency_key else None,
        "concurrency_key": _key(definition, concurrency.key, "concurrency.key", given) if concurrency else None,
        "dedup_key": _key(definition, once.key, "deduplicate.key", given) if once and is_top_level else None,
        "parent_step_id": parent_step_id,
        "depth": depth,
        "forked_from": forked_from,
        "retention_s": round((kept if kept is not None else retention).total_seconds()),
        "deadline": deadline,
    }
    return Prepared(
        run_id,
        definition,
        given,
        sha256,
        as_json(definition.document()),
        run,
        text_given,
        _steps(definition),
        limits,
    )


def write(work: UnitOfWork, prepared: Prepared) -> tuple[Accepted | None, list[UUID]]:
    """
    Write the rows. Gives the run that was there before, if any, and the runs that are to be cancelled for this one.

    Raises IdempotencyKeyReused, ConcurrencyLimitReached.
    """
    prepared = _in_its_place(work, prepared)
    run, once = prepared.run, prepared.definition.deduplicate
    if run["dedup_key"] is not None and once is not None:
        work.run(_LOCK_KEY, {"key": run["dedup_key"]})
        earlier = work.row(_DUPLICATE, {"key": run["dedup_key"], "window": once.window})
        if earlier is not None:
            return Accepted(earlier.id, created=False), []
    state, to_cancel = _state(work, prepared)
    store.keep_definition(work, prepared.sha256, prepared.document)
    (given,) = payloads.keep(work, [prepared.given], prepared.limits)
    store.hold_pause(work, prepared.definition.workflow)
    if not store.insert_run(work, {**run, **given.columns("inputs"), "state": state}):
        assert run["key"] is not None
        earlier = of_key(work, run["key"], run["request"])
        if earlier is None:
            raise Conflict(f"the run of idempotency key {run['key']!r} was removed at this moment: submit again")
        return earlier, []
    store.insert_steps(work, prepared.id, run["priority"], run["rank"], prepared.steps)
    return None, to_cancel


def of_key(work: UnitOfWork, key: str, request: str) -> Accepted | None:
    """
    The run of an idempotency key, or None.

    Raises IdempotencyKeyReused when another request had the key, and InvalidInput for a key that cannot be stored.
    """
    _require_storable({"idempotency_key": key})
    row = store.run_of_key(work, key)
    if row is not None and row.request_sha256 != request:
        raise IdempotencyKeyReused(key, str(row.id))
    return None if row is None else Accepted(row.id, created=False)


def fingerprint(asked: Submission) -> str:
    """
    The hash of all that a client asked for, as it was asked: a request that is sent again has the same, whatever has
    become of its workflow, and one that asks for anything else has another.
    """
    what = [asked.definition.workflow, "newest"] if asked.newest else [asked.definition.sha256(), asked.version]
    spans = [None if span is None else span.total_seconds() for span in (asked.deadline, asked.retention)]
    content = [what, asked.inputs, asked.priority, asked.rank, asked.labels, *spans]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=dict).encode()).hexdigest()


def next_admissible(work: UnitOfWork, concurrency_key: str) -> UUID | None:
    """The blocked run of a key that may begin now. The key stays locked until the end of the transaction."""
    in_flight = going_on(work, concurrency_key)
    row = work.row(_BLOCKED, {"key": concurrency_key})
    if row is None or in_flight >= (row.document.get("concurrency") or {}).get("limit", 1):
        return None
    run_id: UUID = row.id
    return run_id


def going_on(work: UnitOfWork, concurrency_key: str) -> int:
    """How many runs of a key go on. The key stays locked until the end of the transaction."""
    work.run(_LOCK_KEY, {"key": concurrency_key})
    return len(work.rows(_GOING_ON, {"key": concurrency_key}))


def _state(work: UnitOfWork, prepared: Prepared) -> tuple[RunState, list[UUID]]:
    """Whether the run begins, and which others end for it."""
    rule, key = prepared.definition.concurrency, prepared.run["concurrency_key"]
    if rule is None or key is None:
        return RunState.QUEUED, []
    work.run(_LOCK_KEY, {"key": key})
    in_flight = [row.id for row in work.rows(_GOING_ON, {"key": key})]
    blocked = [row.id for row in work.rows(_ALL_BLOCKED, {"key": key})]
    match rule.policy:
        case "queue":
            # Who waits already goes first.
            return (RunState.BLOCKED if blocked or len(in_flight) >= rule.limit else RunState.QUEUED), []
        case "reject":
            if len(in_flight) >= rule.limit:
                raise ConcurrencyLimitReached(prepared.definition.workflow, key.partition("/")[2], rule.limit)
            return RunState.QUEUED, []
        case "cancel_running":
            surplus = in_flight[: max(len(in_flight) - rule.limit + 1, 0)]
            return (RunState.BLOCKED if surplus else RunState.QUEUED), [*blocked, *surplus]


def _steps(definition: Definition) -> list[dict[str, Any]]:
    graph = Graph(definition)
    rows = []
    for position, step in enumerate(definition.all_steps()):
        models = () if isinstance(step, MapStep) else graph.models(step.id)
        rows.append(
            {
                "id": ids.new_id(),
                "key": step.id,
                "position": position,
                "kind": step.kind,
                "model": models[0] if models else None,
                "queue": queue_of(models),
            }
        )
    return rows


def _require_storable(given: Mapping[str, str]) -> None:
    """Refuse texts that Postgres cannot keep: what is replaced in them would be another label or key."""
    for where, value in given.items():
        if texts.storable(value) != value:
            message = f"{texts.printable(value, 60)!r} holds NUL, or half a character"
            raise InvalidInput([Problem(where, message, "any other text")], "run")


def _key(definition: Definition, template: str, where: str, given: Mapping[str, Any]) -> str:
    """A key of the workflow, as it is stored: keys of different workflows never meet."""
    try:
        rendered = templates.render(template, {"inputs": given, "steps": {}})
    except StepFailure as error:
        raise InvalidInput([Problem(where, error.message, "a template over the inputs")], "inputs") from None
    _require_storable({where: rendered})
    if len(rendered) > 300:
        rendered = hashlib.sha256(rendered.encode()).hexdigest()
    return f"{definition.workflow}/{rendered}"


def _in_its_place(work: UnitOfWork, prepared: Prepared) -> Prepared:
    """Without a concurrency key of its own, where a run that called it, through however many, has that key."""
    key, called_by = prepared.run["concurrency_key"], prepared.run["parent_step_id"]
    if key is None or called_by is None or work.row(_HELD_ABOVE, {"id": called_by, "key": key}) is None:
        return prepared
    return replace(prepared, run={**prepared.run, "concurrency_key": None})
