"""
Admission: how many runs of a concurrency key are in flight, and which blocked run begins next.

Under the lock of the key, counting and writing are one atomic action. A run that is called below a run of the same key
has no key of its own: it would wait for its own caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.access import namespaces
from app.kernel.database import UnitOfWork
from app.kernel.errors import ConcurrencyLimitReached
from app.workflows.language.definition import Definition
from app.workflows.state_machine.states import RunState

_LOCK_KEY = text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 7205759404))")
_IN_FLIGHT = text("""
    SELECT id FROM run
    WHERE concurrency_key = :key AND state NOT IN ('blocked', 'succeeded', 'failed', 'cancelled') ORDER BY id
""")
_BLOCKED = text("SELECT id FROM run WHERE concurrency_key = :key AND state = 'blocked' ORDER BY id")
_NEXT = text("""
    SELECT run.id, document FROM run JOIN definition USING (sha256)
    WHERE concurrency_key = :key AND state = 'blocked' AND NOT paused AND NOT workflow_paused
    ORDER BY CASE priority WHEN 'interactive' THEN 0 WHEN 'standard' THEN 1 ELSE 2 END, rank, run.id LIMIT 1
""")
_HELD_BY_CALLER = text("""
    WITH RECURSIVE callers AS (
        SELECT run.parent_step_id, run.concurrency_key FROM step JOIN run ON run.id = step.run_id WHERE step.id = :id
        UNION ALL
        SELECT run.parent_step_id, run.concurrency_key
        FROM callers JOIN step ON step.id = callers.parent_step_id JOIN run ON run.id = step.run_id
    )
    SELECT 1 FROM callers WHERE concurrency_key = :key LIMIT 1
""")


def stored(namespace: str, workflow: str, rendered: str) -> str:
    """A concurrency or deduplication key as it is stored: those of two namespaces or two workflows differ."""
    return f"{'' if namespace == namespaces.DEFAULT else f'{namespace}:'}{workflow}/{rendered}"


def shown(key: str) -> str:
    """The rendered part of a stored key."""
    return key.partition("/")[2]


def lock(work: UnitOfWork, key: str) -> None:
    """Lock a concurrency or deduplication key until the end of the transaction."""
    work.run(_LOCK_KEY, {"key": key})


def in_flight(work: UnitOfWork, key: str) -> list[UUID]:
    """The runs of a key that have begun and not ended, the oldest first. The key is locked then."""
    lock(work, key)
    return [row.id for row in work.rows(_IN_FLIGHT, {"key": key})]


def next_admissible(work: UnitOfWork, key: str) -> UUID | None:
    """The blocked run of a key that may begin now. The key is locked then."""
    begun = len(in_flight(work, key))
    row = work.row(_NEXT, {"key": key})
    if row is None or begun >= (row.document.get("concurrency") or {}).get("limit", 1):
        return None
    run_id: UUID = row.id
    return run_id


def decide(work: UnitOfWork, definition: Definition, run: Mapping[str, Any]) -> tuple[RunState, list[UUID]]:
    """
    The first state of a new run, and the runs to be cancelled for it.

    Raises ConcurrencyLimitReached.
    """
    rule, key = definition.concurrency, run["concurrency_key"]
    if rule is None or key is None:
        return RunState.QUEUED, []
    begun = in_flight(work, key)
    blocked = [row.id for row in work.rows(_BLOCKED, {"key": key})]
    match rule.policy:
        case "queue":
            # Runs that wait already begin first.
            return (RunState.BLOCKED if blocked or len(begun) >= rule.limit else RunState.QUEUED), []
        case "reject":
            if len(begun) >= rule.limit:
                raise ConcurrencyLimitReached(definition.workflow, shown(key), rule.limit)
            return RunState.QUEUED, []
        case "cancel_running":
            surplus = begun[: max(len(begun) - rule.limit + 1, 0)]
            return (RunState.BLOCKED if surplus else RunState.QUEUED), [*blocked, *surplus]


def held_by_caller(work: UnitOfWork, key: str, parent_step_id: UUID) -> bool:
    """Whether a run that called this one, directly or not, has the same key."""
    return work.row(_HELD_BY_CALLER, {"id": parent_step_id, "key": key}) is not None
