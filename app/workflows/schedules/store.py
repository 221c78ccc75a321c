"""
The SQL statements for schedules and their fires.

Decisions about a schedule are made while its row is locked. The runs of starting fires are then submitted without a
lock, and the outcome is written by compare-and-set. All instants come from the database's clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import DateTime, Integer, Interval, Text, Uuid, bindparam, text

from app.kernel.database import UnitOfWork
from app.workflows.schedules.overlap import FireState
from app.workflows.state_machine.states import FINAL_RUNS

_ENDED = ", ".join(f"'{state}'" for state in sorted(FINAL_RUNS))

#: Closes the fires whose run has ended or was removed.
_CLOSE = text(f"""
    UPDATE schedule_fire SET open = false
    WHERE schedule_id = :id AND open AND state = 'fired'
      AND NOT EXISTS (SELECT 1 FROM run WHERE run.id = run_id AND run.state NOT IN ({_ENDED}))
""")
_READY = text("""
    SELECT id FROM (
        SELECT id, next_at FROM schedule WHERE paused_at IS NULL AND next_at <= now()
        UNION ALL
        SELECT schedule_id, min(due_at) FROM schedule_fire WHERE open AND state IN ('waiting', 'starting')
        GROUP BY schedule_id
    ) AS found GROUP BY id ORDER BY min(next_at) LIMIT :limit
""")
_NEAR = text("""
    SELECT COALESCE(
        (SELECT true FROM schedule WHERE paused_at IS NULL AND next_at < now() + :within ORDER BY next_at LIMIT 1),
        (SELECT true FROM schedule_fire WHERE open AND state IN ('waiting', 'starting')
         ORDER BY schedule_id, at LIMIT 1),
        false
    ) AS near
""")
_COLUMNS = "id, namespace, name, document, decided_to, next_at, paused_at, paused_reason, created_at, updated_at"
#: Read after the lock is acquired, so that decisions about a schedule never go back in time.
_NOW = text("SELECT clock_timestamp() AS now")
_LOCK_NAME = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 7205759406))")
_LOCK_BY_NAME = text(f"SELECT {_COLUMNS} FROM schedule WHERE namespace = :namespace AND name = :name FOR UPDATE")
_LOCK_IF_FREE = text(f"SELECT {_COLUMNS} FROM schedule WHERE id = :id FOR UPDATE SKIP LOCKED")
_INSERT = text("""
    INSERT INTO schedule (id, namespace, name, document, decided_to)
    VALUES (:id, :namespace, :name, CAST(:document AS json), :decided_to)
""")
_REPLACE = text("UPDATE schedule SET document = CAST(:document AS json), updated_at = now() WHERE id = :id")
_MOVE = text("""
    UPDATE schedule SET decided_to = :decided_to, next_at = :next_at
    WHERE id = :id AND (decided_to, next_at) IS DISTINCT FROM (:decided_to, :next_at)
""").bindparams(
    bindparam("next_at", type_=DateTime(timezone=True)), bindparam("decided_to", type_=DateTime(timezone=True))
)
_PAUSE = text("UPDATE schedule SET paused_at = now(), paused_reason = :reason WHERE id = :id")
_RESUME = text("UPDATE schedule SET paused_at = NULL, paused_reason = NULL WHERE id = :id")
_DELETE = text("DELETE FROM schedule WHERE namespace = :namespace AND name = :name")
_INSERT_FIRE = text("""
    INSERT INTO schedule_fire (id, schedule_id, at, by_hand, due_at, last_at, count, state, open, reason)
    VALUES (:id, :schedule_id, :at, :by_hand, :due_at, :last_at, :count, :state, :open, :reason)
    ON CONFLICT DO NOTHING
""").bindparams(
    bindparam("last_at", type_=DateTime(timezone=True)),
    bindparam("count", type_=Integer()),
    bindparam("reason", type_=Text()),
)
_OPEN = text("""
    SELECT fire.id, fire.at, fire.by_hand, fire.state, fire.run_id, run.state AS run_state
    FROM schedule_fire AS fire LEFT JOIN run ON run.id = fire.run_id
    WHERE fire.schedule_id = :id AND fire.open ORDER BY fire.at, fire.by_hand
