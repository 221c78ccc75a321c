"""
Rows of workflows and runs, and the statements on them.

    definition   what was submitted, once each, by its hash
    workflow     the versions of the named ones
    run          one execution: inputs, state, output
    step         a node of a run: state, attempt, lease, output
    attempt      one try of a step by one worker: how it went, and what the model wrote when it went badly

A step is claimed by compare-and-set and recorded under the lock of its run. Whoever locks both locks the run first.
Every instant is the database's: `now()` is the start of its transaction.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Index,
    Interval,
    Text,
    TextClause,
    UniqueConstraint,
    bindparam,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field, SQLModel

from app.kernel.database import Work
from app.workflows.run import RunState, StepState

#: The channel on which holders hear that a step is to be left; the payload is the step's id.
STOP_CHANNEL = "arriero_stop"


def _instant(*, nullable: bool = True) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if nullable else text("now()"))


def _one_of(column: str, states: Iterable[str]) -> CheckConstraint:
    listed = ", ".join(f"'{state}'" for state in states)
    return CheckConstraint(f"{column} IN ({listed})", name=f"{column}_is_known")


class DefinitionRow(SQLModel, table=True):
    """A definition. Never changed, shared by all runs that were submitted with it."""

    __tablename__ = "definition"

    sha256: str = Field(primary_key=True, max_length=64)
    document: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False))
    created_at: datetime = Field(sa_column=_instant(nullable=False))


class WorkflowRow(SQLModel, table=True):
    """One version of a named workflow."""

    __tablename__ = "workflow"

    name: str = Field(primary_key=True, max_length=100)
    version: int = Field(primary_key=True)
    sha256: str = Field(foreign_key="definition.sha256", max_length=64)
    created_at: datetime = Field(sa_column=_instant(nullable=False))


class RunRow(SQLModel, table=True):
    """A run."""

    __tablename__ = "run"
    __table_args__ = (
        _one_of("state", RunState),
        UniqueConstraint("idempotency_key"),
        Index("ix_run_state_id", "state", "id"),
        Index("ix_run_workflow_id", "workflow", "id"),
    )

    id: UUID = Field(primary_key=True)
    workflow: str = Field(max_length=100)
    #: The version that the client named or got; None for a definition that came with the request.
    version: int | None = None
    sha256: str = Field(foreign_key="definition.sha256", max_length=64)
    state: str = Field(max_length=16)
    priority: str = Field(max_length=16)
    inputs: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False))
    output: Any = Field(default=None, sa_column=Column(JSONB))
    error: dict[str, Any] | None = Field(default=None, sa_column=Column(JSONB))
    idempotency_key: str | None = Field(default=None, max_length=255)
    #: Hash of what the client sent under its key, so that another content under the same key is refused.
    request_sha256: str | None = Field(default=None, max_length=64)
    created_at: datetime = Field(sa_column=_instant(nullable=False))
    started_at: datetime | None = Field(default=None, sa_column=_instant())
    finished_at: datetime | None = Field(default=None, sa_column=_instant())


class StepRow(SQLModel, table=True):
    """A step of a run."""

    __tablename__ = "step"
    __table_args__ = (
        _one_of("state", StepState),
        UniqueConstraint("run_id", "key"),
        Index("ix_step_ready", "queue", "published_at", postgresql_where=text("state = 'ready'")),
        Index("ix_step_held", "lease_until", postgresql_where=text("state IN ('running', 'cancelling')")),
        Index("ix_step_waiting", "not_before", postgresql_where=text("state = 'waiting'")),
        CheckConstraint(
            "(state IN ('running', 'cancelling')) = (owner IS NOT NULL AND lease_until IS NOT NULL)",
            name="held_means_leased",
        ),
    )

    id: UUID = Field(primary_key=True)
    run_id: UUID = Field(foreign_key="run.id", ondelete="CASCADE")
    key: str = Field(max_length=64)
    #: The place in the definition, from 0.
    position: int
    kind: str = Field(max_length=32)
    model: str | None = Field(default=None, max_length=200)
    queue: str = Field(max_length=220)
    priority: str = Field(max_length=16)
    state: str = Field(max_length=16)
    attempt: int = 0
    failures: int = 0
    losses: int = 0
    #: The worker process that holds it.
    owner: str | None = Field(default=None, max_length=200)
    lease_until: datetime | None = Field(default=None, sa_column=_instant())
    #: A waiting step begins again at this instant.
    not_before: datetime | None = Field(default=None, sa_column=_instant())
    #: When the last message about it was sent.
    published_at: datetime | None = Field(default=None, sa_column=_instant())
    output: Any = Field(default=None, sa_column=Column(JSONB))
    error: dict[str, Any] | None = Field(default=None, sa_column=Column(JSONB))
    tokens_in: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    tokens_out: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    created_at: datetime = Field(sa_column=_instant(nullable=False))
    #: When it first could begin.
    ready_at: datetime | None = Field(default=None, sa_column=_instant())
    #: When it first began.
    started_at: datetime | None = Field(default=None, sa_column=_instant())
    finished_at: datetime | None = Field(default=None, sa_column=_instant())


class AttemptRow(SQLModel, table=True):
    """One try of a step."""

    __tablename__ = "attempt"

    step_id: UUID = Field(primary_key=True, foreign_key="step.id", ondelete="CASCADE")
    attempt: int = Field(primary_key=True)
    owner: str = Field(max_length=200)
    started_at: datetime = Field(sa_column=_instant(nullable=False))
    finished_at: datetime | None = Field(default=None, sa_column=_instant())
    #: `succeeded`, or the reason why not; None while it goes on.
    outcome: str | None = Field(default=None, max_length=32)
    message: str | None = Field(default=None, sa_column=Column(Text))
    #: What the model wrote, kept when it was not usable.
    text: str | None = Field(default=None, sa_column=Column(Text))
    tokens_in: int | None = None
    tokens_out: int | None = None
    tokens_cached: int | None = None
    #: Milliseconds from the engine's taking it until the first token.
    first_token_ms: int | None = None


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
    "INSERT INTO definition (sha256, document) VALUES (:sha256, CAST(:document AS jsonb)) ON CONFLICT DO NOTHING"
)
_INSERT_RUN = _sql("""
    INSERT INTO run (id, workflow, version, sha256, state, priority, inputs, idempotency_key, request_sha256)
    VALUES (:id, :workflow, :version, :sha256, :state, :priority, CAST(:inputs AS jsonb), :key, :request)
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
        output = CASE WHEN :has_output THEN CAST(:output AS jsonb) ELSE output END,
        error = COALESCE(CAST(:error AS jsonb), error),
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
        output = CAST(:output AS jsonb), error = CAST(:error AS jsonb)
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
    UPDATE step SET published_at = now() WHERE id IN (
        SELECT id FROM step
        WHERE state = 'ready' AND queue = :queue AND published_at < now() - :age
        ORDER BY published_at LIMIT :limit FOR UPDATE SKIP LOCKED
    ) AND state = 'ready'
    RETURNING id, attempt, queue, priority
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
