"""
The database tables of memories.

    memory              a memory; its text never changes
    memory_source       where it comes from
    memory_event        what happened to it
    memory_extraction   up to where the messages of a conversation were read for memories, and the run that reads now
    memory_policy       whether a namespace has memories extracted, and by which model
    memory_watermark    until when changes of conversations were seen
    memory_refusal      what a model proposed and the gate refused

Within a namespace and a user, no two memories that hold have the same words: an index makes sure of it.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Column, DateTime, Index, Text, text
from sqlmodel import Field, SQLModel

from app.memory.memories.kinds import MemoryEvent, MemoryKind, MemoryOrigin


def _instant(*, nullable: bool = True, default: str | None = None) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if default is None else text(default))


def _text(*, nullable: bool = False) -> Any:
    return Column(Text, nullable=nullable)


def _big(*, nullable: bool = False) -> Any:
    return Column(BigInteger, nullable=nullable)


def _one_of(column: str, values: Any) -> str:
    return f"{column} IN ({', '.join(repr(value.value) for value in values)})"


class MemoryRow(SQLModel, table=True):
    """A memory. Its fields are those of `Memory`."""

    __tablename__ = "memory"
    __table_args__ = (
        CheckConstraint(_one_of("kind", MemoryKind), name="kind_is_known"),
        CheckConstraint("invalid_at >= valid_from", name="ends_after_it_begins"),
        Index("ix_memory_namespace", "namespace", "id"),
        Index("ix_memory_user", "namespace", "user_name", "id"),
        Index("ix_memory_kind", "namespace", "kind", "id"),
        Index("ix_memory_conversation", "conversation_id", postgresql_where=text("conversation_id IS NOT NULL")),
        Index("ix_memory_superseded_by", "superseded_by", postgresql_where=text("superseded_by IS NOT NULL")),
        Index(
            "uq_memory_text",
            "namespace",
            text("COALESCE(user_name, '')"),
            "text_hash",
            unique=True,
            postgresql_where=text("invalid_at IS NULL"),
        ),
    )

    id: UUID = Field(primary_key=True)
    namespace: str = Field(max_length=64)
    #: None: it belongs to the namespace.
    user_name: str | None = Field(default=None, sa_column=_text(nullable=True))
    conversation_id: UUID | None = None
    kind: str = Field(max_length=16)
    text_: str = Field(sa_column=Column("text", Text, nullable=False))
    #: Of its words, in hexadecimal digits.
    text_hash: str = Field(max_length=64)
    importance: float
    confidence: float
    valid_from: datetime = Field(sa_column=_instant(nullable=False))
    invalid_at: datetime | None = Field(default=None, sa_column=_instant())
    superseded_by: UUID | None = Field(default=None, foreign_key="memory.id", ondelete="SET NULL")
    created_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
    last_used_at: datetime | None = Field(default=None, sa_column=_instant())
    uses: int = 0


class MemorySourceRow(SQLModel, table=True):
    """A source of a memory."""

    __tablename__ = "memory_source"
    __table_args__ = (
        CheckConstraint(_one_of("origin", MemoryOrigin), name="origin_is_known"),
        Index("ix_memory_source_conversation", "conversation_id", postgresql_where=text("conversation_id IS NOT NULL")),
    )

    memory_id: UUID = Field(primary_key=True, foreign_key="memory.id", ondelete="CASCADE")
    #: Its place, from 0.
    position: int = Field(primary_key=True)
    origin: str = Field(max_length=16)
    author: str = Field(sa_column=_text())
    conversation_id: UUID | None = None
    message_id: UUID | None = None
    run_id: UUID | None = None


class MemoryEventRow(SQLModel, table=True):
    """Something that happened to a memory."""

    __tablename__ = "memory_event"
    __table_args__ = (
        CheckConstraint(_one_of("event", MemoryEvent), name="event_is_known"),
        Index("ix_memory_event_memory", "memory_id", "id"),
    )

    #: In the order in which things happened.
    id: int = Field(default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True))
    memory_id: UUID = Field(foreign_key="memory.id", ondelete="CASCADE")
    event: str = Field(max_length=16)
    at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
    author: str = Field(sa_column=_text())
    note: str = Field(sa_column=_text())
    detail: str = Field(sa_column=_text())


class MemoryExtractionRow(SQLModel, table=True):
    """How far the extraction of memories from a conversation is."""

    __tablename__ = "memory_extraction"
    __table_args__ = (
        Index("ix_memory_extraction_run", "run_id", postgresql_where=text("run_id IS NOT NULL")),
        Index("ix_memory_extraction_namespace", "namespace", "conversation_id"),
        Index(
            "ix_memory_extraction_pending",
            "last_at",
            postgresql_where=text("run_id IS NULL AND last_seq > read_through"),
        ),
    )

    conversation_id: UUID = Field(primary_key=True)
    namespace: str = Field(max_length=64)
    #: What was chosen for this conversation; None: as its namespace has it.
    enabled: bool | None = None
    #: The last message that the job knows of, and when it came.
    last_seq: int = Field(sa_column=_big())
    last_at: datetime = Field(sa_column=_instant(nullable=False))
    #: The messages up to this one were read, and so many characters of the one right after it.
    read_through: int = Field(sa_column=_big())
    read_offset: int = 0
    #: The run that reads the next ones, and how far it does.
    run_id: UUID | None = None
    run_through: int | None = Field(default=None, sa_column=_big(nullable=True))
    run_offset: int | None = None
    #: Runs in a row that failed, when the next one may start, and why the last one failed.
    failures: int = 0
    retry_at: datetime | None = Field(default=None, sa_column=_instant())
    error: str = Field(default="", sa_column=_text())
    #: Parts that no run could read.
    skipped: int = 0
    #: Runs that ended, what they proposed, what was written of it, and the tokens of all of it.
    runs: int = 0
    proposed: int = 0
    written: int = 0
    tokens_in: int = Field(default=0, sa_column=_big())
    tokens_out: int = Field(default=0, sa_column=_big())


class MemoryPolicyRow(SQLModel, table=True):
    """What a namespace has chosen about extraction."""

    __tablename__ = "memory_policy"

    namespace: str = Field(primary_key=True, max_length=64)
    #: None: as the settings have it.
    enabled: bool | None = None
    model: str | None = Field(default=None, sa_column=_text(nullable=True))
    #: Messages from before are not read.
    since: datetime = Field(sa_column=_instant(nullable=False, default="now()"))


class MemoryWatermarkRow(SQLModel, table=True):
    """Until when changes of conversations were seen."""

    __tablename__ = "memory_watermark"

    name: str = Field(primary_key=True, max_length=32)
    seen: datetime = Field(sa_column=_instant(nullable=False))


class MemoryRefusalRow(SQLModel, table=True):
    """A memory that a model proposed and the gate refused."""

    __tablename__ = "memory_refusal"
    __table_args__ = (
        Index("ix_memory_refusal_namespace", "namespace", "id"),
        Index("ix_memory_refusal_conversation", "conversation_id"),
        Index("ix_memory_refusal_created", "created_at"),
    )

    id: UUID = Field(primary_key=True)
    namespace: str = Field(max_length=64)
    user_name: str | None = Field(default=None, sa_column=_text(nullable=True))
    conversation_id: UUID
    run_id: UUID
    kind: str = Field(max_length=16)
    text_: str = Field(sa_column=Column("text", Text, nullable=False))
    reason: str = Field(max_length=32)
    detail: str = Field(sa_column=_text())
    created_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