""")
_DECIDE = text("""
    UPDATE schedule_fire SET state = :state, reason = :reason, open = :open, run_id = :run_id, decided_at = now()
    WHERE id = :id AND state = :was
""").bindparams(bindparam("reason", type_=Text()), bindparam("run_id", type_=Uuid()))
_PRUNE = text("""
    DELETE FROM schedule_fire
    WHERE schedule_id = :id AND at < now() - :keep AND NOT open AND decided_at < now() - :keep
""").bindparams(bindparam("keep", type_=Interval()))
_VIEW = f"""
    SELECT {", ".join(f"schedule.{name.strip()}" for name in _COLUMNS.split(","))},
           (SELECT count(*) FROM schedule_fire
            WHERE schedule_id = schedule.id AND state = 'waiting' AND open) AS waiting,
           fire.id AS fire_id, fire.at AS fire_at, fire.state AS fire_state, fire.reason AS fire_reason,
           fire.decided_at AS fire_decided_at, last_run.id AS run_id, last_run.state AS run_state,
           last_run.created_at AS run_created_at, last_run.finished_at AS run_finished_at
    FROM schedule
    LEFT JOIN LATERAL (
        SELECT * FROM schedule_fire WHERE schedule_id = schedule.id ORDER BY at DESC, by_hand DESC LIMIT 1
    ) AS fire ON true
    LEFT JOIN LATERAL (
        SELECT run.* FROM schedule_fire JOIN run ON run.id = run_id
        WHERE schedule_id = schedule.id ORDER BY at DESC, by_hand DESC LIMIT 1
    ) AS last_run ON true
"""
_ONE = text(f"{_VIEW} WHERE schedule.namespace = :namespace AND schedule.name = :name")
_ALL = text(f"""
    {_VIEW} WHERE CAST(:namespace AS text) IS NULL OR schedule.namespace = :namespace
    ORDER BY schedule.name, schedule.namespace
""")
_NAMES = text("SELECT name FROM schedule WHERE namespace = :namespace ORDER BY name")
_FIRES = text("""
    SELECT fire.id, fire.at, fire.by_hand, fire.due_at, fire.last_at, fire.count, fire.state, fire.reason, fire.run_id,
           fire.decided_at, run.state AS run_state
    FROM schedule_fire AS fire LEFT JOIN run ON run.id = fire.run_id
    WHERE fire.schedule_id = :id
      AND (CAST(:fire AS uuid) IS NULL OR fire.id = :fire)
      AND (CAST(:before AS uuid) IS NULL
           OR (fire.at, fire.by_hand) < (SELECT at, by_hand FROM schedule_fire WHERE id = :before))
      AND (CAST(:states AS text[]) IS NULL OR fire.state = ANY(:states))
    ORDER BY fire.at DESC, fire.by_hand DESC LIMIT :limit
