"""
The statements on the rows of workflows and runs.

A step is claimed by compare-and-set and recorded under the lock of its run. Whoever locks both locks the run first.
Every instant is the database's: `now()` is the start of its transaction.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.kernel.database import UnitOfWork
from app.kernel.errors import FailureReason, StepFailure
from app.workflows.runs.storage import payloads

#: The channel on which holders hear that a step is to be left; the payload is the step's id.
STOP_CHANNEL = "arriero_stop"


_KEEP_DEFINITION = text(
    "INSERT INTO definition (sha256, document) VALUES (:sha256, CAST(:document AS json)) ON CONFLICT DO NOTHING"
)
_HOLD_DEFINITION = text("SELECT 1 FROM definition WHERE sha256 = :sha256 FOR KEY SHARE")
_INSERT_RUN = text("""
    INSERT INTO run (id, workflow, version, sha256, state, paused, workflow_paused, priority, rank, labels, inputs,
                     inputs_sha256, inputs_bytes, idempotency_key, request_sha256, concurrency_key, dedup_key,
                     parent_step_id, depth, forked_from, retention_s, deadline_at)
    VALUES (:id, CAST(:workflow AS text), :version, :sha256, :state, false,
            EXISTS (SELECT FROM workflow_pause WHERE name = CAST(:workflow AS text)), :priority, :rank,
            CAST(:labels AS jsonb), CAST(:inputs AS json), :inputs_sha256, :inputs_bytes, :key, :request, :concurrency_key, :dedup_key,
            :parent_step_id, :depth, :forked_from, :retention_s, now() + CAST(:deadline AS interval))
    ON CONFLICT (idempotency_key) DO NOTHING
""")
# A pause of a workflow is written under the other kind of this lock: whoever reads it and writes what follows from it
# holds this kind from before the one until the end of the other. Whoever locks a run too locks that first.
_HOLD_PAUSE = text("SELECT pg_advisory_xact_lock_shared(hashtextextended(:name, 7205759405))")
_LOCK_PAUSE = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 7205759405))")
_MARK_PAUSE = text("""
    UPDATE run SET workflow_paused = EXISTS (SELECT FROM workflow_pause WHERE name = run.workflow)
    WHERE id = :id AND workflow_paused <> EXISTS (SELECT FROM workflow_pause WHERE name = run.workflow)
    RETURNING workflow_paused
""")
_INSERT_STEPS = text("""
    INSERT INTO step (id, run_id, key, position, kind, model, model_index, queue, priority, rank, state, delegated,
                      attempt, failures, losses, tokens_in, tokens_out)
    SELECT id, :run_id, key, position, kind, model, 0, queue, :priority, :rank, 'pending', false, 0, 0, 0, 0, 0
    FROM json_to_recordset(CAST(:steps AS json))
         AS listed (id uuid, key text, position integer, kind text, model text, queue text)
""")
# A step of a run that stands still is not there to be taken. Whoever locks a run and a step locks the run first, so a
# claim, which has the step, begins the run only where nobody has that; else it is `to_begin`.
_CLAIM = text("""
    WITH claimed AS (
        UPDATE step SET state = 'running', owner = CAST(:owner AS text), not_before = NULL,
                        lease_until = now() + CAST(:lease AS interval), started_at = COALESCE(step.started_at, now())
        FROM run
        WHERE step.id = :id AND attempt = :attempt AND step.state = 'ready'
          AND run.id = step.run_id AND NOT run.paused AND NOT run.workflow_paused
        RETURNING step.id, step.run_id, step.key, step.attempt, step.parent_id, step.item, step.input,
                  step.input_sha256, step.model, step.deadline_at - now() AS remaining, run.workflow, run.sha256,
                  run.priority, run.state AS run_state, run.ending AS run_ending, run.depth
    ), noted AS (
        INSERT INTO attempt (step_id, attempt, owner, model)
        SELECT id, attempt, CAST(:owner AS text), model FROM claimed
    ), begun AS (
        UPDATE run SET state = 'running', started_at = now() WHERE id = (
            SELECT run.id FROM run JOIN claimed ON claimed.run_id = run.id
            WHERE run.state = 'queued' FOR NO KEY UPDATE OF run SKIP LOCKED
        ) RETURNING id
    )
    SELECT *, run_state = 'queued' AND NOT EXISTS (SELECT FROM begun) AS to_begin FROM claimed
