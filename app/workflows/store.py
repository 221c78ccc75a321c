"""
The statements on the rows of workflows and runs.

A step is claimed by compare-and-set and recorded under the lock of its run. Whoever locks both locks the run first.
Every instant is the database's: `now()` is the start of its transaction.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Boolean, Interval, Text, TextClause, bindparam, text

from app.kernel.database import Work

#: The channel on which holders hear that a step is to be left; the payload is the step's id.
STOP_CHANNEL = "arriero_stop"


#: Types of parameters that Postgres could not tell from their places alone.
_TYPES: Mapping[str, Any] = {
    "state": Text(),
    "owner": Text(),
    "lease": Interval(),
    "delay": Interval(),
    "age": Interval(),
    "final": Boolean(),
    "has_output": Boolean(),
}


def _sql(statement: str) -> TextClause:
    named = set(re.findall(r"(?<!:):(\w+)", statement))
    return text(statement).bindparams(*(bindparam(name, type_=_TYPES[name]) for name in named & _TYPES.keys()))


_KEEP_DEFINITION = _sql(
    "INSERT INTO definition (sha256, document) VALUES (:sha256, CAST(:document AS json)) ON CONFLICT DO NOTHING"
)
_INSERT_RUN = _sql("""
    INSERT INTO run (id, workflow, version, sha256, state, priority, inputs, idempotency_key, request_sha256)
    VALUES (:id, :workflow, :version, :sha256, :state, :priority, CAST(:inputs AS json), :key, :request)
    ON CONFLICT (idempotency_key) DO NOTHING
""")
_INSERT_STEP = _sql("""
    INSERT INTO step (id, run_id, key, position, kind, model, queue, priority, state, attempt, failures, losses,
                      tokens_in, tokens_out, published_at, ready_at)
    VALUES (:id, :run_id, :key, :position, :kind, :model, :queue, :priority, :state, :attempt, 0, 0, 0, 0,
            CASE WHEN :state = 'ready' THEN now() END, CASE WHEN :state = 'ready' THEN now() END)
""")
_CLAIM = _sql("""
    WITH claimed AS (
        UPDATE step SET state = 'running', owner = :owner, lease_until = now() + :lease, not_before = NULL,
                        started_at = COALESCE(started_at, now())
        WHERE id = :id AND attempt = :attempt AND state = 'ready'
        RETURNING id, run_id, key, attempt
    ), noted AS (
        INSERT INTO attempt (step_id, attempt, owner) SELECT id, attempt, :owner FROM claimed
    )
    SELECT claimed.id, claimed.run_id, claimed.key, claimed.attempt, run.sha256, run.inputs, run.priority, run.state
    FROM claimed JOIN run ON run.id = claimed.run_id
""")
_BEGIN_RUN = _sql("UPDATE run SET state = 'running', started_at = now() WHERE id = :id AND state = 'queued'")
_LOCK_RUN = _sql("SELECT id, workflow, sha256, state, priority, inputs FROM run WHERE id = :id FOR UPDATE")
_STEPS = _sql("""
    SELECT id, key, kind, model, queue, priority, state, attempt, failures, losses, owner, error,
           lease_until < now() AS expired
    FROM step WHERE run_id = :id
""")
_DOCUMENT = _sql("SELECT document FROM definition WHERE sha256 = :sha256")
_OUTPUTS = _sql("SELECT key, output FROM step WHERE run_id = :id AND state = 'succeeded' AND key = ANY(:keys)")
_MOVE_STEP = _sql("""
    UPDATE step SET
        state = :state, attempt = :attempt, failures = :failures, losses = :losses,
        owner = CASE WHEN :state IN ('running', 'cancelling') THEN COALESCE(:owner, owner) END,
        lease_until = CASE WHEN :state = 'running' THEN now() + :lease
                           WHEN :state = 'cancelling' THEN lease_until END,
        not_before = CASE WHEN :state = 'waiting' THEN now() + :delay END,
        published_at = CASE WHEN :state = 'ready' THEN now() ELSE published_at END,
        ready_at = CASE WHEN :state IN ('ready', 'running') THEN COALESCE(ready_at, now()) ELSE ready_at END,
        started_at = CASE WHEN :state = 'running' THEN COALESCE(started_at, now()) ELSE started_at END,
        finished_at = CASE WHEN :final THEN now() END,
        output = CASE WHEN :has_output THEN CAST(:output AS json) ELSE output END,
        error = COALESCE(CAST(:error AS json), error),
        tokens_in = tokens_in + :tokens_in, tokens_out = tokens_out + :tokens_out
    WHERE id = :id
""")
_BEGIN_ATTEMPT = _sql("INSERT INTO attempt (step_id, attempt, owner) VALUES (:id, :attempt, :owner)")
_END_ATTEMPT = _sql("""
    UPDATE attempt SET finished_at = now(), outcome = :outcome, message = :message, text = :text,
        tokens_in = :tokens_in, tokens_out = :tokens_out, tokens_cached = :tokens_cached,
        first_token_ms = :first_token_ms
    WHERE step_id = :id AND attempt = :attempt
""")
_MOVE_RUN = _sql("""
    UPDATE run SET state = :state,
        started_at = CASE WHEN :state = 'running' THEN COALESCE(started_at, now()) ELSE started_at END,
        finished_at = CASE WHEN :final THEN now() END,
        output = CAST(:output AS json), error = CAST(:error AS json)
    WHERE id = :id
