"""
The statements of executions of actions.

Every function runs in a transaction of its caller.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.governance.actions.execution import ActionExecution, Cause, WantedExecution
from app.governance.actions.outcome import ExecutionState
from app.kernel import ids
from app.kernel.database import UnitOfWork
from app.kernel.errors import shortened
from app.kernel.postgres.filters import where

#: Most characters of a detail.
_SENTENCE = 1_000

COLUMNS = """
    id, namespace, firing_id, position, rule, kind, target, parameters, cause, state, dry_run, before, after, detail,
    attempts, created_at, finished_at, cleared_at, undone_at, undo_detail
"""
_INSERT = text("""
    INSERT INTO action_execution (id, namespace, firing_id, position, rule, kind, target, parameters, cause, state,
                                  dry_run, detail, attempts, undo_detail)
    VALUES (:id, :namespace, :firing, :position, :rule, :kind, :target, CAST(:parameters AS json),
            CAST(:cause AS json), :state, :dry_run, :detail, 0, '')
    ON CONFLICT (firing_id, position) WHERE firing_id IS NOT NULL DO NOTHING
""")
_CLEAR = text("""
    UPDATE action_execution SET cleared_at = now(), due_at = now(),
        state = CASE WHEN state = 'applied' THEN 'undoing' ELSE state END,
        attempts = CASE WHEN state = 'applied' THEN 0 ELSE attempts END
    WHERE firing_id = :firing AND cleared_at IS NULL
""")
_CLAIM = text(f"""
    UPDATE action_execution SET attempts = attempts + 1, due_at = now() + CAST(:lease AS interval)
    WHERE id = (
        SELECT id FROM action_execution WHERE state IN ('pending', 'undoing') AND due_at <= now()
        ORDER BY due_at, id LIMIT 1 FOR UPDATE SKIP LOCKED
    ) RETURNING {COLUMNS}
""")
_GET = text(f"SELECT {COLUMNS} FROM action_execution WHERE id = :id FOR UPDATE")
_FIND = text(f"""
    SELECT {COLUMNS} FROM action_execution
    WHERE id = :id AND (CAST(:namespace AS text) IS NULL OR namespace = :namespace)
""")
_FINISH = text("""
    UPDATE action_execution SET detail = :detail, before = CAST(:before AS json), after = CAST(:after AS json),
        state = CASE WHEN :state = 'applied' AND cleared_at IS NOT NULL THEN 'undoing' ELSE :state END,
        finished_at = clock_timestamp(), target = :target, due_at = now(), attempts = 0
    WHERE id = :id AND state = 'pending'
""")
_FINISH_UNDO = text("""
    UPDATE action_execution SET state = :state, undo_detail = :detail, undone_at = now()
    WHERE id = :id AND state = 'undoing'
""")
_RETRY = text("""
    UPDATE action_execution SET due_at = now() + CAST(:pause AS interval), detail = :detail
    WHERE id = :id AND state IN ('pending', 'undoing')
""")
_REQUEST_UNDO = text("""
    UPDATE action_execution SET state = 'undoing', due_at = now(), attempts = 0 WHERE id = :id AND state = 'applied'
""")
#: States of what was done, whatever became of it since.
_ACTED = (
    ExecutionState.APPLIED,
    ExecutionState.DONE,
    ExecutionState.UNDOING,
    ExecutionState.UNDONE,
    ExecutionState.KEPT,
)
_COUNTED = ", ".join(repr(state.value) for state in _ACTED)
_RECENT = text(f"""
    SELECT count(*) FILTER (WHERE kind = :kind AND target = :target) AS same, count(*) AS all
    FROM action_execution
    WHERE created_at > now() - interval '1 hour' AND NOT dry_run AND id <> :id
      AND (state IN ({_COUNTED}) OR (state = 'pending' AND attempts > 0 AND id < :id))
""")
_HOLDERS = text(f"""
    SELECT {COLUMNS} FROM action_execution
    WHERE kind = :kind AND target = :target AND state = 'applied' AND id <> :id ORDER BY finished_at FOR UPDATE
""")
_SET_BEFORE = text("UPDATE action_execution SET before = CAST(:before AS json) WHERE id = :id")
_SET_TARGET = text("UPDATE action_execution SET target = :target WHERE id = :id")
_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 7205759412))")
_IS_NEAR = text("""
    SELECT EXISTS (SELECT FROM action_execution WHERE state IN ('pending', 'undoing')
                   AND due_at <= now() + CAST(:within AS interval)) AS near
""")
_REMOVE = text("""
    DELETE FROM action_execution WHERE id IN (
        SELECT id FROM action_execution WHERE created_at < now() - CAST(:retention AS interval)
          AND state NOT IN ('pending', 'applied', 'undoing') ORDER BY created_at LIMIT :limit
    )