""")
_BEGIN_RUN = text("UPDATE run SET state = 'running', started_at = now() WHERE id = :id AND state = 'queued'")
_RUN_COLUMNS = """
    id, workflow, version, sha256, state, ending, paused OR workflow_paused AS paused, priority, rank, labels,
    concurrency_key, parent_step_id, depth, retention_s, error
"""
# Not FOR UPDATE: rows that name the run may be inserted beside it.
_LOCK_RUN = text(f"SELECT {_RUN_COLUMNS} FROM run WHERE id = :id FOR NO KEY UPDATE")
_STEP_COLUMNS = """
    id, key, kind, parent_id, item, model, model_index, queue, priority, rank, state, branch, delegated, awaits,
    attempt, failures, losses, owner, error, lease_until < now() AS expired, deadline_at < now() AS late
"""
_STEPS = text(f"SELECT {_STEP_COLUMNS} FROM step WHERE run_id = :id AND parent_id IS NULL ORDER BY position")
_ITEM = text(f"""
    SELECT {_STEP_COLUMNS}, total, waiting, in_flight, failed, stopping
    FROM step LEFT JOIN fan_out ON step_id = parent_id WHERE run_id = :id AND key = :key
""")
_DOCUMENT = text("SELECT document FROM definition WHERE sha256 = :sha256")
_INPUTS = text("SELECT inputs, inputs_sha256 FROM run WHERE id = :id")
_OUTPUTS = text("""
    SELECT id, key, kind, state, output, output_sha256, output_bytes, error FROM step
    WHERE run_id = :id AND key = ANY(:keys)
""")
_ITEM_OUTPUTS = text("SELECT output, output_sha256, output_bytes FROM step WHERE parent_id = :id ORDER BY item")
# A parameter is cast where it first occurs: its type holds for the whole statement.
_MOVE_STEP = text("""
    UPDATE step SET
        state = CAST(:state AS text), attempt = :attempt, failures = :failures, losses = :losses, branch = :branch,
        delegated = CAST(:delegated AS boolean), model = :model, model_index = :model_index, queue = :queue,
        owner = CASE WHEN :state IN ('running', 'cancelling') AND NOT :delegated
                     THEN COALESCE(CAST(:owner AS text), owner) END,
        lease_until = CASE WHEN :state = 'running' THEN now() + CAST(:lease AS interval)
                           WHEN :state = 'cancelling' AND NOT :delegated THEN lease_until END,
        awaits = CASE WHEN :state IN ('awaiting', 'cancelling') THEN COALESCE(CAST(:awaits AS json), awaits) END,
        not_before = CASE WHEN :state = 'waiting' THEN now() + CAST(:delay AS interval)
                          WHEN :state = 'awaiting'
                          THEN COALESCE(CAST(:not_before AS timestamptz), now() + CAST(:delay AS interval)) END,
        published_at = CASE WHEN :state = 'ready' THEN now() ELSE published_at END,
        ready_at = CASE WHEN :state IN ('ready', 'running') THEN COALESCE(ready_at, now()) ELSE ready_at END,
        deadline_at = CASE WHEN :state = 'pending' THEN NULL
                           WHEN :state IN ('ready', 'running')
                           THEN COALESCE(deadline_at, now() + CAST(:total AS interval))
                           ELSE deadline_at END,
        started_at = CASE WHEN :state = 'running' THEN COALESCE(started_at, now()) ELSE started_at END,
        finished_at = CASE WHEN CAST(:final AS boolean) THEN now() END,
        output = CASE WHEN CAST(:has_output AS boolean) THEN CAST(:output AS json)
                      WHEN :state = 'pending' THEN NULL ELSE output END,
        output_sha256 = CASE WHEN :has_output THEN :output_sha256
                             WHEN :state = 'pending' THEN NULL ELSE output_sha256 END,
        output_bytes = CASE WHEN :has_output THEN :output_bytes WHEN :state = 'pending' THEN NULL ELSE output_bytes END,
        error = CASE WHEN :state = 'pending' THEN NULL ELSE COALESCE(CAST(:error AS json), error) END,
        tokens_in = tokens_in + :tokens_in, tokens_out = tokens_out + :tokens_out
    WHERE id = :id
