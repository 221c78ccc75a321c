"""
The database tables of scheduled jobs.

    scheduled_job        what operators have changed of a job, and how its last passes ended
    scheduled_job_pass   the last passes that did something, failed, or were requested by hand

A job without a row runs as the settings say, and has not run yet.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Column, DateTime, Float, Index, Text, text
from sqlalchemy.dialects.postgresql import JSON
from sqlmodel import Field, SQLModel

from app.governance.jobs.job import PassOutcome, PassState

_OUTCOMES = ", ".join(f"'{one.value}'" for one in PassOutcome)
_STATES = ", ".join(f"'{one.value}'" for one in PassState)


def _instant(*, nullable: bool = True) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if nullable else text("now()"))


def _count() -> Any:
    return Column(BigInteger, nullable=False, server_default="0")


class ScheduledJobRow(SQLModel, table=True):
    """A job: its changes, and its last passes."""

    __tablename__ = "scheduled_job"
    __table_args__ = (CheckConstraint(f"last_outcome IN ({_OUTCOMES})", name="outcome_is_known"),)

    name: str = Field(primary_key=True, max_length=63)
    #: The interval in seconds that an operator set; None: that of the settings, or `cron`.
    every_seconds: float | None = Field(default=None, sa_column=Column(Float))
    cron: str | None = Field(default=None, max_length=200)
    timezone: str = Field(default="UTC", max_length=64, sa_column_kwargs={"server_default": "UTC"})
    #: When its interval was last changed or it was resumed: earlier instants do not count.
    changed_at: datetime = Field(sa_column=_instant(nullable=False))
    paused_at: datetime | None = Field(default=None, sa_column=_instant())
    paused_reason: str | None = Field(default=None, sa_column=Column(Text))
    #: When its last pass was claimed.
    claimed_at: datetime | None = Field(default=None, sa_column=_instant())
    last_started_at: datetime | None = Field(default=None, sa_column=_instant())
    last_seconds: float | None = Field(default=None, sa_column=Column(Float))
    last_outcome: str | None = Field(default=None, max_length=16)
    #: What it did, or why it failed.
    last_detail: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
    last_worker: str | None = Field(default=None, sa_column=Column(Text))
    #: When a pass last did something, and when one last failed or was postponed.
    last_done_at: datetime | None = Field(default=None, sa_column=_instant())
    last_failed_at: datetime | None = Field(default=None, sa_column=_instant())
    #: Passes that ended since the installation exists, and those of them that failed or were postponed.
    passes: int = Field(default=0, sa_column=_count())
    failures: int = Field(default=0, sa_column=_count())
    #: Seconds of all passes together.
    seconds: float = Field(default=0.0, sa_column=Column(Float, nullable=False, server_default="0"))


class ScheduledJobPassRow(SQLModel, table=True):
    """A pass of a job."""

    __tablename__ = "scheduled_job_pass"
    __table_args__ = (
        CheckConstraint(f"state IN ({_STATES})", name="state_is_known"),
        CheckConstraint(f"outcome IN ({_OUTCOMES})", name="outcome_is_known"),
        Index("ix_scheduled_job_pass_job", "job", "requested_at"),
        Index("ix_scheduled_job_pass_open", "requested_at", postgresql_where=text("state IN ('requested', 'running')")),
    )

    id: UUID = Field(primary_key=True)
    job: str = Field(max_length=63)
    #: Whether an operator requested it.
    by_hand: bool
    state: str = Field(max_length=16)
    #: When it was requested; for a pass that beat triggered, when it began.
    requested_at: datetime = Field(sa_column=_instant(nullable=False))
    started_at: datetime | None = Field(default=None, sa_column=_instant())
    seconds: float | None = Field(default=None, sa_column=Column(Float))
    outcome: str | None = Field(default=None, max_length=16)
    detail: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
    worker: str | None = Field(default=None, sa_column=Column(Text))
