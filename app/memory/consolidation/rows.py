"""
The database tables of consolidation.

    consolidation            a consolidation of a namespace: what it reads, how far it is, and what came of it
    consolidation_namespace  up to which passage the turns of a namespace were read, and how often this is done
    consolidation_leftover   turns that were in no cluster, and are read again with newer ones

None of them has a text of a user. A namespace has one consolidation at a time that has not ended: an index makes sure
of it.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Interval,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field, SQLModel

from app.memory.consolidation.consolidation import ConsolidationState

_STATES = ", ".join(f"'{state.value}'" for state in ConsolidationState)


def _instant(*, nullable: bool = True, default: str | None = None) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if default is None else text(default))


def _count() -> Any:
    return Field(default=0, sa_column_kwargs={"server_default": text("0")})


def _big(*, nullable: bool = False) -> Any:
    return Column(BigInteger, nullable=nullable, server_default=None if nullable else text("0"))


def _text(*, nullable: bool = False) -> Any:
    return Column(Text, nullable=nullable, server_default=None if nullable else text("''"))


def _list() -> Any:
    return Column(JSONB, nullable=False, server_default=text("'[]'"))


class ConsolidationRow(SQLModel, table=True):
    """A consolidation. Its fields are those of `Consolidation`."""

    __tablename__ = "consolidation"
    __table_args__ = (
        CheckConstraint(f"state IN ({_STATES})", name="state_is_known"),
        Index("ix_consolidation_namespace", "namespace", "id"),
        Index(
            "uq_consolidation_open",
            "namespace",
            unique=True,
            postgresql_where=text("state IN ('queued', 'running')"),
        ),
    )

    id: UUID = Field(primary_key=True)
    namespace: str = Field(max_length=64)
    state: str = Field(max_length=16)
    requested_by: str = Field(sa_column=_text())
    model: str = Field(sa_column=_text())
    review_model: str = Field(sa_column=_text())
    #: It reads passages above the first and up to the second. Transactions that were open when the second was chosen
    #: are older than `horizon`, and it waits for their end.
    read_after: int = Field(sa_column=_big())
    read_through: int = Field(sa_column=_big())
    horizon: int = Field(sa_column=_big())
    #: Why it waits.
    waits_for: str = Field(default="", sa_column=_text())
    #: How often it was begun again because a conversation was deleted.
    restarts: int = _count()
    turns: int = _count()
    leftovers: int = _count()
    clusters: int = _count()
    #: Whether turns are left that are beyond its limit.
    has_more: bool = Field(default=False, sa_column_kwargs={"server_default": text("false")})
    #: The clusters: the ids of the passages of each, and its user.
    plan: list[dict[str, Any]] = Field(sa_column=_list())
    #: What was left over: ids of passages.
    noise: list[int] = Field(sa_column=_list())
    run_id: UUID | None = None
    error: str = Field(default="", sa_column=_text())
    written: int = _count()
    merged: int = _count()
    refused: int = _count()
    #: What became of each cluster, without texts.
    outcomes: list[dict[str, Any]] = Field(sa_column=_list())
    tokens_in: int = Field(default=0, sa_column=_big())
    tokens_out: int = Field(default=0, sa_column=_big())
    cost: float | None = Field(default=None, sa_column=Column(Float, nullable=True))
    created_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
    started_at: datetime | None = Field(default=None, sa_column=_instant())
    finished_at: datetime | None = Field(default=None, sa_column=_instant())


class ConsolidationNamespaceRow(SQLModel, table=True):
    """How far a namespace was read, and how often it is."""

    __tablename__ = "consolidation_namespace"
    __table_args__ = (
        Index("ix_consolidation_namespace_next", "next_at", postgresql_where=text("next_at IS NOT NULL")),
    )

    namespace: str = Field(primary_key=True, max_length=64)
    #: The last passage that was read.
    read_through: int = Field(default=0, sa_column=_big())
    #: None: only by hand.
    every: timedelta | None = Field(default=None, sa_column=Column(Interval))
    next_at: datetime | None = Field(default=None, sa_column=_instant())
    #: None: as the settings have it.
    model: str | None = Field(default=None, sa_column=_text(nullable=True))
    review_model: str | None = Field(default=None, sa_column=_text(nullable=True))


class ConsolidationLeftoverRow(SQLModel, table=True):
    """A turn that was in no cluster."""

    __tablename__ = "consolidation_leftover"
    __table_args__ = (Index("ix_consolidation_leftover_namespace", "namespace", "passage_id"),)

    passage_id: int = Field(
        sa_column=Column(BigInteger, ForeignKey("passage.id", ondelete="CASCADE"), primary_key=True)
    )
    namespace: str = Field(max_length=64)
    #: How often it was read.
    rounds: int