""")
_BEGIN_ATTEMPT = text("INSERT INTO attempt (step_id, attempt, owner, model) VALUES (:id, :attempt, :owner, :model)")
_END_ATTEMPT = text("""
    UPDATE attempt SET finished_at = now(), outcome = :outcome, message = :message, text = :text,
        tokens_in = :tokens_in, tokens_out = :tokens_out, tokens_cached = :tokens_cached,
        first_token_ms = :first_token_ms
    WHERE step_id = :id AND attempt = :attempt
""")
_MOVE_RUN = text("""
    UPDATE run SET state = CAST(:state AS text), ending = :ending,
        started_at = CASE WHEN :state = 'running' THEN COALESCE(started_at, now()) ELSE started_at END,
        finished_at = CASE WHEN CAST(:final AS boolean) THEN now() END,
        expires_at = CASE WHEN :final THEN now() + make_interval(secs => retention_s) END,
        output = CAST(:output AS json), output_sha256 = :output_sha256, output_bytes = :output_bytes,
        error = CASE WHEN :state NOT IN ('blocked', 'queued', 'running') THEN COALESCE(CAST(:error AS json), error) END
    WHERE id = :id
""")
_LOCK_TIMEOUT = text("SELECT set_config('lock_timeout', :ms, true)")
_BREAK_RUN = text("""
    UPDATE run SET state = 'failed', ending = 'failed', finished_at = now(), error = CAST(:error AS json),
                   expires_at = now() + make_interval(secs => retention_s)
    WHERE id = :id AND finished_at IS NULL RETURNING parent_step_id, concurrency_key
""")
_BREAK_FAN_OUTS = text("""
    UPDATE fan_out SET waiting = 0, in_flight = 0, stopping = true
    FROM step WHERE step.id = step_id AND step.run_id = :id AND step.finished_at IS NULL
""")
_BREAK_ATTEMPTS = text("""
    UPDATE attempt SET finished_at = now(), outcome = :reason, message = :message
    FROM step WHERE step.id = step_id AND step.run_id = :id AND step.finished_at IS NULL
      AND attempt.attempt = step.attempt AND attempt.finished_at IS NULL
""")
_BREAK_STEPS = text("""
    UPDATE step SET state = CASE WHEN state = 'pending' THEN 'skipped' ELSE 'cancelled' END, owner = NULL,
                    lease_until = NULL, not_before = NULL, awaits = NULL, delegated = false, finished_at = now()
    WHERE run_id = :id AND state NOT IN ('succeeded', 'failed', 'skipped', 'cancelled')
    RETURNING id
""")
_NOTIFY_STOP = text("SELECT pg_notify(:channel, :step)")
_RENEW = text("""
    UPDATE step SET lease_until = now() + CAST(:lease AS interval)
    WHERE id = ANY(:ids) AND owner = :owner AND state IN ('running', 'cancelling')
    RETURNING id, attempt, state
""")
_TOUCH_RUN = text("""
    UPDATE step SET published_at = now() WHERE run_id = :id AND state = 'ready'
    RETURNING id, key, attempt, queue, priority, rank
""")
_CALLED_BY = text("""
    SELECT id FROM run WHERE parent_step_id = :id AND state NOT IN ('succeeded', 'failed', 'cancelled')
""")
_ENDED_CALL = text("""
    SELECT run.id, run.workflow, run.state, run.output, run.output_sha256, run.error, step.run_id AS parent_run_id,
           step.key,
           (SELECT COALESCE(sum(tokens_in), 0) FROM step AS own WHERE own.run_id = run.id AND own.parent_id IS NULL)
               AS tokens_in,
           (SELECT COALESCE(sum(tokens_out), 0) FROM step AS own WHERE own.run_id = run.id AND own.parent_id IS NULL)
               AS tokens_out
    FROM run JOIN step ON step.id = run.parent_step_id
    WHERE run.id = :id AND run.state IN ('succeeded', 'failed', 'cancelled')