""")
_NOTIFY_STOP = _sql("SELECT pg_notify(:channel, :step)")
_RENEW = _sql("""
    UPDATE step SET lease_until = now() + :lease
    WHERE id = ANY(:ids) AND owner = :owner AND state IN ('running', 'cancelling')
    RETURNING id, attempt, state
""")
_EXPIRED = _sql("""
    SELECT run_id, key, attempt, owner FROM step
    WHERE state IN ('running', 'cancelling') AND lease_until < now() ORDER BY lease_until LIMIT :limit
""")
_DUE = _sql("""
    SELECT run_id, key, attempt FROM step
    WHERE state = 'waiting' AND not_before <= now() ORDER BY not_before LIMIT :limit
""")
_STALE_QUEUES = _sql("""
    SELECT queue, count(*) AS steps FROM step
    WHERE state = 'ready' AND published_at < now() - :age GROUP BY queue
""")
_TOUCH_STALE = _sql("""
    UPDATE step SET published_at = now() FROM run WHERE step.id IN (
        SELECT id FROM step
        WHERE state = 'ready' AND queue = :queue AND published_at < now() - :age
        ORDER BY published_at LIMIT :limit FOR UPDATE SKIP LOCKED
    ) AND step.state = 'ready' AND run.id = step.run_id
    RETURNING step.id, step.key, step.attempt, step.queue, step.priority, run.workflow
""")


def keep_definition(work: Work, sha256: str, document: str) -> None:
    """Store the definition unless it is there."""
    work.run(_KEEP_DEFINITION, {"sha256": sha256, "document": document})


def insert_run(work: Work, values: Mapping[str, Any]) -> bool:
    """Write a run; False when its idempotency key is taken."""
    return work.run(_INSERT_RUN, values) == 1


def insert_steps(work: Work, values: Sequence[Mapping[str, Any]]) -> None:
    """Write the steps of a run."""
    work.run(_INSERT_STEP, list(values))


def run_of_key(work: Work, key: str) -> Any | None:
    """The run that an idempotency key belongs to: `id`, `request_sha256`."""
    return work.row(text("SELECT id, request_sha256 FROM run WHERE idempotency_key = :key"), {"key": key})


def claim(work: Work, step_id: UUID, attempt: int, owner: str, lease: timedelta) -> Any | None:
    """Take a ready step under a lease, or None when it is not there to be taken."""
    return work.row(_CLAIM, {"id": step_id, "attempt": attempt, "owner": owner, "lease": lease})


def begin_run(work: Work, run_id: UUID) -> None:
    """A queued run has a step that began."""
    work.run(_BEGIN_RUN, {"id": run_id})


def lock_run(work: Work, run_id: UUID) -> Any | None:
    """The run's row, locked until the end of the transaction."""
    return work.row(_LOCK_RUN, {"id": run_id})


def steps_of(work: Work, run_id: UUID) -> list[Any]:
    """The states of a run's steps. Read after `lock_run`, they cannot change under the caller."""
    return work.rows(_STEPS, {"id": run_id})


def document(work: Work, sha256: str) -> dict[str, Any]:
    """The definition of that hash."""
    row = work.row(_DOCUMENT, {"sha256": sha256})
    assert row is not None, "a foreign key holds it"
    found: dict[str, Any] = row.document
    return found


def outputs(work: Work, run_id: UUID, keys: Sequence[str]) -> dict[str, Any]:
    """The outputs of those steps that have succeeded."""
    return {row.key: row.output for row in work.rows(_OUTPUTS, {"id": run_id, "keys": list(keys)})}


def move_steps(work: Work, values: Sequence[Mapping[str, Any]]) -> None:
    """Write new states."""
    work.run(_MOVE_STEP, list(values))


def begin_attempt(work: Work, step_id: UUID, attempt: int, owner: str) -> None:
    """A step is tried."""
    work.run(_BEGIN_ATTEMPT, {"id": step_id, "attempt": attempt, "owner": owner})


def end_attempt(work: Work, values: Mapping[str, Any]) -> None:
    """A try has ended."""
    work.run(_END_ATTEMPT, values)


def move_run(work: Work, values: Mapping[str, Any]) -> None:
    """Write the state of a run."""
    work.run(_MOVE_RUN, values)


def notify_stop(work: Work, step_id: UUID) -> None:
    """Tell the holder, at commit, to leave the step."""
    work.run(_NOTIFY_STOP, {"channel": STOP_CHANNEL, "step": str(step_id)})


def renew(work: Work, ids: Sequence[UUID], owner: str, lease: timedelta) -> list[Any]:
    """Extend the leases that the owner still has; gives `id`, `attempt`, `state` of these."""
    return work.rows(_RENEW, {"ids": list(ids), "owner": owner, "lease": lease})


def expired(work: Work, limit: int) -> list[Any]:
    """Held steps whose lease has run out."""
    return work.rows(_EXPIRED, {"limit": limit})


def due(work: Work, limit: int) -> list[Any]:
    """Waiting steps whose delay is over."""
    return work.rows(_DUE, {"limit": limit})


def stale_queues(work: Work, age: timedelta) -> list[Any]:
    """For each queue, how many steps were published longer ago than `age` and are still not taken."""
    return work.rows(_STALE_QUEUES, {"age": age})


def touch_stale(work: Work, queue: str, age: timedelta, limit: int) -> list[Any]:
    """The oldest of those steps, marked as published now."""
    return work.rows(_TOUCH_STALE, {"queue": queue, "age": age, "limit": limit})
