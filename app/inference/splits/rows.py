"""
The database tables of splits, and of scores of runs.

    split            what is divided, and what has become of it
    split_outcome    the ended runs of a split, each once
    run_score        what people and programs said of runs
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, Column, DateTime, Index, text
from sqlalchemy.dialects.postgresql import JSON
from sqlmodel import Field, SQLModel


class SplitState(StrEnum):
    """What has become of a split."""

    RUNNING = "running"
    #: An operator has ended it.
    STOPPED = "stopped"
    #: A guard or a rule has ended it: everything goes to the control.
    ROLLED_BACK = "rolled_back"
    #: Its verdict is known.
    DECIDED = "decided"


def _instant(*, nullable: bool = False, default: str | None = "now()") -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if default is None else text(default))


class SplitRow(SQLModel, table=True):
    """A split. Its fields are those of `StoredSplit`."""

    __tablename__ = "split"
    __table_args__ = (
        CheckConstraint(f"state IN ({', '.join(repr(state.value) for state in SplitState)})", name="state_is_known"),
        CheckConstraint("(state = 'running') = (ended_at IS NULL)", name="ended_has_time"),
    )

    id: UUID = Field(primary_key=True)
    name: str = Field(max_length=40, unique=True)
    definition: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    state: str = Field(max_length=16)
    #: The stage of its ramp, from 0, and since when; a share that an operator has set instead.
    stage: int = 0
    stage_at: datetime = Field(sa_column=_instant())
    share: float | None = None
    author: str = Field(max_length=200)
    created_at: datetime = Field(sa_column=_instant())
    ended_at: datetime | None = Field(default=None, sa_column=_instant(nullable=True, default=None))
    reason: str = Field(default="", max_length=1_000, sa_column_kwargs={"server_default": ""})
    #: Up to when outcomes were read.
    read_at: datetime = Field(sa_column=_instant())


class SplitOutcomeRow(SQLModel, table=True):
    """An ended run of a split. Times are in seconds; a failed run has none."""

    __tablename__ = "split_outcome"
    __table_args__ = (Index("ix_split_outcome_run", "run_id"),)

    split_id: UUID = Field(primary_key=True, foreign_key="split.id", ondelete="CASCADE")
    run_id: UUID = Field(primary_key=True)
    variant: str = Field(max_length=40)
    #: The hash of who was assigned; the run's own id where it was assigned by itself.
    unit: str = Field(max_length=40)
    finished_at: datetime = Field(sa_column=_instant(default=None))
    failed: bool
    seconds: float | None = None
    first_token: float | None = None
    score: float | None = None


class RunScoreRow(SQLModel, table=True):
    """A score of a run, from 0 to 1."""

    __tablename__ = "run_score"
    __table_args__ = (
        CheckConstraint("value >= 0 AND value <= 1", name="value_is_a_part"),
        Index("ix_run_score_at", "at"),
    )

    run_id: UUID = Field(primary_key=True, foreign_key="run.id", ondelete="CASCADE")
    name: str = Field(primary_key=True, max_length=40)
    value: float
    comment: str = Field(default="", max_length=1_000, sa_column_kwargs={"server_default": ""})
    author: str = Field(max_length=200)
    at: datetime = Field(sa_column=_instant())


@dataclass(frozen=True, slots=True)
class StoredSplit:
    """A split as it is stored."""

    id: UUID
    name: str
    definition: dict[str, Any]
    state: str
    stage: int
    stage_at: datetime
    share: float | None
    author: str
    created_at: datetime
    ended_at: datetime | None
    reason: str