""")
_TAKE_EVENT = text("""
    UPDATE event SET step_id = :step_id WHERE id = (
        SELECT id FROM event WHERE run_id = :id AND name = :name AND step_id IS NULL ORDER BY id LIMIT 1
    ) RETURNING payload, payload_sha256
""")
_EVENT_OF_KEY = text("""
    SELECT event.id, event.name, event.payload::text AS payload, event.payload_sha256, step.key AS step
    FROM event LEFT JOIN step ON step.id = event.step_id
    WHERE event.run_id = :id AND event.key = :key
""")
# What another transaction has locked is passed over, with what the run has called: its rows go with it.
_EXPIRED_RUNS = text("""
    SELECT id FROM run WHERE expires_at < now() AND parent_step_id IS NULL AND id <> ALL(:passed)
    ORDER BY expires_at LIMIT :limit FOR UPDATE SKIP LOCKED
""")
_CALLED_RUNS = text("""
    SELECT run.id FROM step JOIN run ON run.parent_step_id = step.id
    WHERE step.run_id = ANY(:ids) LIMIT :limit FOR UPDATE OF run NOWAIT
""")
_REMOVE_ITEMS = text("""
    DELETE FROM step WHERE id IN (
        SELECT id FROM step WHERE run_id = ANY(:ids) AND parent_id IS NOT NULL LIMIT :limit
    )
""")
_REMOVE_RUNS = text("DELETE FROM run WHERE id = ANY(:ids)")
_HISTORY = text("""
    INSERT INTO history (run_id, step, attempt, event, cause)
    VALUES (:run_id, :step, :attempt, :event, CAST(:cause AS json))
""")


def keep_definition(work: UnitOfWork, sha256: str, document: str) -> None:
    """Store the definition unless it is there, and hold it until the end of the transaction."""
    while work.row(_HOLD_DEFINITION, {"sha256": sha256}) is None:
        work.run(_KEEP_DEFINITION, {"sha256": sha256, "document": document})


def insert_run(work: UnitOfWork, values: Mapping[str, Any]) -> bool:
    """Write a run; False when its idempotency key is taken."""
    if values["key"] is not None:
        return work.run(_INSERT_RUN, values) == 1
    work.ask(_INSERT_RUN, values)
    return True


def hold_pause(work: UnitOfWork, workflow: str) -> None:
    """Let nobody pause or resume the workflow until the end of the transaction."""
    work.ask(_HOLD_PAUSE, {"name": workflow})


def lock_pause(work: UnitOfWork, workflow: str) -> None:
    """Wait for all that hold the pause of the workflow, and let nobody else until the end of the transaction."""
    work.ask(_LOCK_PAUSE, {"name": workflow})


def mark_pause(work: UnitOfWork, run_id: UUID, workflow: str) -> bool | None:
    """Pause a run, or let it go on, as its workflow is; gives what it is now, or None if it was that before."""
    hold_pause(work, workflow)
    row = work.row(_MARK_PAUSE, {"id": run_id})
    return None if row is None else row.workflow_paused


def insert_steps(work: UnitOfWork, run_id: UUID, priority: str, rank: int, steps: Sequence[Mapping[str, Any]]) -> None:
    """Write the steps of a run: `id`, `key`, `position`, `kind`, `model`, `queue` of each."""
    values = {"run_id": run_id, "priority": priority, "rank": rank, "steps": json.dumps(steps, default=str)}
    work.ask(_INSERT_STEPS, values)


def run_of_key(work: UnitOfWork, key: str) -> Any | None:
    """The run that an idempotency key belongs to: `id`, `request_sha256`."""
    return work.row(text("SELECT id, request_sha256 FROM run WHERE idempotency_key = :key"), {"key": key})


def claim(work: UnitOfWork, step_id: UUID, attempt: int, owner: str, lease: timedelta) -> Any | None:
    """Take a ready step under a lease, or None when it is not there to be taken."""
    return work.row(_CLAIM, {"id": step_id, "attempt": attempt, "owner": owner, "lease": lease})


def begin_run(work: UnitOfWork, run_id: UUID) -> None:
    """A queued run has a step that began."""
    work.ask(_BEGIN_RUN, {"id": run_id})


def lock_run(work: UnitOfWork, run_id: UUID) -> Any | None:
    """The run's row, locked until the end of the transaction."""
    return work.row(_LOCK_RUN, {"id": run_id})


