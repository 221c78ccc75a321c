"""
Overdue rows: the statements with which the sweep finds its work.

Steps and runs whose time has come are selected one by one, each under the lock of its run. Rows that another
transaction has locked are skipped, so concurrent sweeps select different rows and none of them waits.
Lost effects without a time of their own (an answer to a caller, a cancel of a called run, an admission) are searched
page by page among open rows, in the order of an index; each sweep continues where the last one of its process ended.
The rows that a sweep reads are bounded by its batch, however many wait or are kept.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy import TextClause, text

from app.kernel.database import UnitOfWork
from app.workflows.runs.storage.selected import ReadyStep

#: Before every id.
_FIRST = UUID(int=0)


@dataclass(slots=True)
class SweepCursor:
    """The positions at which the next sweep of a process continues. Empty is the beginning."""

    delegated: UUID = _FIRST
    called: UUID = _FIRST
    concurrency_key: str = ""


@dataclass(frozen=True, slots=True)
class Overdue:
    """A step or a run that is overdue."""

    #: Of the step or the run.
    id: UUID
    run_id: UUID
    #: Of a step.
    key: str = ""
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class StaleStep(ReadyStep):
    """A ready step whose message was sent long ago."""

    workflow: str
    paused: bool


@dataclass(frozen=True, slots=True)
class OverdueKind:
    """One kind of overdue rows."""

    name: str
    _next: TextClause
    _oldest: TextClause

    def next(self, work: UnitOfWork, passed: Collection[UUID]) -> Overdue | None:
        """The longest overdue row, except those of `passed` and of locked runs. Its run is locked then."""
        return work.row_of(Overdue, self._next, {"passed": list(passed)})

    def oldest(self, work: UnitOfWork, overdue: timedelta) -> Overdue | None:
        """The longest overdue row, if it is overdue for that long; its run may be locked by another transaction."""
        return work.row_of(Overdue, self._oldest, {"overdue": overdue})


def _steps(name: str, states: str, instant: str) -> OverdueKind:
    select = f"""
        SELECT step.id, step.run_id, step.key, step.attempt FROM step JOIN run ON run.id = step.run_id
        WHERE step.state IN ({states}) AND step.{instant} < now()
    """
    return _kind(name, select, "step.id", f"step.{instant}")


def _kind(name: str, select: str, id_: str, instant: str) -> OverdueKind:
    in_order = f"ORDER BY {instant} LIMIT 1"
    return OverdueKind(
        name,
        text(f"{select} AND {id_} <> ALL(:passed) {in_order} FOR NO KEY UPDATE OF run SKIP LOCKED"),
        text(f"{select} AND {instant} < now() - CAST(:overdue AS interval) {in_order}"),
    )


#: Held steps whose lease has expired.
EXPIRED = _steps("expired", "'running', 'cancelling'", "lease_until")
#: Waiting steps whose delay is over.
DUE = _steps("due", "'waiting', 'awaiting'", "not_before")
#: Steps that no worker holds and whose whole time is over.
TIMED_OUT_STEPS = _steps("timed_out", "'ready', 'waiting', 'awaiting'", "deadline_at")
#: Open runs whose deadline has passed.
PAST_DEADLINE = _kind(
    "past_deadline",
    """SELECT id, id AS run_id FROM run
       WHERE finished_at IS NULL AND deadline_at < now() AND state NOT IN ('cancelling', 'compensating')""",
    "id",
    "deadline_at",
)

KINDS = (EXPIRED, DUE, TIMED_OUT_STEPS, PAST_DEADLINE)

_DELEGATED = text("SELECT id FROM step WHERE delegated AND id > :after ORDER BY id LIMIT :limit")
_UNANSWERED = text("""
    SELECT run.id, step.run_id FROM step JOIN run ON run.parent_step_id = step.id
    WHERE step.id = ANY(:ids) AND step.delegated AND step.state IN ('awaiting', 'cancelling')
      AND run.finished_at < now() - CAST(:age AS interval) AND (step.awaits ->> 'run') = CAST(run.id AS text)
""")
_CALLED = text("""
    SELECT parent_step_id AS id FROM run WHERE finished_at IS NULL AND parent_step_id > :after
    ORDER BY parent_step_id LIMIT :limit
""")
_UNSTOPPED = text("""
    SELECT run.id, run.id AS run_id FROM step JOIN run ON run.parent_step_id = step.id
    WHERE step.id = ANY(:ids) AND run.finished_at IS NULL AND run.state NOT IN ('cancelling', 'compensating')
      AND step.state NOT IN ('awaiting', 'running')
""")
_BLOCKED_KEYS = text("""
    WITH RECURSIVE found AS (
        (SELECT concurrency_key AS key FROM run WHERE state = 'blocked' AND concurrency_key > :after
         ORDER BY concurrency_key LIMIT 1)
        UNION ALL
        SELECT (SELECT concurrency_key FROM run WHERE state = 'blocked' AND concurrency_key > found.key
                ORDER BY concurrency_key LIMIT 1) FROM found WHERE found.key IS NOT NULL
    )
    SELECT key FROM found WHERE key IS NOT NULL LIMIT :limit
""")
#: Of these keys, those with a blocked run that may begin.
_ADMISSIBLE = text("""
    SELECT listed.key FROM unnest(CAST(:keys AS text[])) AS listed (key) CROSS JOIN LATERAL (
        SELECT sha256 FROM run WHERE concurrency_key = listed.key AND state = 'blocked'
          AND NOT paused AND NOT workflow_paused LIMIT 1
    ) AS blocked JOIN definition USING (sha256)
    WHERE (
        SELECT count(*) FROM run WHERE concurrency_key = listed.key
          AND state NOT IN ('blocked', 'succeeded', 'failed', 'cancelled')
    ) < COALESCE(CAST(document -> 'concurrency' ->> 'limit' AS integer), 1)