""")


def now(work: UnitOfWork) -> datetime:
    """Return the current time of the database."""
    row = work.row(_NOW)
    assert row is not None
    found: datetime = row.now
    return found


def ready(work: UnitOfWork, limit: int) -> list[UUID]:
    """Return the ids of at most `limit` schedules that need a decision, those that are due longest first."""
    return [row.id for row in work.rows(_READY, {"limit": limit})]


def is_near(work: UnitOfWork, within: timedelta) -> bool:
    """Whether a schedule may need a decision within that time."""
    row = work.row(_NEAR, {"within": within})
    assert row is not None
    return bool(row.near)


def lock_name(work: UnitOfWork, namespace: str, name: str) -> None:
    """Lock the name of a schedule for storing until the end of the transaction."""
    work.run(_LOCK_NAME, {"name": f"{namespace}/{name}"})


def lock(work: UnitOfWork, namespace: str, name: str) -> Any | None:
    """Return the schedule with that name, locked until the end of the transaction; None when there is none."""
    return work.row(_LOCK_BY_NAME, {"namespace": namespace, "name": name})


def lock_if_free(work: UnitOfWork, schedule_id: UUID) -> Any | None:
    """Return the schedule, locked until the end of the transaction; None when it is locked by another transaction."""
    return work.row(_LOCK_IF_FREE, {"id": schedule_id})


def insert(work: UnitOfWork, schedule_id: UUID, namespace: str, name: str, document: str, decided_to: datetime) -> None:
    """Insert a schedule."""
    values = {"id": schedule_id, "namespace": namespace, "name": name, "document": document, "decided_to": decided_to}
    work.run(_INSERT, values)


def replace(work: UnitOfWork, schedule_id: UUID, document: str) -> None:
    """Replace the document of a schedule."""
    work.run(_REPLACE, {"id": schedule_id, "document": document})


def move_cursor(work: UnitOfWork, schedule_id: UUID, decided_to: datetime, next_at: datetime | None) -> None:
    """Record that all instants up to `decided_to` are decided, and when the next fire is due."""
    work.run(_MOVE, {"id": schedule_id, "decided_to": decided_to, "next_at": next_at})


def pause(work: UnitOfWork, schedule_id: UUID, reason: str | None) -> None:
    """Pause a schedule."""
    work.run(_PAUSE, {"id": schedule_id, "reason": reason})


def resume(work: UnitOfWork, schedule_id: UUID) -> None:
    """Resume a schedule."""
    work.run(_RESUME, {"id": schedule_id})


def delete(work: UnitOfWork, namespace: str, name: str) -> bool:
    """Delete a schedule and its fires, but not its runs. Returns False when there is none."""
    return work.run(_DELETE, {"namespace": namespace, "name": name}) == 1


def insert_fires(work: UnitOfWork, values: Sequence[Mapping[str, Any]]) -> None:
    """Insert fires. A fire that exists already is not changed."""
    if values:
        work.run(_INSERT_FIRE, list(values))


def close_ended(work: UnitOfWork, schedule_id: UUID) -> None:
    """Close the fires whose run has ended."""
    work.run(_CLOSE, {"id": schedule_id})


def open_fires(work: UnitOfWork, schedule_id: UUID) -> list[Any]:
    """Return the fires that are not decided or whose run is active, the earliest first."""
    return work.rows(_OPEN, {"id": schedule_id})


def decide(
    work: UnitOfWork,
    fire_id: UUID,
    was: FireState,
    state: FireState,
    *,
    reason: str | None = None,
    run_id: UUID | None = None,
) -> bool:
    """Move a fire from the state `was` to another; return False when it is no longer in that state."""
    is_open = state in {FireState.STARTING, FireState.FIRED}
    values = {"id": fire_id, "was": was, "state": state, "reason": reason, "open": is_open, "run_id": run_id}
    return work.run(_DECIDE, values) == 1


def prune(work: UnitOfWork, schedule_id: UUID, keep: timedelta) -> None:
    """Delete closed fires that were decided longer ago than `keep`."""
    work.run(_PRUNE, {"id": schedule_id, "keep": keep})


def view(work: UnitOfWork, namespace: str, name: str) -> Any | None:
    """Return a schedule with its last fire and its last run; None when there is none."""
    return work.row(_ONE, {"namespace": namespace, "name": name})


def views(work: UnitOfWork, namespace: str | None) -> list[Any]:
    """Return the schedules of a namespace, or all, with their last fire and their last run, by name."""
    return work.rows(_ALL, {"namespace": namespace})


def names(work: UnitOfWork, namespace: str) -> list[str]:
    """Return the names of the schedules of a namespace."""
    return [row.name for row in work.rows(_NAMES, {"namespace": namespace})]


def fires(
    work: UnitOfWork,
    schedule_id: UUID,
    *,
    limit: int,
    before: UUID | None = None,
    states: Sequence[str] | None = None,
    fire_id: UUID | None = None,
) -> list[Any]:
    """Return fires of a schedule, the latest first, starting before the fire `before`."""
    values = {"id": schedule_id, "limit": limit, "before": before, "fire": fire_id}
    return work.rows(_FIRES, values | {"states": list(states) if states else None})
