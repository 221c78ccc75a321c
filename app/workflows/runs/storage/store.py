"""
The statements on runs, steps and attempts.

A step is claimed by compare-and-set and recorded under the lock of its run. A transaction that locks both locks the run
first, except for a claim, which waits for no run.
Every instant is the database's: `now()` is the start of its transaction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.kernel.database import UnitOfWork
from app.workflows.runs.storage.selected import (
    ClaimedStep,
    LockedItem,
    LockedRun,
    LockedStep,
    ReadyStep,
    RenewedStep,
    SubmittedRun,
)

#: The channel on which holders are notified that a step must stop; the payload is the step's id.
STOP_CHANNEL = "arriero_stop"

_KEEP_DEFINITION = text(
    "INSERT INTO definition (sha256, document) VALUES (:sha256, CAST(:document AS json)) ON CONFLICT DO NOTHING"
)
_HOLD_DEFINITION = text("SELECT 1 FROM definition WHERE sha256 = :sha256 FOR KEY SHARE")
_DOCUMENT = text("SELECT document FROM definition WHERE sha256 = :sha256")
_INSERT_RUN = text("""
    INSERT INTO run (id, namespace, workflow, version, sha256, state, paused, workflow_paused, priority, rank, labels,
                     inputs, inputs_sha256, inputs_bytes, idempotency_key, request_sha256, concurrency_key, dedup_key,
                     parent_step_id, depth, forked_from, retention_s, deadline_at, trace_parent, expected)
    VALUES (:id, CAST(:namespace AS text), CAST(:workflow AS text), :version, :sha256, :state, false,
            EXISTS (SELECT FROM workflow_pause
                    WHERE namespace = CAST(:namespace AS text) AND name = CAST(:workflow AS text)), :priority, :rank,
            CAST(:labels AS jsonb), CAST(:inputs AS json), :inputs_sha256, :inputs_bytes, :key, :request,
            :concurrency_key, :dedup_key, :parent_step_id, :depth, :forked_from, :retention_s,
            now() + CAST(:deadline AS interval), :trace_parent, CAST(:expected AS json))
    ON CONFLICT (namespace, idempotency_key) DO NOTHING
""")
_INSERT_STEPS = text("""
    INSERT INTO step (id, run_id, key, position, kind, model, model_index, queue, priority, rank, state, delegated,
                      attempt, failures, losses, tokens_in, tokens_out)
    SELECT id, :run_id, key, position, kind, model, 0, queue, :priority, :rank, 'pending', false, 0, 0, 0, 0, 0
    FROM json_to_recordset(CAST(:steps AS json))
         AS listed (id uuid, key text, position integer, kind text, model text, queue text)