def run_of_step(work: UnitOfWork, step_id: UUID) -> UUID | None:
    """The run of a step."""
    row = work.row(text("SELECT run_id FROM step WHERE id = :id"), {"id": step_id})
    return None if row is None else row.run_id


def open_run(work: UnitOfWork, run_id: UUID) -> tuple[Any | None, list[Any]]:
    """The run's row, locked, and its steps, which cannot change then."""
    locked = work.ask(_LOCK_RUN, {"id": run_id})
    steps = work.rows(_STEPS, {"id": run_id})
    return locked.fetchone(), steps


def open_item(work: UnitOfWork, run_id: UUID, key: str) -> tuple[Any | None, Any | None]:
    """The run's row, locked, and one item of a map, with how far the map has come."""
    locked = work.ask(_LOCK_RUN, {"id": run_id})
    item = work.row(_ITEM, {"id": run_id, "key": key})
    return locked.fetchone(), item


def document(work: UnitOfWork, sha256: str) -> dict[str, Any]:
    """The definition of that hash."""
    row = work.row(_DOCUMENT, {"sha256": sha256})
    assert row is not None, "a foreign key holds it"
    found: dict[str, Any] = row.document
    return found


def inputs(work: UnitOfWork, run_id: UUID) -> dict[str, Any]:
    """The inputs of a run."""
    rows = payloads.filled(work, work.rows(_INPUTS, {"id": run_id}), "inputs")
    return rows[0].inputs if rows else {}


def outputs(
    work: UnitOfWork, run_id: UUID, keys: Collection[str], most: int, succeeded: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """
    How those steps stand: `state`, `output` and `error` of each. The output of a map is that of its items.

    `succeeded` names those that have succeeded in this transaction and are not written yet. Raises StepFailure when
    the outputs have more than `most` bytes together.
    """
    if not keys:
        return {}
    rows = work.rows(_OUTPUTS, {"id": run_id, "keys": list(keys)})
    maps = {row.key: row.id for row in rows if row.kind == "map" and (row.state == "succeeded" or row.key in succeeded)}
    items = {key: work.rows(_ITEM_OUTPUTS, {"id": step_id}) for key, step_id in maps.items()}
    size = sum(row.output_bytes or 0 for part in (rows, *items.values()) for row in part)
    if size > most:
        read = ", ".join(row.key for row in rows)
        message = f"the outputs that are read ({read}) have {size} bytes, more than runs.max_read_bytes ({most})"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)
    found: dict[str, dict[str, Any]] = {}
    for row in payloads.filled(work, rows, "output"):
        output = row.output
        if row.key in items:
            output = [item.output for item in payloads.filled(work, items[row.key], "output")]
        found[row.key] = {"state": row.state, "output": output, "error": row.error}
    return found


def move_steps(work: UnitOfWork, values: Sequence[Mapping[str, Any]]) -> None:
    """Write new states."""
    if values:
        work.ask(_MOVE_STEP, list(values))


def begin_attempt(work: UnitOfWork, step_id: UUID, attempt: int, owner: str, model: str | None) -> None:
    """A step is tried."""
    work.ask(_BEGIN_ATTEMPT, {"id": step_id, "attempt": attempt, "owner": owner, "model": model})


def end_attempt(work: UnitOfWork, values: Mapping[str, Any]) -> None:
    """A try has ended."""
    work.ask(_END_ATTEMPT, values)


def move_run(work: UnitOfWork, values: Mapping[str, Any]) -> None:
    """Write the state of a run."""
    work.ask(_MOVE_RUN, values)


def notify_stop(work: UnitOfWork, step_id: UUID) -> None:
    """Tell the holder, at commit, to leave the step."""
    work.ask(_NOTIFY_STOP, {"channel": STOP_CHANNEL, "step": str(step_id)})