""")

_READY_QUEUES = text("""
    WITH RECURSIVE found AS (
        (SELECT queue FROM step WHERE state = 'ready' ORDER BY queue LIMIT 1)
        UNION ALL
        SELECT (SELECT queue FROM step WHERE state = 'ready' AND queue > found.queue ORDER BY queue LIMIT 1)
        FROM found WHERE found.queue IS NOT NULL
    )
    SELECT queue FROM found WHERE queue IS NOT NULL
""")
_STALE = text("""
    SELECT count(*) AS steps FROM (
        SELECT FROM step
        WHERE state = 'ready' AND queue = :queue AND published_at < now() - CAST(:age AS interval) LIMIT :most
    ) AS stale
""")
# A paused step has no message: none is sent until it is resumed, which marks it as published.
_TOUCH_STALE = text("""
    UPDATE step SET published_at = CASE WHEN run.paused OR run.workflow_paused THEN NULL ELSE now() END
    FROM run WHERE step.id IN (
        SELECT id FROM step WHERE state = 'ready' AND queue = :queue AND published_at < now() - CAST(:age AS interval)
        ORDER BY published_at LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED
    ) AND step.state = 'ready' AND step.published_at < now() - CAST(:age AS interval) AND run.id = step.run_id
    RETURNING step.id, step.key, step.attempt, step.queue, step.priority, step.rank, run.workflow,
              run.paused OR run.workflow_paused AS paused
""")

#: Whatever a sweep may have to act on within that time. The orders are those of the indexes: without them, Postgres may
#: read a whole table.
_NEAR = text("""
    SELECT COALESCE(
        (SELECT true FROM step WHERE state = 'ready' ORDER BY queue, published_at LIMIT 1),
        (SELECT true FROM step WHERE state IN ('running', 'cancelling') ORDER BY lease_until LIMIT 1),
        (SELECT true FROM step WHERE state IN ('waiting', 'awaiting') AND not_before < now() + :within
         ORDER BY not_before LIMIT 1),
        (SELECT true FROM step WHERE state IN ('ready', 'waiting', 'awaiting') AND deadline_at < now() + :within
         ORDER BY deadline_at LIMIT 1),
        (SELECT true FROM step WHERE delegated ORDER BY id LIMIT 1),
        (SELECT true FROM run WHERE finished_at IS NULL AND deadline_at < now() + :within ORDER BY deadline_at LIMIT 1),
        (SELECT true FROM run WHERE state = 'blocked' ORDER BY id LIMIT 1),
        false
    ) AS near
""")


def is_near(work: UnitOfWork, within: timedelta) -> bool:
    """Whether a sweep may have something to do within that time; steps that are ready or running count."""
    row = work.row(_NEAR, {"within": within})
    assert row is not None
    return bool(row.near)


def delegated(work: UnitOfWork, cursor: SweepCursor, limit: int) -> list[UUID]:
    """The next page of steps that are delegated to items or to another run."""
    found = [row.id for row in work.rows(_DELEGATED, {"after": cursor.delegated, "limit": limit})]
    cursor.delegated = found[-1] if len(found) == limit else _FIRST
    return found


def unanswered(work: UnitOfWork, ids: Collection[UUID], age: timedelta) -> list[Overdue]:
    """Called runs of these steps that ended longer ago than `age` without an answer, with the run of the caller."""
    return work.rows_of(Overdue, _UNANSWERED, {"ids": list(ids), "age": age}) if ids else []


def called(work: UnitOfWork, cursor: SweepCursor, limit: int) -> list[UUID]:
    """The next page of steps that have called a run which is open."""
    found = [row.id for row in work.rows(_CALLED, {"after": cursor.called, "limit": limit})]
    cursor.called = found[-1] if len(found) == limit else _FIRST
    return found


def unstopped(work: UnitOfWork, ids: Collection[UUID]) -> list[Overdue]:
    """Open runs that these steps have called, although the steps have ended or are to end."""
    return work.rows_of(Overdue, _UNSTOPPED, {"ids": list(ids)}) if ids else []


def admissible_keys(work: UnitOfWork, cursor: SweepCursor, limit: int) -> list[str]:
    """Of the next page of concurrency keys with blocked runs, those of which one may begin."""
    found = [row.key for row in work.rows(_BLOCKED_KEYS, {"after": cursor.concurrency_key, "limit": limit})]
    cursor.concurrency_key = found[-1] if len(found) == limit else ""
    return [row.key for row in work.rows(_ADMISSIBLE, {"keys": found})] if found else []


def ready_queues(work: UnitOfWork) -> list[str]:
    """The queues of all steps that are ready."""
    return [row.queue for row in work.rows(_READY_QUEUES)]


def stale(work: UnitOfWork, queue: str, age: timedelta, most: int) -> int:
    """The number of ready steps of a queue whose message was sent longer ago than `age`; counted up to `most`."""
    row = work.row(_STALE, {"queue": queue, "age": age, "most": most})
    assert row is not None
    steps: int = row.steps
    return steps


def touch_stale(work: UnitOfWork, queue: str, age: timedelta, limit: int) -> list[StaleStep]:
    """The oldest of those steps, marked as published now; or as not published, where they are paused."""
    return work.rows_of(StaleStep, _TOUCH_STALE, {"queue": queue, "age": age, "limit": limit})