""")
# A step of a paused run cannot be claimed. The claim has locked the step, so it must not wait for the lock of the run:
# where another transaction has that, the run is begun in a transaction of its own (`to_begin`).
_CLAIM = text("""
    WITH claimed AS (
        UPDATE step SET state = 'running', owner = CAST(:owner AS text), not_before = NULL, finish_reason = NULL,
                        lease_until = now() + CAST(:lease AS interval), started_at = COALESCE(step.started_at, now())
        FROM run
        WHERE step.id = :id AND attempt = :attempt AND step.state = 'ready'
          AND run.id = step.run_id AND NOT run.paused AND NOT run.workflow_paused
        RETURNING step.id, step.run_id, step.key, step.kind, step.attempt, step.parent_id, step.item, step.input,
                  step.input_sha256, step.model, step.deadline_at - now() AS remaining, run.namespace, run.workflow,
                  run.sha256, run.priority, run.state AS run_state, run.ending AS run_ending, run.depth,
                  run.trace_parent
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
    id, namespace, workflow, sha256, state, ending, paused OR workflow_paused AS paused, priority, rank, labels,
    concurrency_key, parent_step_id, depth, error
"""
# Not FOR UPDATE: other transactions may insert rows that refer to the run.
_LOCK_RUN = text(f"SELECT {_RUN_COLUMNS} FROM run WHERE id = :id FOR NO KEY UPDATE")
_STEP_COLUMNS = """
    id, key, kind, parent_id, model, model_index, queue, priority, rank, state, branch, delegated, awaits, attempt,
    failures, losses, owner, error, lease_until < now() AS expired, deadline_at < now() AS late
"""
_STEPS = text(f"SELECT {_STEP_COLUMNS} FROM step WHERE run_id = :id AND parent_id IS NULL ORDER BY position")
_ITEM = text(f"""
    SELECT {_STEP_COLUMNS}, total, waiting, in_flight, failed, stopping, truncated,
           fan_out.tokens_in AS map_tokens_in, fan_out.tokens_out AS map_tokens_out
    FROM step LEFT JOIN fan_out ON step_id = parent_id WHERE run_id = :id AND key = :key
""")
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
        finish_reason = CASE WHEN :state IN ('pending', 'ready', 'running') THEN NULL
                             ELSE COALESCE(CAST(:finish_reason AS text), finish_reason) END,
        tokens_in = tokens_in + :tokens_in, tokens_out = tokens_out + :tokens_out
    WHERE id = :id
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
_BEGIN_ATTEMPT = text("INSERT INTO attempt (step_id, attempt, owner, model) VALUES (:id, :attempt, :owner, :model)")
_BACKDATE_ATTEMPT = text("""
    UPDATE attempt SET started_at = now() - CAST(:begun AS interval) WHERE step_id = :id AND attempt = :attempt
""")
_END_ATTEMPT = text("""
    UPDATE attempt SET finished_at = now(), outcome = :outcome, message = :message, text = :text,
        tokens_in = :tokens_in, tokens_out = :tokens_out, tokens_cached = :tokens_cached,
        first_token_ms = :first_token_ms, finish_reason = :finish_reason, cost = :cost,
        cost_basis = CAST(:cost_basis AS json),
        assembly = CAST(:assembly AS json), hooks = CAST(:hooks AS json)
    WHERE step_id = :id AND attempt = :attempt
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


def keep_definition(work: UnitOfWork, sha256: str, document: str) -> None:
    """Store a definition unless it is stored already, and lock it against removal until the end of the transaction."""
    while work.row(_HOLD_DEFINITION, {"sha256": sha256}) is None:
        work.run(_KEEP_DEFINITION, {"sha256": sha256, "document": document})


def document(work: UnitOfWork, sha256: str) -> dict[str, Any]:
    """The definition of that hash."""
    row = work.row(_DOCUMENT, {"sha256": sha256})
    assert row is not None, "a foreign key holds it"
    found: dict[str, Any] = row.document
    return found


def exists(work: UnitOfWork, run_id: UUID) -> bool:
    """Whether there is such a run."""
    return work.row(text("SELECT 1 FROM run WHERE id = :id"), {"id": run_id}) is not None


def insert_run(work: UnitOfWork, values: Mapping[str, Any]) -> bool:
    """Write a run; False when its idempotency key is taken."""
    if values["key"] is not None:
        return work.run(_INSERT_RUN, values) == 1
    work.execute(_INSERT_RUN, values)
    return True


def insert_steps(work: UnitOfWork, run_id: UUID, priority: str, rank: int, steps: Sequence[Mapping[str, Any]]) -> None:
    """Write the steps of a run: `id`, `key`, `position`, `kind`, `model`, `queue` of each."""
    values = {"run_id": run_id, "priority": priority, "rank": rank, "steps": json.dumps(steps, default=str)}
    work.execute(_INSERT_STEPS, values)


def run_of_key(work: UnitOfWork, namespace: str, key: str) -> SubmittedRun | None:
    """The run of an idempotency key in a namespace."""
    statement = text("SELECT id, request_sha256 FROM run WHERE namespace = :namespace AND idempotency_key = :key")
    return work.row_of(SubmittedRun, statement, {"namespace": namespace, "key": key})


def run_of_step(work: UnitOfWork, step_id: UUID) -> UUID | None:
    """The run of a step."""
    row = work.row(text("SELECT run_id FROM step WHERE id = :id"), {"id": step_id})
    return None if row is None else row.run_id


def claim(work: UnitOfWork, step_id: UUID, attempt: int, owner: str, lease: timedelta) -> ClaimedStep | None:
    """Claim a ready step under a lease; None when that attempt is not ready, or the run is paused."""
    values = {"id": step_id, "attempt": attempt, "owner": owner, "lease": lease}
    return work.row_of(ClaimedStep, _CLAIM, values)


def begin_run(work: UnitOfWork, run_id: UUID) -> None:
    """Mark a queued run as running."""
    work.execute(_BEGIN_RUN, {"id": run_id})


def lock_run(work: UnitOfWork, run_id: UUID) -> LockedRun | None:
    """The run, locked until the end of the transaction."""
    return work.row_of(LockedRun, _LOCK_RUN, {"id": run_id})


def open_run(work: UnitOfWork, run_id: UUID) -> tuple[LockedRun | None, list[LockedStep]]:
    """The run, locked, and its steps, which cannot change then."""
    locked = work.execute_of(LockedRun, _LOCK_RUN, {"id": run_id})
    steps = work.rows_of(LockedStep, _STEPS, {"id": run_id})
    return locked.fetchone(), steps


def open_item(work: UnitOfWork, run_id: UUID, key: str) -> tuple[LockedRun | None, LockedItem | None]:
    """The run, locked, and one item of a map."""
    locked = work.execute_of(LockedRun, _LOCK_RUN, {"id": run_id})
    item = work.row_of(LockedItem, _ITEM, {"id": run_id, "key": key})
    return locked.fetchone(), item


def move_steps(work: UnitOfWork, values: Sequence[Mapping[str, Any]]) -> None:
    """Write new states of steps."""
    if values:
        work.execute(_MOVE_STEP, list(values))


def move_run(work: UnitOfWork, values: Mapping[str, Any]) -> None:
    """Write the new state of a run."""
    work.execute(_MOVE_RUN, values)


def begin_attempt(work: UnitOfWork, step_id: UUID, attempt: int, owner: str, model: str | None) -> None:
    """Write that an attempt has begun."""
    work.execute(_BEGIN_ATTEMPT, {"id": step_id, "attempt": attempt, "owner": owner, "model": model})


def backdate_attempt(work: UnitOfWork, step_id: UUID, attempt: int, begun: timedelta) -> None:
    """Write that an attempt began so long ago."""
    work.execute(_BACKDATE_ATTEMPT, {"id": step_id, "attempt": attempt, "begun": begun})


def end_attempt(work: UnitOfWork, values: Mapping[str, Any]) -> None:
    """Write how an attempt ended."""
    work.execute(_END_ATTEMPT, values)


def notify_stop(work: UnitOfWork, step_id: UUID) -> None:
    """Notify the holder, at commit, that the step must stop."""
    work.execute(_NOTIFY_STOP, {"channel": STOP_CHANNEL, "step": str(step_id)})


def renew(work: UnitOfWork, ids: Sequence[UUID], owner: str, lease: timedelta) -> list[RenewedStep]:
    """Extend the leases that the owner still has."""
    return work.rows_of(RenewedStep, _RENEW, {"ids": list(ids), "owner": owner, "lease": lease})


def touch_run(work: UnitOfWork, run_id: UUID) -> list[ReadyStep]:
    """The ready steps of a run, marked as published now."""
    return work.rows_of(ReadyStep, _TOUCH_RUN, {"id": run_id})