def renew(work: UnitOfWork, ids: Sequence[UUID], owner: str, lease: timedelta) -> list[Any]:
    """Extend the leases that the owner still has; gives `id`, `attempt`, `state` of these."""
    return work.rows(_RENEW, {"ids": list(ids), "owner": owner, "lease": lease})


def touch_run(work: UnitOfWork, run_id: UUID) -> list[Any]:
    """The ready steps of a run, marked as published now."""
    return work.rows(_TOUCH_RUN, {"id": run_id})


def break_run(work: UnitOfWork, run_id: UUID, message: str) -> Any | None:
    """
    End a run as failed as it stands, without its definition: what was open is cancelled, and its holders are told.

    Gives `parent_step_id` and `concurrency_key`; None when it had ended. The run must be locked.
    """
    row = work.row(_BREAK_RUN, {"id": run_id, "error": json.dumps({"message": message, "steps": {}})})
    if row is not None:
        work.ask(_BREAK_FAN_OUTS, {"id": run_id})
        work.ask(_BREAK_ATTEMPTS, {"id": run_id, "message": message, "reason": FailureReason.INTERNAL})
        for step in work.rows(_BREAK_STEPS, {"id": run_id}):
            notify_stop(work, step.id)
    return row


def called_by(work: UnitOfWork, step_id: UUID) -> list[Any]:
    """The open runs that a step has called: `id`."""
    return work.rows(_CALLED_BY, {"id": step_id})


def ended_call(work: UnitOfWork, run_id: UUID) -> Any | None:
    """A run that has ended, and the step that called it."""
    rows = payloads.filled(work, work.rows(_ENDED_CALL, {"id": run_id}), "output")
    return rows[0] if rows else None


def take_event(work: UnitOfWork, run_id: UUID, name: str, step_id: UUID) -> Any | None:
    """The oldest event of that name that has answered no step yet; it answers this one. Gives its `payload`."""
    rows = work.rows(_TAKE_EVENT, {"id": run_id, "name": name, "step_id": step_id})
    return payloads.filled(work, rows, "payload")[0] if rows else None


def event_of_key(work: UnitOfWork, run_id: UUID, key: str) -> Any | None:
    """The event that came under that key: `id`, `name`, the text of its payload, and the `step` that it answered."""
    return work.row(_EVENT_OF_KEY, {"id": run_id, "key": key})


def expired_runs(work: UnitOfWork, limit: int, passed: Collection[UUID]) -> list[UUID]:
    """Runs whose retention is over, but for those of `passed` and those that are locked; they are locked then."""
    return [row.id for row in work.rows(_EXPIRED_RUNS, {"limit": limit, "passed": list(passed)})]


def called_runs(work: UnitOfWork, ids: Collection[UUID], limit: int) -> list[UUID]:
    """Runs that the steps of these have called; they are locked then."""
    return [row.id for row in work.rows(_CALLED_RUNS, {"ids": list(ids), "limit": limit})]


def remove_items(work: UnitOfWork, ids: Collection[UUID], limit: int) -> int:
    """Remove items of maps of these runs, at most so many; gives how many."""
    return work.run(_REMOVE_ITEMS, {"ids": list(ids), "limit": limit})


def remove_runs(work: UnitOfWork, ids: Collection[UUID]) -> int:
    """Remove runs with all that belongs to them; gives how many."""
    return work.run(_REMOVE_RUNS, {"ids": list(ids)})


def wait_for_locks(work: UnitOfWork, limit: timedelta) -> None:
    """Wait no longer than that for rows that another transaction has locked."""
    work.ask(_LOCK_TIMEOUT, {"ms": str(max(round(limit.total_seconds() * 1000), 1))})


def add_history(work: UnitOfWork, entries: Sequence[Mapping[str, Any]]) -> None:
    """Add to the history: `run_id`, `step`, `attempt`, `event`, `cause` (JSON text)."""
    if entries:
        work.ask(_HISTORY, list(entries))


def add_event(work: UnitOfWork, run_id: UUID, event: str, cause: Mapping[str, Any] | None = None) -> None:
    """Add an event of the whole run to its history, with its cause."""
    written = payloads.as_json(cause) if cause else None
    add_history(work, [{"run_id": run_id, "step": None, "attempt": None, "event": event, "cause": written}])
