"""
The database tables of shadows.

    shadow         what is done again, and what has become of it
    shadow_pair    a run that was done again, and how both compare
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


class ShadowState(StrEnum):
    """What has become of a shadow."""

    RUNNING = "running"
    #: An operator has ended it.
    STOPPED = "stopped"
    #: It has as many pairs as it was to have.
    COMPLETE = "complete"


class PairState(StrEnum):
    """What has become of a pair."""

    OPEN = "open"
    COMPARED = "compared"
    #: It was not done again, or cannot be compared: `reason` says why.
    SKIPPED = "skipped"


def _instant(*, nullable: bool = False, default: str | None = "now()") -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if default is None else text(default))


class ShadowRow(SQLModel, table=True):
    """A shadow. Its fields are those of `StoredShadow`."""

    __tablename__ = "shadow"
    __table_args__ = (
        CheckConstraint(f"state IN ({', '.join(repr(one.value) for one in ShadowState)})", name="state_is_known"),
        CheckConstraint("(state = 'running') = (ended_at IS NULL)", name="ended_has_time"),
    )

    id: UUID = Field(primary_key=True)
    name: str = Field(max_length=40, unique=True)
    definition: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    state: str = Field(max_length=16)
    author: str = Field(max_length=200)
    created_at: datetime = Field(sa_column=_instant())
    ended_at: datetime | None = Field(default=None, sa_column=_instant(nullable=True, default=None))
    reason: str = Field(default="", max_length=1_000, sa_column_kwargs={"server_default": ""})
    #: Up to when ended runs were read.
    read_at: datetime = Field(sa_column=_instant())


class ShadowPairRow(SQLModel, table=True):
    """A pair: a run, and the run of the candidate."""

    __tablename__ = "shadow_pair"
    __table_args__ = (
        CheckConstraint(f"state IN ({', '.join(repr(one.value) for one in PairState)})", name="state_is_known"),
        Index("ix_shadow_pair_open", "shadow_id", postgresql_where=text("state = 'open'")),
        Index("ix_shadow_pair_at", "shadow_id", "at"),
    )

    shadow_id: UUID = Field(primary_key=True, foreign_key="shadow.id", ondelete="CASCADE")
    #: The run that was done again.
    run_id: UUID = Field(primary_key=True)
    candidate_run_id: UUID | None = None
    state: str = Field(max_length=16)
    reason: str = Field(default="", max_length=500, sa_column_kwargs={"server_default": ""})
    #: The differences by metric, the similarity, and what the judge prefers.
    result: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
    at: datetime = Field(sa_column=_instant())


@dataclass(frozen=True, slots=True)
class StoredShadow:
    """A shadow as it is stored."""

    id: UUID
    name: str
    definition: dict[str, Any]
    state: str
    author: str
    created_at: datetime
    ended_at: datetime | None
    reason: str


@dataclass(frozen=True, slots=True)
class StoredPair:
    """A pair as it is stored."""

    run_id: UUID
    candidate_run_id: UUID | None
    state: str
    reason: str
    result: dict[str, Any] | None
    at: datetime
