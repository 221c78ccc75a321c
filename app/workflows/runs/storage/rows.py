"""
The tables of workflows and runs.

    definition      the definitions, once each, by their hash
    workflow        the versions of named workflows
    workflow_pause  the paused workflows
    run             one execution: inputs, state, output
    step            a node of a run, or an item of a map: state, attempt, lease, output
    fan_out         the counts of a map's items
    attempt         one try of a step by one worker: its outcome, and the model's text if that was unusable
    event           the events that were sent to a run
    history         the state changes and other events of a run, in their order
    payload         the longer inputs, outputs, items and events, once each, by their hash

JSON is stored as text: the order of keys is the order in which a grammar makes a model write them.
A long value is stored in the row as text, or in `payload` with its hash in `…_sha256`; its length is in `…_bytes`.
`app.workflows.runs.storage.payloads` writes and reads them.
Every instant is the database's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
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
    Integer,
    Numeric,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSON, JSONB
from sqlmodel import Field, SQLModel

from app.access import namespaces
from app.workflows.state_machine.states import RunState, StepState

#: Rows that name no namespace are in the default one.
_DEFAULT_NAMESPACE = {"server_default": namespaces.DEFAULT}


def _instant(*, nullable: bool = True) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if nullable else text("now()"))


def _one_of(column: str, states: Iterable[str]) -> CheckConstraint:
    listed = ", ".join(f"'{state}'" for state in states)
    return CheckConstraint(f"{column} IN ({listed})", name=f"{column}_is_known")


def _length() -> Any:
    """Bytes of a value as JSON; None where there is none."""
    return Field(default=None)


def _hash() -> Any:
    """The hash of a value that is stored in `payload`."""
    return Field(default=None, foreign_key="payload.sha256", max_length=64)


def _by_hash(table: str, column: str) -> Index:
    return Index(f"ix_{table}_{column}", column, postgresql_where=text(f"{column} IS NOT NULL"))


class PayloadRow(SQLModel, table=True):
    """A long text. It is never changed, and shared by all rows that have it."""

    __tablename__ = "payload"

    #: Of the text in UTF-8.
    sha256: str = Field(primary_key=True, max_length=64)
    bytes: int
    body: str = Field(sa_column=Column(Text, nullable=False))
    created_at: datetime = Field(sa_column=_instant(nullable=False))


class DefinitionRow(SQLModel, table=True):
    """A definition. It is never changed, and shared by all runs that were submitted with it."""

    __tablename__ = "definition"

    sha256: str = Field(primary_key=True, max_length=64)
    document: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    created_at: datetime = Field(sa_column=_instant(nullable=False))


class WorkflowRow(SQLModel, table=True):
    """One version of a named workflow."""

    __tablename__ = "workflow"
    __table_args__ = (Index("ix_workflow_sha256", "sha256"),)

    namespace: str = Field(primary_key=True, max_length=63, sa_column_kwargs=_DEFAULT_NAMESPACE)
    name: str = Field(primary_key=True, max_length=100)
    version: int = Field(primary_key=True)
    sha256: str = Field(foreign_key="definition.sha256", max_length=64)
    created_at: datetime = Field(sa_column=_instant(nullable=False))


class WorkflowPauseRow(SQLModel, table=True):
    """A paused workflow."""

    __tablename__ = "workflow_pause"

    namespace: str = Field(primary_key=True, max_length=63, sa_column_kwargs=_DEFAULT_NAMESPACE)
    name: str = Field(primary_key=True, max_length=100)
    paused_at: datetime = Field(sa_column=_instant(nullable=False))


class RunRow(SQLModel, table=True):
    """A run."""

    __tablename__ = "run"
    __table_args__ = (
        _one_of("state", RunState),
        CheckConstraint("(inputs IS NULL) <> (inputs_sha256 IS NULL)", name="inputs_are_somewhere"),
        UniqueConstraint("namespace", "idempotency_key"),
        Index("ix_run_sha256", "sha256"),
        _by_hash("run", "inputs_sha256"),
        _by_hash("run", "output_sha256"),
        Index("ix_run_state_id", "state", "id"),
        Index("ix_run_workflow_id", "workflow", "id"),
        Index("ix_run_namespace_id", "namespace", "id"),
        Index("ix_run_labels", "labels", postgresql_using="gin", postgresql_ops={"labels": "jsonb_path_ops"}),
        Index("ix_run_parent", "parent_step_id", postgresql_where=text("parent_step_id IS NOT NULL")),
        Index(
            "ix_run_concurrency",
            "concurrency_key",
            "state",
            postgresql_where=text("state NOT IN ('succeeded', 'failed', 'cancelled')"),
        ),
        Index("ix_run_called", "parent_step_id", "state", postgresql_where=text("finished_at IS NULL")),
        Index(
            "ix_run_called_finished",
            "finished_at",
            postgresql_where=text("finished_at IS NOT NULL AND parent_step_id IS NOT NULL"),
        ),
        Index("ix_run_deduplicated", "dedup_key", "created_at", postgresql_where=text("dedup_key IS NOT NULL")),
        Index("ix_run_deadline", "deadline_at", postgresql_where=text("finished_at IS NULL")),
        Index("ix_run_finished", "finished_at", "id", postgresql_where=text("finished_at IS NOT NULL")),
        Index("ix_run_expires", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
    )

    id: UUID = Field(primary_key=True)
    #: To whom it belongs. The label of that name is a copy, which `default` does not need.
    namespace: str = Field(max_length=63, sa_column_kwargs=_DEFAULT_NAMESPACE)
    workflow: str = Field(max_length=100)
    #: The version of a named workflow; None for a definition that came with the request.
    version: int | None = None
    sha256: str = Field(foreign_key="definition.sha256", max_length=64)
    state: str = Field(max_length=16)
    #: Its final state, while it is cancelling or compensating.
    ending: str | None = Field(default=None, max_length=16)
    #: No further step begins: the run was paused, or its workflow.
    paused: bool = False
    workflow_paused: bool = False
    priority: str = Field(max_length=16)
    #: The place within the class: 0 before 1, 1 before 2.
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
    #: The number of runs in flight with the same key is limited.
    concurrency_key: str | None = Field(default=None, max_length=500)
    dedup_key: str | None = Field(default=None, max_length=500)
    #: The step that called it, and the number of calls above it.
    parent_step_id: UUID | None = Field(
        default=None, sa_column=Column(Uuid, ForeignKey("step.id", ondelete="CASCADE", use_alter=True))
    )
    depth: int = 0
    #: The run that it repeats from a step on.
    forked_from: UUID | None = None
    #: Seconds for which it is kept after its end.
    retention_s: int
    created_at: datetime = Field(sa_column=_instant(nullable=False))
    started_at: datetime | None = Field(default=None, sa_column=_instant())
    finished_at: datetime | None = Field(default=None, sa_column=_instant())
    deadline_at: datetime | None = Field(default=None, sa_column=_instant())
    #: How long it was expected to take at its submission; None where that was not predicted.
    expected: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    #: It may be removed after this instant.
    expires_at: datetime | None = Field(default=None, sa_column=_instant())
    #: The trace that it belongs to: a `traceparent` of W3C Trace Context. None while nothing is traced.
    trace_parent: str | None = Field(default=None, max_length=55)


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
        # The queries of the planner, each second (app.inference.demand): arrivals, steps to come, open maps.
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
    #: The index of its model among those that it can use.
    model_index: int = 0
    queue: str = Field(max_length=220)
    priority: str = Field(max_length=16)
    rank: int = 1
    state: str = Field(max_length=16)
    #: The branch that a switch or a wait took.
    branch: str | None = Field(default=None, max_length=64)
    #: What an awaiting step waits for.
    awaits: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
    #: Its work is done by items or by a called run.
    delegated: bool = False
    attempt: int = 0
    failures: int = 0
    losses: int = 0
    #: The worker process that holds it.
    owner: str | None = Field(default=None, max_length=200)
    lease_until: datetime | None = Field(default=None, sa_column=_instant())
    #: The instant at which a waiting step becomes ready, and the wait of an awaiting step ends.
    not_before: datetime | None = Field(default=None, sa_column=_instant())
    #: When the last message about it was sent.
    published_at: datetime | None = Field(default=None, sa_column=_instant())
    output: Any = Field(default=None, sa_column=Column(JSON))
    output_sha256: str | None = _hash()
    output_bytes: int | None = _length()
    #: Why the text of its last attempt ended: `stop`, `length`, …
    finish_reason: str | None = Field(default=None, max_length=32)
    error: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
    tokens_in: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    tokens_out: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    created_at: datetime = Field(sa_column=_instant(nullable=False))
    #: When it first became ready.
    ready_at: datetime | None = Field(default=None, sa_column=_instant())
    #: When it first began.
    started_at: datetime | None = Field(default=None, sa_column=_instant())
    finished_at: datetime | None = Field(default=None, sa_column=_instant())
    #: The end of the time for the whole step.
    deadline_at: datetime | None = Field(default=None, sa_column=_instant())


class FanOutRow(SQLModel, table=True):
    """The counts of a map's items."""

    __tablename__ = "fan_out"

    step_id: UUID = Field(primary_key=True, foreign_key="step.id", ondelete="CASCADE")
    total: int
    #: Items that have not begun. They begin in the order of their index.
    waiting: int
    #: Items that have begun and not ended.
    in_flight: int = 0
    failed: int = 0
    #: No further item begins.
    stopping: bool = False
    #: Items whose text was cut at `max_tokens`.
    truncated: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default=text("0")))
    #: Tokens of the attempts of items that have ended since the map was begun.
    tokens_in: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default=text("0")))
    tokens_out: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default=text("0")))


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
        # What has ended since an instant: signals.
        Index(
            "ix_attempt_finished",
            "finished_at",
            postgresql_where=text("finished_at IS NOT NULL AND model IS NOT NULL"),
        ),
        Index("ix_attempt_cost", "step_id", postgresql_where=text("cost IS NOT NULL")),
    )

    step_id: UUID = Field(primary_key=True, foreign_key="step.id", ondelete="CASCADE")
    attempt: int = Field(primary_key=True)
    owner: str = Field(max_length=200)
    #: The model that it used.
    model: str | None = Field(default=None, max_length=200)
    started_at: datetime = Field(sa_column=_instant(nullable=False))
    finished_at: datetime | None = Field(default=None, sa_column=_instant())
    #: `succeeded`, or the reason of its failure; None while it runs.
    outcome: str | None = Field(default=None, max_length=32)
    message: str | None = Field(default=None, sa_column=Column(Text))
    #: The text of the model, stored if it was unusable.
    text: str | None = Field(default=None, sa_column=Column(Text))
    tokens_in: int | None = None
    tokens_out: int | None = None
    tokens_cached: int | None = None
    #: Milliseconds from its acceptance by the engine to the first token.
    first_token_ms: int | None = None
    #: Why its text ended: `stop`, `length`, …
    finish_reason: str | None = Field(default=None, max_length=32)
    #: What it cost, in the currency of the settings; None where that is not known.
    cost: Decimal | None = Field(default=None, sa_column=Column(Numeric(24, 12)))
    #: The prices that held, and the device time.
    cost_basis: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    #: What its prompt was put together of; None where nothing was.
    assembly: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    #: What hooks did to it, in their order; None where none was called.
    hooks: list[dict[str, Any]] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))


