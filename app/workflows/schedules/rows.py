"""
The database tables of schedules.

    schedule         the document, and the instant up to which all fires are decided
    schedule_fire    the outcome of an instant: a run, or the reason why there is none

An instant has at most one row, and the idempotency key of its run is derived from the instant: it fires at most once.
A fire is open until it is closed after the end of its run; only open fires are read again.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, Column, DateTime, ForeignKey, Index, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSON
from sqlmodel import Field, SQLModel

from app.access import namespaces
from app.workflows.schedules.overlap import FireState

#: Rows that name no namespace are in the default one.
_DEFAULT_NAMESPACE = {"server_default": namespaces.DEFAULT}


def _instant(*, nullable: bool = True, default: str | None = None) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if default is None else text(default))


class ScheduleRow(SQLModel, table=True):
    """A schedule, and the state of its timetable."""

    __tablename__ = "schedule"
    __table_args__ = (
        UniqueConstraint("namespace", "name"),
        Index("ix_schedule_due", "next_at", postgresql_where=text("paused_at IS NULL")),
    )

    id: UUID = Field(primary_key=True)
    #: To whom it belongs, and its runs.
    namespace: str = Field(max_length=63, sa_column_kwargs=_DEFAULT_NAMESPACE)
    name: str = Field(max_length=100)
    document: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    #: All instants up to this one are decided.
    decided_to: datetime = Field(sa_column=_instant(nullable=False))
    #: When the next fire is due; None when there is none.
    next_at: datetime | None = Field(default=None, sa_column=_instant())
    paused_at: datetime | None = Field(default=None, sa_column=_instant())
    #: The reason given by the user or the service that paused it.
    paused_reason: str | None = Field(default=None, sa_column=Column(Text))
    created_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
    updated_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))


class ScheduleFireRow(SQLModel, table=True):
    """A fire of a schedule. A missed or skipped row may represent several consecutive fires."""

    __tablename__ = "schedule_fire"
    __table_args__ = (
        CheckConstraint(f"state IN ({', '.join(repr(state.value) for state in FireState)})", name="state_is_known"),
        UniqueConstraint("schedule_id", "at", "by_hand"),
        Index("ix_schedule_fire_open", "schedule_id", "at", postgresql_where=text("open")),
        Index("ix_schedule_fire_run_id", "run_id", postgresql_where=text("run_id IS NOT NULL")),
    )

    id: UUID = Field(primary_key=True)
    schedule_id: UUID = Field(foreign_key="schedule.id", ondelete="CASCADE")
    #: The instant of the trigger, or of the manual request.
    at: datetime = Field(sa_column=_instant(nullable=False))
    by_hand: bool = False
    #: `at` plus its jitter.
    due_at: datetime = Field(sa_column=_instant(nullable=False))
    #: For a row that represents several fires: the instant of the last one, and their number; None when there are more
    #: than were counted.
    last_at: datetime | None = Field(default=None, sa_column=_instant())
    count: int | None = 1
    state: str = Field(max_length=16)
    open: bool = False
    reason: str | None = Field(default=None, sa_column=Column(Text))
    run_id: UUID | None = Field(default=None, sa_column=Column(ForeignKey("run.id", ondelete="SET NULL")))
    #: When its state was last changed.
    decided_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
