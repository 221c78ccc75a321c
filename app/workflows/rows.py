"""
The rows of workflows and runs.

    definition   what was submitted, once each, by its hash
    workflow     the versions of the named ones
    run          one execution: inputs, state, output
    step         a node of a run: state, attempt, lease, output
    attempt      one try of a step by one worker: how it went, and what the model wrote when it went badly

JSON is kept as text: the order of keys is the order in which a grammar makes a model write them.
Every instant is the database's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Column, DateTime, Index, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSON
from sqlmodel import Field, SQLModel

from app.workflows.run import RunState, StepState


def _instant(*, nullable: bool = True) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if nullable else text("now()"))


def _one_of(column: str, states: Iterable[str]) -> CheckConstraint:
    listed = ", ".join(f"'{state}'" for state in states)
    return CheckConstraint(f"{column} IN ({listed})", name=f"{column}_is_known")


class DefinitionRow(SQLModel, table=True):
    """A definition. Never changed, shared by all runs that were submitted with it."""

    __tablename__ = "definition"

    sha256: str = Field(primary_key=True, max_length=64)
    document: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
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
    inputs: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    output: Any = Field(default=None, sa_column=Column(JSON))
    error: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
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
    output: Any = Field(default=None, sa_column=Column(JSON))
    error: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
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