class EventRow(SQLModel, table=True):
    """An event that was sent to a run. It answers one step, or waits for one."""

    __tablename__ = "event"
    __table_args__ = (UniqueConstraint("run_id", "key"), _by_hash("event", "payload_sha256"))

    id: UUID = Field(primary_key=True)
    run_id: UUID = Field(foreign_key="run.id", ondelete="CASCADE")
    name: str = Field(max_length=64)
    payload: Any = Field(default=None, sa_column=Column(JSON))
    payload_sha256: str | None = _hash()
    payload_bytes: int | None = _length()
    #: The sender's key, so that an event that is sent twice counts once.
    key: str | None = Field(default=None, max_length=255)
    received_at: datetime = Field(sa_column=_instant(nullable=False))
    #: The step that it answered.
    step_id: UUID | None = None


class HistoryRow(SQLModel, table=True):
    """An entry of the history of a run."""

    __tablename__ = "history"
    __table_args__ = (Index("ix_history_run_id", "run_id", "id"),)

    id: int | None = Field(default=None, sa_column=Column(BigInteger, Identity(always=True), primary_key=True))
    run_id: UUID = Field(foreign_key="run.id", ondelete="CASCADE")
    at: datetime = Field(sa_column=_instant(nullable=False))
    #: The key of the step that it is about; None for the run.
    step: str | None = Field(default=None, max_length=80)
    attempt: int | None = None
    #: The new state, or what else happened.
    event: str = Field(max_length=32)
    #: Why, and with what.
    cause: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
