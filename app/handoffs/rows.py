"""
The tables of hand-offs.

    handoff           the versions of each hand-off
    handoff_message   the messages, each with what came of it
    handoff_opt_out   who wants no replies

A message is known again by its key: an index makes sure that a hand-off has it once.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, Column, DateTime, Index, Text, text
from sqlalchemy.dialects.postgresql import JSON
from sqlmodel import Field, SQLModel

from app.handoffs.record import MessageState

_OF = ("namespace", "handoff")
_STATES = ", ".join(repr(state.value) for state in MessageState)


def _instant(*, nullable: bool = True) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if nullable else text("now()"))


class HandoffRow(SQLModel, table=True):
    """A version of a hand-off. It is never changed."""

    __tablename__ = "handoff"

    namespace: str = Field(max_length=63, primary_key=True)
    name: str = Field(max_length=100, primary_key=True)
    version: int = Field(primary_key=True)
    document: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    sha256: str = Field(max_length=64)
    created_at: datetime = Field(sa_column=_instant(nullable=False))


class HandoffMessageRow(SQLModel, table=True):
    """A message. Its fields are those of `HandoffMessage`."""

    __tablename__ = "handoff_message"
    __table_args__ = (
        CheckConstraint(f"state IN ({_STATES})", name="state_is_known"),
        Index("uq_handoff_message_key", "namespace", "handoff", "key", unique=True),
        Index("ix_handoff_message_due", "due_at", postgresql_where=text("state = 'received'")),
        Index("ix_handoff_message_run_id", "run_id", postgresql_where=text("state = 'delivering'")),
        Index("ix_handoff_message_state", "namespace", "handoff", "state", "id"),
        Index("ix_handoff_message_finished_at", "finished_at", postgresql_where=text("finished_at IS NOT NULL")),
        Index(
            "ix_handoff_message_sent_at",
            "namespace",
            "handoff",
            "sent_at",
            postgresql_where=text("sent_at IS NOT NULL"),
        ),
        Index("ix_handoff_message_scores", "namespace", "handoff", "finished_at"),
    )

    id: UUID = Field(primary_key=True)
    namespace: str = Field(max_length=63)
    handoff: str = Field(max_length=100)
    version: int
    key: str = Field(sa_column=Column(Text, nullable=False))
    sender: str = Field(sa_column=Column(Text, nullable=False))
    state: str = Field(max_length=16)
    message: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    payload: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
    problems: list[Any] = Field(sa_column=Column(JSON, nullable=False, server_default="[]"))
    stages: list[Any] = Field(sa_column=Column(JSON, nullable=False, server_default="[]"))
    run_id: UUID | None = None
    sending: int
    duplicates: int
    takes: int
    #: When a control worker takes it; while one has it, when another one may.
    due_at: datetime = Field(sa_column=_instant(nullable=False))
    #: When it was submitted to its target, the last time.
    sent_at: datetime | None = Field(default=None, sa_column=_instant())
    accuracy: float | None = None
    completeness: float | None = None
    timeliness: float | None = None
    received_at: datetime = Field(sa_column=_instant(nullable=False))
    finished_at: datetime | None = Field(default=None, sa_column=_instant())


class HandoffOptOutRow(SQLModel, table=True):
    """Somebody who wants no replies."""

    __tablename__ = "handoff_opt_out"

    namespace: str = Field(max_length=63, primary_key=True)
    #: In the form of senders: the number of WhatsApp with its +.
    recipient: str = Field(sa_column=Column(Text, primary_key=True))
    at: datetime = Field(sa_column=_instant(nullable=False))
