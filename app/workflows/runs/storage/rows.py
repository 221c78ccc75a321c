"""
The rows of workflows and runs.

    definition   what was submitted, once each, by its hash
    workflow     the versions of the named ones
    workflow_pause  the workflows whose runs stand still
    run          one execution: inputs, state, output
    step         a node of a run, or an item of a map: state, attempt, lease, output
    fan_out      how far a map has come
    attempt      one try of a step by one worker: how it went, and what the model wrote when it went badly
    event        what was told to a run from outside
    history      what happened to a run, in its order
    payload      the longer inputs, outputs, items and events, once each, by their hash

JSON is kept as text: the order of keys is the order in which a grammar makes a model write them.
Of a value that can be long, a row has the text or, in `…_sha256`, the hash of one that lies in `payload`; and its
length in `…_bytes`. `app.workflows.runs.storage.payloads` writes and reads them.
Every instant is the database's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSON, JSONB
from sqlmodel import Field, SQLModel

from app.workflows.state_machine.states import RunState, StepState


def _instant(*, nullable: bool = True) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if nullable else text("now()"))


def _one_of(column: str, states: Iterable[str]) -> CheckConstraint:
    listed = ", ".join(f"'{state}'" for state in states)
    return CheckConstraint(f"{column} IN ({listed})", name=f"{column}_is_known")


def _length() -> Any:
    """Bytes of a value as JSON; None where there is none."""
    return Field(default=None)


def _hash() -> Any:
    """The hash of a value that lies in `payload`."""
    return Field(default=None, foreign_key="payload.sha256", max_length=64)


def _by_hash(table: str, column: str) -> Index:
    return Index(f"ix_{table}_{column}", column, postgresql_where=text(f"{column} IS NOT NULL"))


class PayloadRow(SQLModel, table=True):
    """A long text. Never changed, shared by all rows that have it."""

    __tablename__ = "payload"

    #: Of the text in UTF-8.
    sha256: str = Field(primary_key=True, max_length=64)
    bytes: int
    body: str = Field(sa_column=Column(Text, nullable=False))
    created_at: datetime = Field(sa_column=_instant(nullable=False))


class DefinitionRow(SQLModel, table=True):
    """A definition. Never changed, shared by all runs that were submitted with it."""

    __tablename__ = "definition"

    sha256: str = Field(primary_key=True, max_length=64)
    document: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    created_at: datetime = Field(sa_column=_instant(nullable=False))


class WorkflowRow(SQLModel, table=True):
    """One version of a named workflow."""

    __tablename__ = "workflow"
    __table_args__ = (Index("ix_workflow_sha256", "sha256"),)

    name: str = Field(primary_key=True, max_length=100)
    version: int = Field(primary_key=True)
    sha256: str = Field(foreign_key="definition.sha256", max_length=64)
    created_at: datetime = Field(sa_column=_instant(nullable=False))


class WorkflowPauseRow(SQLModel, table=True):
    """A workflow whose runs stand still."""

    __tablename__ = "workflow_pause"

    name: str = Field(primary_key=True, max_length=100)
    paused_at: datetime = Field(sa_column=_instant(nullable=False))


class RunRow(SQLModel, table=True):
    """A run."""

    __tablename__ = "run"
    __table_args__ = (
        _one_of("state", RunState),
        CheckConstraint("(inputs IS NULL) <> (inputs_sha256 IS NULL)", name="inputs_are_somewhere"),
        UniqueConstraint("idempotency_key"),
        Index("ix_run_sha256", "sha256"),
        _by_hash("run", "inputs_sha256"),
        _by_hash("run", "output_sha256"),
        Index("ix_run_state_id", "state", "id"),
        Index("ix_run_workflow_id", "workflow", "id"),
        Index("ix_run_labels", "labels", postgresql_using="gin", postgresql_ops={"labels": "jsonb_path_ops"}),
        Index("ix_run_parent", "parent_step_id", postgresql_where=text("parent_step_id IS NOT NULL")),
        Index(
            "ix_run_concurrency",
            "concurrency_key",
            "state",
            postgresql_where=text("state NOT IN ('succeeded', 'failed', 'cancelled')"),
        ),
        Index("ix_run_called", "parent_step_id", "state", postgresql_where=text("finished_at IS NULL")),
        Index("ix_run_deduplicated", "dedup_key", "created_at", postgresql_where=text("dedup_key IS NOT NULL")),
        Index("ix_run_deadline", "deadline_at", postgresql_where=text("finished_at IS NULL")),
        Index("ix_run_expires", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
    )

    id: UUID = Field(primary_key=True)
    workflow: str = Field(max_length=100)
    #: The version that the client named or got; None for a definition that came with the request.
    version: int | None = None
    sha256: str = Field(foreign_key="definition.sha256", max_length=64)
    state: str = Field(max_length=16)
    #: How it will end, once it is cancelling or compensating.
    ending: str | None = Field(default=None, max_length=16)
    #: Nothing of it begins: somebody paused the run, or its workflow.
    paused: bool = False
    workflow_paused: bool = False
    priority: str = Field(max_length=16)
    #: The place within the class: 0 goes before 1, 1 before 2.
    rank: int = 1
    labels: dict[str, str] = Field(sa_column=Column(JSONB, nullable=False, server_default=text("'{}'")))
    inputs: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
    inputs_sha256: str | None = _hash()
    inputs_bytes: int | None = _length()
    output: Any = Field(default=None, sa_column=Column(JSON))
    output_sha256: str | None = _hash()
    output_bytes: int | None = _length()
    error: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
    idempotency_key: str | None = Field(default=None, max_length=255)
    #: Hash of what the client sent under its key, so that another content under the same key is refused.
    request_sha256: str | None = Field(default=None, max_length=64)
    #: Runs with the same key go on a few at a time.
    concurrency_key: str | None = Field(default=None, max_length=500)
    dedup_key: str | None = Field(default=None, max_length=500)
    #: The step that called it, and how many calls lie above it.
    parent_step_id: UUID | None = Field(
        default=None, sa_column=Column(Uuid, ForeignKey("step.id", ondelete="CASCADE", use_alter=True))
    )
    depth: int = 0
    #: The run that it repeats from some step on.
    forked_from: UUID | None = None
    #: Seconds that it is kept after its end.
    retention_s: int
    created_at: datetime = Field(sa_column=_instant(nullable=False))
    started_at: datetime | None = Field(default=None, sa_column=_instant())
    finished_at: datetime | None = Field(default=None, sa_column=_instant())
    deadline_at: datetime | None = Field(default=None, sa_column=_instant())
    #: It may be removed after this instant.
    expires_at: datetime | None = Field(default=None, sa_column=_instant())


class StepRow(SQLModel, table=True):
    """A step of a run, or an item of one that is a map."""

    __tablename__ = "step"
    __table_args__ = (
        _one_of("state", StepState),
        UniqueConstraint("run_id", "key"),
        Index("ix_step_ready", "queue", "published_at", postgresql_where=text("state = 'ready'")),
        Index("ix_step_held", "lease_until", postgresql_where=text("state IN ('running', 'cancelling')")),
        Index("ix_step_waiting", "not_before", postgresql_where=text("state IN ('waiting', 'awaiting')")),
        Index("ix_step_deadline", "deadline_at", postgresql_where=text("state IN ('ready', 'waiting', 'awaiting')")),
        Index("ix_step_delegated", "id", postgresql_where=text("delegated")),
        Index("ix_step_parent", "parent_id", "item", postgresql_where=text("parent_id IS NOT NULL")),
        CheckConstraint(
            "(owner IS NULL) = (lease_until IS NULL)"
            " AND (owner IS NULL OR state IN ('running', 'cancelling')) AND (owner IS NOT NULL OR state <> 'running')",
            name="held_means_leased",
        ),
        Index("ix_step_waiting_item", "parent_id", "item", postgresql_where=text("state = 'pending'")),
        CheckConstraint("(parent_id IS NULL) = (item IS NULL)", name="items_have_parents"),
        # What the planner asks each second (app.inference.demand): arrivals, steps to come, maps under way.
        Index(
            "ix_step_arrivals",
            "ready_at",
            postgresql_where=text("model IS NOT NULL"),
            postgresql_include=["model", "priority"],
        ),
        Index(
            "ix_step_to_come",
            "run_id",
            "position",
            postgresql_where=text("parent_id IS NULL AND state = 'pending'"),
        ),
        Index("ix_step_map", "run_id", postgresql_where=text("kind = 'map' AND state = 'awaiting'")),
        _by_hash("step", "input_sha256"),
        _by_hash("step", "output_sha256"),
    )

    id: UUID = Field(primary_key=True)
    run_id: UUID = Field(foreign_key="run.id", ondelete="CASCADE")
    #: Its id in the definition; for an item, that of the map and the index: `read[12]`.
    key: str = Field(max_length=80)
    #: The place in the definition, from 0.
    position: int
    kind: str = Field(max_length=32)
    #: For an item: the step of the map, the index from 0, and the value.
    parent_id: UUID | None = Field(default=None, foreign_key="step.id", ondelete="CASCADE")
    item: int | None = None
    input: Any = Field(default=None, sa_column=Column(JSON))
    input_sha256: str | None = _hash()
    input_bytes: int | None = _length()
    model: str | None = Field(default=None, max_length=200)
    #: The place of its model among those that it can ask.
    model_index: int = 0
    queue: str = Field(max_length=220)
    priority: str = Field(max_length=16)
    rank: int = 1
    state: str = Field(max_length=16)
    #: The branch that a switch or a wait took.
    branch: str | None = Field(default=None, max_length=64)
    #: What an awaited step waits for.
    awaits: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
    #: Items or a run are under way for it.
    delegated: bool = False
    attempt: int = 0
    failures: int = 0
    losses: int = 0
    #: The worker process that holds it.
    owner: str | None = Field(default=None, max_length=200)
    lease_until: datetime | None = Field(default=None, sa_column=_instant())
    #: A waiting step begins again at this instant; an awaited one is over.
    not_before: datetime | None = Field(default=None, sa_column=_instant())
    #: When the last message about it was sent.
    published_at: datetime | None = Field(default=None, sa_column=_instant())
    output: Any = Field(default=None, sa_column=Column(JSON))
    output_sha256: str | None = _hash()
    output_bytes: int | None = _length()
    error: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
    tokens_in: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    tokens_out: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    created_at: datetime = Field(sa_column=_instant(nullable=False))
    #: When it first could begin.
    ready_at: datetime | None = Field(default=None, sa_column=_instant())
    #: When it first began.
    started_at: datetime | None = Field(default=None, sa_column=_instant())
    finished_at: datetime | None = Field(default=None, sa_column=_instant())
    #: The end of the time for the whole step.
    deadline_at: datetime | None = Field(default=None, sa_column=_instant())


class FanOutRow(SQLModel, table=True):
    """How far a map has come."""

    __tablename__ = "fan_out"

    step_id: UUID = Field(primary_key=True, foreign_key="step.id", ondelete="CASCADE")
    total: int
    #: Items that have not begun; they begin in their order.
    waiting: int
    #: Items that were sent and have not ended.
    in_flight: int = 0
    failed: int = 0
    #: No other item begins.
    stopping: bool = False


class AttemptRow(SQLModel, table=True):
    """One try of a step."""

    __tablename__ = "attempt"
    __table_args__ = (
        Index(
            "ix_attempt_succeeded",
            "model",
            "finished_at",
            postgresql_where=text("outcome = 'succeeded' AND model IS NOT NULL"),
        ),
    )

    step_id: UUID = Field(primary_key=True, foreign_key="step.id", ondelete="CASCADE")
    attempt: int = Field(primary_key=True)
    owner: str = Field(max_length=200)
    #: The model that it asked.
    model: str | None = Field(default=None, max_length=200)
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


class EventRow(SQLModel, table=True):
    """What was told to a run from outside. It answers one step, or waits for one."""

    __tablename__ = "event"
    __table_args__ = (UniqueConstraint("run_id", "key"), _by_hash("event", "payload_sha256"))

    id: UUID = Field(primary_key=True)
    run_id: UUID = Field(foreign_key="run.id", ondelete="CASCADE")
    name: str = Field(max_length=64)
    payload: Any = Field(default=None, sa_column=Column(JSON))
    payload_sha256: str | None = _hash()
    payload_bytes: int | None = _length()
    #: The sender's own, so that what is sent twice counts once.
    key: str | None = Field(default=None, max_length=255)
    received_at: datetime = Field(sa_column=_instant(nullable=False))
    #: The step that it answered.
    step_id: UUID | None = None


class HistoryRow(SQLModel, table=True):
    """One thing that happened to a run."""

    __tablename__ = "history"
    __table_args__ = (Index("ix_history_run_id", "run_id", "id"),)

    id: int | None = Field(default=None, sa_column=Column(BigInteger, Identity(always=True), primary_key=True))
    run_id: UUID = Field(foreign_key="run.id", ondelete="CASCADE")
    at: datetime = Field(sa_column=_instant(nullable=False))
    #: The step that it happened to; None for the run.
    step: str | None = Field(default=None, max_length=80)
    attempt: int | None = None
    #: The state that it came to, or what else happened.
    event: str = Field(max_length=32)
    #: Why, and with what.
    cause: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