""")


def insert(work: UnitOfWork, cause: Cause, wanted: WantedExecution) -> UUID:
    """Store an action that is to be done, unless the firing has one at that position. Returns its id."""
    id_ = ids.new_id()
    document = {
        "summary": shortened(cause.summary, _SENTENCE),
        "severity": cause.severity,
        "labels": dict(cause.labels),
        "value": cause.value,
        "actor": cause.actor,
    }
    values = {
        "id": id_,
        "namespace": cause.namespace,
        "firing": cause.firing_id,
        "position": wanted.position,
        "rule": cause.rule,
        "kind": wanted.kind,
        "target": wanted.target,
        "parameters": json.dumps(wanted.parameters),
        "cause": json.dumps(document),
        "state": ExecutionState.REFUSED.value if wanted.refused else ExecutionState.PENDING.value,
        "dry_run": cause.dry_run,
        "detail": wanted.refused,
    }
    work.execute(_INSERT, values)
    return id_


def clear(work: UnitOfWork, firing_id: UUID) -> None:
    """Take back what was done for a firing, as far as it holds and is to be undone."""
    work.execute(_CLEAR, {"firing": firing_id})


def claim(work: UnitOfWork, lease: timedelta) -> ActionExecution | None:
    """Take the next execution that is due, for the time of a lease: no other worker does it meanwhile."""
    return work.row_of(ActionExecution, _CLAIM, {"lease": lease})


def get(work: UnitOfWork, id_: UUID) -> ActionExecution | None:
    """Return an execution, and lock its row."""
    return work.row_of(ActionExecution, _GET, {"id": id_})


def find(work: UnitOfWork, id_: UUID, namespace: str | None) -> ActionExecution | None:
    """Return an execution of a namespace, or of any."""
    return work.row_of(ActionExecution, _FIND, {"id": id_, "namespace": namespace})


def finish(
    work: UnitOfWork,
    id_: UUID,
    state: ExecutionState,
    target: str,
    detail: str,
    before: Any = None,
    after: Any = None,
) -> None:
    """Record what came of a pending execution."""
    values = {"id": id_, "state": state.value, "target": target, "detail": shortened(detail, _SENTENCE)}
    work.execute(_FINISH, {**values, "before": _json(before), "after": _json(after)})


def finish_undo(work: UnitOfWork, id_: UUID, state: ExecutionState, detail: str) -> None:
    """Record what came of taking an execution back."""
    work.execute(_FINISH_UNDO, {"id": id_, "state": state.value, "detail": shortened(detail, _SENTENCE)})


def retry(work: UnitOfWork, id_: UUID, pause: timedelta, detail: str) -> None:
    """Try an execution again after a pause."""
    work.execute(_RETRY, {"id": id_, "pause": pause, "detail": shortened(detail, _SENTENCE)})


def request_undo(work: UnitOfWork, id_: UUID) -> bool:
    """Take back an execution that holds; False when it does not."""
    return work.run(_REQUEST_UNDO, {"id": id_}) == 1


def recent(work: UnitOfWork, execution: ActionExecution, target: str) -> Any:
    """Return how many other executions acted within the last hour: `same` kind and target, and `all`."""
    values = {"kind": execution.kind, "target": target, "id": execution.id}
    return work.rows(_RECENT, values)[0]


def holders(work: UnitOfWork, execution: ActionExecution) -> list[ActionExecution]:
    """Return the other executions that hold the same thing, the oldest first, and lock their rows."""
    values = {"kind": execution.kind, "target": execution.target, "id": execution.id}
    return work.rows_of(ActionExecution, _HOLDERS, values)


def set_before(work: UnitOfWork, id_: UUID, before: Any) -> None:
    """Say what an execution has to restore."""
    work.execute(_SET_BEFORE, {"id": id_, "before": _json(before)})


def set_target(work: UnitOfWork, id_: UUID, target: str) -> None:
    """Say what an execution acts on, where that is known only when it is done."""
    work.execute(_SET_TARGET, {"id": id_, "target": target})


def lock(work: UnitOfWork) -> None:
    """Lock all executions until the end of the transaction: they happen one after the other, and are counted so."""
    work.execute(_LOCK, {"key": "actions"})


def is_near(work: UnitOfWork, within: timedelta) -> bool:
    """Whether something is due within that time."""
    row = work.row(_IS_NEAR, {"within": within})
    return bool(row and row.near)


def remove(work: UnitOfWork, retention: timedelta, limit: int) -> int:
    """Remove up to so many executions whose retention is over. Returns their number."""
    return work.run(_REMOVE, {"retention": retention, "limit": limit})


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value)


def page(
    work: UnitOfWork, namespace: str | None, rule: str | None, state: str | None, before: UUID | None, limit: int
) -> list[ActionExecution]:
    """Return executions from the newest to the oldest."""
    given: dict[str, Any] = {"limit": limit}
    conditions = {
        "namespace": ("namespace = :namespace", namespace),
        "rule": ("rule = :rule", rule),
        "state": ("state = :state", state),
        "before": ("id < :before", before),
    }
    statement = f"SELECT {COLUMNS} FROM action_execution {where(given, conditions)} ORDER BY id DESC LIMIT :limit"
    return work.rows_of(ActionExecution, text(statement), given)
